"""`model.key_taps` against the NumPy reference and the whole forward pass, and its refusals.

The vectors are drawn at golden scale: s is of the order of 1, like the embeddings. Generation, several devices,
documents, sampled windows and measured histories: in the tests of these, together with the other options for memory
(tests/test_options_together.py).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.test_context import make_decoder as spread_decoder
from tests.decoding.test_exactness import TOLERANCE, compared, make_decoder
from tests.parallel.test_batch_split import TRAIN
from tests.support import golden, reference
from tests.support.models import SMALL
from tests.support.optional import need_modules
from tlinformer_jax import DualWindowBlock, ModelConfig, build_model
from tlinformer_jax.analysis.flops import num_parameters, training_flops
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.model import ARCHITECTURES, WINDOWED
from tlinformer_jax.decoding import history
from tlinformer_jax.decoding.cache import WindowedCache
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.decoding.history import SequenceRows
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.interop import params_from_reference, params_to_reference
from tlinformer_jax.interop.files import read_weights, write_safetensors
from tlinformer_jax.models import history as model_history
from tlinformer_jax.models import paired
from tlinformer_jax.models.key_rows import SHIFT_SCALE
from tlinformer_jax.models.model import embed
from tlinformer_jax.models.tlinformer import PreparedSequence
from tlinformer_jax.training.loss import summed_loss
from tlinformer_jax.training.optimizer import Horizon, build_optimizer, decay_mask

slow = pytest.mark.slow
TAPPED = dataclasses.replace(SMALL, hidden_depth=0, history_window=3, num_blocks=3, key_taps=3)
LENGTH = 18  # four windows of 4 tokens, and one of 2
# What each case changes.
WAYS = {
    "in chunks": {"memory": ExecutionPlan(chunk=2, checkpointing=True)},  # shorter than the taps
    "in pairs": {"memory": ExecutionPlan(checkpointing=True, paired=True)},
    "one window at a time": {"memory": ExecutionPlan(2, checkpointing=True)},
    "all together": {"memory": ExecutionPlan(together=5)},
    "in groups": {"memory": ExecutionPlan(2, together=3, checkpointing=True)},
    "in groups and chunks": {"memory": ExecutionPlan(2, together=2, chunk=5, checkpointing=True)},
    "in half precision": {"memory": ExecutionPlan(2, checkpointing=True), "dtype": "bfloat16"},
    "tconstformer": {"memory": ExecutionPlan(chunk=3, checkpointing=True), "architecture": "tconstformer"},
}
QUICK = ("in chunks", "in pairs")


def variables_of(config: ModelConfig):
    return params_from_reference(golden.random_weights(config), config)


def batch_of() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(3).integers(0, TAPPED.vocab_size, (2, LENGTH + 1)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": np.ones((2, LENGTH), np.float32)}


@functools.cache
def plain(config: ModelConfig):
    """Loss and gradient by ordinary differentiation of the whole forward pass, and its logits."""
    model, batch = build_model(config), batch_of()

    def loss(params):
        logits = model.apply({"params": params}, batch["inputs"])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], axis=-1)
        return -jnp.sum(chosen), logits

    (total, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables_of(config)["params"])
    return total, gradient, logits


def trained(config: ModelConfig):
    """Loss and gradient, as training has them."""
    model = build_model(config)
    loss = jax.jit(
        jax.value_and_grad(lambda params: summed_loss(params, batch_of(), jax.random.key(0), model=model)[0])
    )
    return loss(variables_of(config)["params"])


def whole(way: str) -> ModelConfig:
    return dataclasses.replace(TAPPED, **WAYS[way] | {"memory": ExecutionPlan(), "dtype": "float32"})


def error(way: str) -> float:
    """How far training is from the whole forward pass: of the arrays' gradients, the largest relative error."""
    truth, true_gradient, _ = plain(whole(way))
    loss, gradient = trained(dataclasses.replace(TAPPED, **WAYS[way]))
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(true_gradient), strict=True)
    norms = [float(jnp.linalg.norm(value - expected) / jnp.linalg.norm(expected)) for value, expected in pairs]
    return max(abs(float(loss / truth) - 1), *norms)


# ---- The forward pass


@pytest.mark.parametrize("way", ["in chunks", pytest.param("tconstformer", marks=slow)])
def test_logits_are_the_references_and_every_vector_matters(way):
    """From the second window on: the first has no history."""
    config, tokens = whole(way), batch_of()["inputs"]
    weights = golden.random_weights(config)
    expected, size = reference.logits(weights, config, tokens), config.generation_window
    np.testing.assert_allclose(plain(config)[2], expected, atol=TOLERANCE)
    for name in [name for name in weights if name.endswith("key_taps")]:
        for tap in range(config.key_taps):
            without = weights | {name: weights[name] * (np.arange(config.key_taps) != tap)[:, None]}
            others = reference.logits(without, config, tokens)
            np.testing.assert_array_equal(others[:, :size], expected[:, :size])
            assert np.abs(others - expected)[:, size:].max() > 1e-3


def test_they_start_at_zero_and_then_change_nothing():
    """Only blocks after the first have them, and the other parameters are those without."""
    off, tokens = dataclasses.replace(TAPPED, key_taps=0), batch_of()["inputs"]
    assert ModelConfig().key_taps == 0
    variables, without = (jax.jit(build_model(model).init)(jax.random.key(3), tokens[:, :1]) for model in (TAPPED, off))
    for block in (1, 2):
        taps = variables["params"][f"blocks_{block}"]["compress"].pop("taps")
        assert taps.shape == (3, TAPPED.d_model)
        assert not taps.any()
    jax.tree.map(np.testing.assert_array_equal, variables, without)
    assert num_parameters(TAPPED) - num_parameters(off) == 2 * 3 * TAPPED.d_model
    assert training_flops(TAPPED, 64) == training_flops(off, 64)


def test_a_block_alone_has_none():
    x, past = jnp.ones((1, 4, TAPPED.d_model)), jnp.ones((1, 9, TAPPED.d_model))
    variables = jax.eval_shape(DualWindowBlock(TAPPED).init, jax.random.key(0), x, past)
    assert "taps" not in variables["params"]["compress"]


# ---- Training


@pytest.mark.parametrize("way", [way if way in QUICK else pytest.param(way, marks=slow) for way in WAYS])
def test_every_way_of_training_is_the_whole_forward_pass(way):
    assert error(way) < (0.1 if "dtype" in WAYS[way] else 1e-4)


def test_the_gradient_is_the_references_slope():
    config, batch = whole("in chunks"), batch_of()
    weights, gradient = golden.random_weights(config), plain(config)[1]
    for block in (1, 2):
        name = f"transformer.transformer_layers.{block}.compress_context_layer.key_taps"
        for tap in range(config.key_taps):
            direction = np.zeros((config.key_taps, config.d_model))
            direction[tap] = np.random.default_rng(8).standard_normal(config.d_model)

            def truth_at(step, direction=direction, name=name):
                moved = weights | {name: weights[name].astype(np.float64) + step * direction}
                return reference.mean_loss(reference.logits(moved, config, batch["inputs"]), batch["labels"])

            slope = (truth_at(1e-5) - truth_at(-1e-5)) / 2e-5 * batch["labels"].size
            found = np.vdot(gradient[f"blocks_{block}"]["compress"]["taps"], direction)
            assert found == pytest.approx(slope, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_small_rate_moves_them_and_nothing_makes_them_decay(optimizer):
    """An update at a rate of 3e-4 moves s by ten times as much; muon takes them for vectors, not for a matrix."""
    train = dataclasses.replace(TRAIN, optimizer=optimizer, learning_rate=3e-4, schedule="constant", warmup_steps=0)
    params, optimizer = variables_of(TAPPED)["params"], build_optimizer(train, Horizon(10, 10))
    updates = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(params), params)[0])(
        jax.tree.map(np.ones_like, params)
    )
    np.testing.assert_allclose(SHIFT_SCALE * updates["blocks_2"]["compress"]["taps"], -3e-3, rtol=1e-3)
    for schedule in ("cosine", "paper"):
        decays = decay_mask(dataclasses.replace(TRAIN, schedule=schedule, steps="1epoch"), params)
        assert not decays["blocks_1"]["compress"]["taps"]
        assert decays["blocks_1"]["compress"]["qkv_kernel"]


def keys_of_rows(monkeypatch):
    """Keys of C' are made of its rows alone."""
    for module in (model_history, paired):
        monkeypatch.setattr(module, "keyed", lambda rows, sums: None)


def sums_of_another_block(monkeypatch):
    """Block 1 has the sums of block 2, and block 2 those of block 1."""
    real = PreparedSequence.reach

    def mutated(self, *arguments):
        reached = real(self, *arguments)
        return dataclasses.replace(reached, key_sums=reached.key_sums[::-1])

    monkeypatch.setattr(PreparedSequence, "reach", mutated)


def sums_forwards(monkeypatch):
    """The short history of a pair has the sums of the long one's rows beside it."""
    real = paired.keyed
    monkeypatch.setattr(paired, "keyed", lambda rows, sums: real(rows, [jnp.flip(array, 1) for array in sums]))


@slow
@pytest.mark.parametrize(
    ("mutate", "way"),
    [
        *((keys_of_rows, way) for way in QUICK),
        *((sums_of_another_block, way) for way in QUICK),
        (sums_forwards, "in pairs"),
    ],
)
def test_mistakes_in_training_are_caught(mutate, way, monkeypatch, own_traces):
    plain(whole(way))
    mutate(monkeypatch)
    assert error(way) > 0.01, "a hundred times what is allowed"


# ---- Generation


def test_a_decoder_of_half_precision_adds_the_sums_of_the_forward_pass():
    """Bit for bit: the vectors stay float32, and each sum is rounded once."""
    config, tokens = dataclasses.replace(TAPPED, dtype="bfloat16"), jnp.asarray(batch_of()["inputs"])
    model, variables = build_model(config), variables_of(config)
    sums = embed(model.apply(variables, method=model.parameters), config, tokens).key_sums
    decoder = Decoder(model, variables)
    cache = decoder.init_cache(2, LENGTH)
    cache = dataclasses.replace(cache, tokens=cache.tokens.at[:, :LENGTH].set(tokens))
    at = SequenceRows(decoder.params, config, cache, jnp.int32(1), jnp.int32(LENGTH))
    for block, expected in zip(decoder.params.blocks[1:], sums, strict=True):
        found = at.tap_sum(block.compress.taps, at.positions(jnp.int32(0)))
        np.testing.assert_array_equal(found[0, :LENGTH], expected[1])


def rows_without_taps(monkeypatch):
    """The keys of later blocks are made of the rows of C' alone."""
    monkeypatch.setattr(history, "plus", lambda rows, total: rows)


def anothers_tokens(monkeypatch):
    """Every sequence has the sums of the first one's tokens."""
    real = WindowedCache.tokens_before
    monkeypatch.setattr(WindowedCache, "tokens_before", lambda cache, row, *rest: real(cache, 0 * row, *rest))


def neighbour_on_the_device(monkeypatch):
    """A device takes for the tokens before a row those of its own rows before."""
    real = WindowedCache.tokens_before

    def mutated(cache, row, positions, back=1):
        return real(cache, row, positions, back * (1 if cache.split is None else cache.split.parts))

    monkeypatch.setattr(WindowedCache, "tokens_before", mutated)


@slow
@pytest.mark.parametrize(
    "mutate",
    [rows_without_taps, anothers_tokens, neighbour_on_the_device],
    ids=lambda mutate: mutate.__name__,
)
def test_mistakes_in_the_decoder_are_caught(mutate, monkeypatch, own_traces):
    mutate(monkeypatch)
    config = dataclasses.replace(TAPPED, num_blocks=2)
    decoder = spread_decoder(config, 2) if mutate is neighbour_on_the_device else make_decoder(config)
    error, _ = compared(decoder, [3, 9], 15)
    assert error > 100 * TOLERANCE


# ---- Files


def test_safetensors_there_and_back(tmp_path):
    need_modules("safetensors", extra="convert")
    variables = variables_of(TAPPED)
    write_safetensors(tmp_path / "model.safetensors", params_to_reference(variables, TAPPED), TAPPED)
    arrays = read_weights(tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, params_from_reference(arrays, TAPPED), variables)
    name = "transformer.transformer_layers.1.compress_context_layer.key_taps"
    with pytest.raises(DataError, match=rf"unknown {name}"):
        params_from_reference(arrays, dataclasses.replace(TAPPED, key_taps=0))
    with pytest.raises(DataError, match=rf"{name} has shape \[3, 16\], must be \[2, 16\]"):
        params_from_reference(arrays, dataclasses.replace(TAPPED, key_taps=2))
    del arrays[name]
    with pytest.raises(DataError, match=rf"missing {name}"):
        params_from_reference(arrays, TAPPED)


# ---- Refusals


@pytest.mark.parametrize("value", [-1, 9, True, "3"])
def test_only_zero_to_eight_are_allowed(value):
    with pytest.raises(ConfigError, match=r"model\.key_taps = .*: must be an integer from 0 to 8"):
        ModelConfig(key_taps=value)


def test_what_can_have_none_says_so():
    for architecture in set(ARCHITECTURES) - set(WINDOWED):
        allowed = (
            rf"model\.key_taps = 3: must be 0 for model\.architecture = '{architecture}', whose rows read the rows"
        )
        with pytest.raises(ConfigError, match=allowed):
            dataclasses.replace(TAPPED, architecture=architecture, d_ff=64)
    with pytest.raises(
        ConfigError, match=r"model\.key_taps = 3: must be 0 for model\.num_blocks = 1, because only later"
    ):
        dataclasses.replace(TAPPED, num_blocks=1)
