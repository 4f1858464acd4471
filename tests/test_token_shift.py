"""`model.token_shift` against the NumPy reference, on every path that makes rows for the model to read.

The shift's vector is drawn at golden scale: s is of the order of 1, like the embeddings.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.test_context import make_decoder as spread_decoder
from tests.decoding.test_exactness import TOLERANCE, check_every_way, compared, make_decoder, truth
from tests.parallel.test_batch_split import MESHES, TRAIN, gradient, gradient_error
from tests.parallel.test_batch_split import MODEL as TRAINED
from tests.support import golden, reference
from tests.support.models import SMALL
from tests.support.optional import need_modules
from tests.test_model import golden_scale
from tests.test_window_sampling import batch_of, loss_and_gradient
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.analysis.flops import training_flops
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.model import ARCHITECTURES, RECURRENT
from tlinformer_jax.decoding import cache_bytes, history, windowed
from tlinformer_jax.decoding.cache import NO_TOKEN, WindowedCache
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.decoding.params import embed as decoded
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.interop import params_from_reference, params_to_reference
from tlinformer_jax.interop.files import read_weights, write_safetensors
from tlinformer_jax.models.key_rows import SHIFT_SCALE, tokens_before
from tlinformer_jax.models.model import embed
from tlinformer_jax.training import window_loss as loss_module
from tlinformer_jax.training.optimizer import Horizon, build_optimizer, decay_mask

SHIFTED = dataclasses.replace(SMALL, hidden_depth=0, history_window=3, token_shift=True)
PROMPTS = [3, 8, 9, 1, 12]  # before, at and after the edges of windows of 4
FED = 27
SHIFTING = tuple(name for name in ARCHITECTURES if name not in RECURRENT)
# TConstFormer has less of the same, and takes as long to compile; it decodes in tests/test_options_together.py.
QUICK = tuple(name for name in SHIFTING if name != "tconstformer")


def shifted(architecture: str, **changes) -> ModelConfig:
    return dataclasses.replace(SHIFTED, architecture=architecture, **changes)


# ---- The forward pass


@pytest.mark.parametrize("architecture", SHIFTING)
def test_logits_are_the_references_whether_tokens_or_rows_are_given(architecture):
    config = shifted(architecture)
    tokens, expected = truth(config, FED, 3)
    model, variables = build_model(config), golden_scale(config)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, tokens), expected, atol=TOLERANCE)
    rows = variables["params"]["embedding"][tokens]
    np.testing.assert_allclose(jax.jit(model.apply)(variables, inputs_embeds=rows), expected, atol=TOLERANCE)
    plain = reference.logits(golden.random_weights(config), dataclasses.replace(config, token_shift=False), tokens)
    assert np.abs(plain - expected)[:, 1:].max(-1).min() > 0.01, "every position but the first has a predecessor"
    np.testing.assert_array_equal(plain[:, 0], expected[:, 0])


@pytest.mark.parametrize("architecture", QUICK)
def test_it_is_off_unless_asked_for_and_starts_at_zero(architecture):
    """Without it no parameter; with it the same others, and before training the same logits but for rounding."""
    config = shifted(architecture, num_blocks=1)
    off = dataclasses.replace(config, token_shift=False)
    assert not ModelConfig().token_shift
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 11))
    variables, without = (jax.jit(build_model(model).init)(jax.random.key(3), tokens[:, :1]) for model in (config, off))
    shift = variables["params"].pop("shift")
    assert shift.shape == (config.d_model,)
    assert not shift.any()
    jax.tree.map(np.testing.assert_array_equal, variables, without)
    given = {"params": variables["params"] | {"shift": shift}}
    on, plain = jax.jit(build_model(config).apply)(given, tokens), jax.jit(build_model(off).apply)(without, tokens)
    np.testing.assert_allclose(on, plain, atol=1e-6)


@pytest.mark.parametrize("wrong", [SHIFTED.vocab_size, -2])
def test_a_wrong_id_makes_its_own_row_and_the_next_key_nan(wrong):
    model = build_model(SHIFTED)
    params = model.apply(golden_scale(SHIFTED), method=model.parameters)
    tokens = jnp.array([[1, wrong, 3, 4]])
    for before in (None, [tokens_before(tokens)]):
        found = embed(params, SHIFTED, tokens, before)
        np.testing.assert_array_equal(np.isnan(found.rows).all(-1), [[False, True, False, False]])
        np.testing.assert_array_equal(np.isnan(found.key_rows).all(-1), [[False, True, True, False]])


@pytest.mark.parametrize("value", [1, "yes", None])
def test_only_true_and_false_are_allowed(value):
    with pytest.raises(ConfigError, match=r"model\.token_shift = .*: must be True or False"):
        ModelConfig(token_shift=value)


@pytest.mark.parametrize("architecture", RECURRENT)
def test_what_has_a_convolution_has_no_shift(architecture):
    with pytest.raises(
        ConfigError, match=rf"model\.token_shift = True: must be False for architecture '{architecture}'"
    ):
        shifted(architecture, d_ff=64)


# ---- Generation


@pytest.mark.parametrize(
    ("architecture", "hidden_depth"),
    [pytest.param("tlinformer", 1, marks=pytest.mark.slow), ("transformer", 0), ("sliding_window", 0)],
)
def test_prefill_step_and_slide_equal_the_reference(architecture, hidden_depth):
    """Prompts of unequal lengths in one batch, each continued across at least three slides. TLinFormer with its other
    options: tests/test_options_together.py."""
    check_every_way(shifted(architecture, hidden_depth=hidden_depth), PROMPTS, FED, alone=(1, 8))


@pytest.mark.parametrize("architecture", SHIFTING)
def test_cache_bytes_are_those_of_its_arrays(architecture):
    """A baseline's cache has each sequence's last token; a windowed one had all of them before."""
    config = shifted(architecture)
    cache = make_decoder(config).init_cache(2, 20)
    sizes = cache_bytes(config, cache, [20, 20])
    assert sizes.allocated == sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert ("last" in sizes.parts) == (not config.windowed)
    without = dataclasses.replace(config, token_shift=False)
    plain = cache_bytes(without, make_decoder(without).init_cache(2, 20), [20, 20])
    assert sizes.allocated - plain.allocated == (0 if config.windowed else 2 * 4)


def unshifted_history(monkeypatch):
    """Only the window's rows are shifted, not those of the history."""
    real = history.embed
    monkeypatch.setattr(history, "embed", lambda params, ids, before=None: real(params, ids, jnp.full_like(ids, -1)))


def shifted_values(monkeypatch):
    """The history's values are made of the shifted rows as well."""
    real = history.write_rows

    def mutated(cache, row, start, layer, rows, rotations, backend, key_rows=None, **options):
        values = rows if key_rows is None else key_rows
        return real(cache, row, start, layer, values, rotations, backend, key_rows, **options)

    monkeypatch.setattr(history, "write_rows", mutated)


def slide_without_shift(monkeypatch):
    """What a slide appends to the history is not shifted."""
    real = windowed.write_rows
    monkeypatch.setattr(windowed, "write_rows", lambda *arguments: real(*arguments[:-1]))


def window_without_predecessor(monkeypatch):
    """The first token of a prompt's window takes nothing from the history."""
    real = windowed.embed

    def mutated(params, ids, before=None):
        if before is not None and ids.shape[1] == SHIFTED.generation_window:
            before = before.at[:, 0].set(NO_TOKEN)
        return real(params, ids, before)

    monkeypatch.setattr(windowed, "embed", mutated)


def slide_forgets_last_token(monkeypatch):
    """The first token after a slide takes nothing from the one before."""
    real = WindowedCache.last_token
    monkeypatch.setattr(
        WindowedCache, "last_token", lambda cache: jnp.where(cache.window_length == 0, NO_TOKEN, real(cache))
    )


def anothers_predecessor(monkeypatch):
    """A sequence's step takes the last token of the sequence beside it."""
    real = WindowedCache.last_token
    monkeypatch.setattr(WindowedCache, "last_token", lambda cache: jnp.roll(real(cache), 1))


def neighbour_on_the_device(monkeypatch):
    """A device takes for the token before a row that of its own row before."""
    real = WindowedCache.tokens_before

    def mutated(cache, row, positions):
        return real(cache, row, positions - (0 if cache.split is None else cache.split.parts - 1))

    monkeypatch.setattr(WindowedCache, "tokens_before", mutated)


MUTATIONS = (
    unshifted_history,
    shifted_values,
    slide_without_shift,
    window_without_predecessor,
    slide_forgets_last_token,
    anothers_predecessor,
    neighbour_on_the_device,
)


@pytest.mark.slow
@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_mistakes_in_the_decoder_are_caught(mutate, monkeypatch, own_traces):
    mutate(monkeypatch)
    config = dataclasses.replace(SHIFTED, num_blocks=1)
    decoder = spread_decoder(config, 2) if mutate is neighbour_on_the_device else make_decoder(config)
    error, _ = compared(decoder, [3, 9], 15)
    assert error > 100 * TOLERANCE


# ---- Training


@pytest.mark.parametrize(
    ("architecture", "checkpointing"),
    [
        ("tlinformer", True),
        ("transformer", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("tlinformer", False), ("transformer", True), ("sliding_window", True), ("tconstformer", True))
        ),
    ],
)
def test_the_gradient_of_the_vector_is_the_references_slope(architecture, checkpointing):
    config = shifted(architecture, memory=ExecutionPlan(checkpointing=checkpointing))
    weights = golden.random_weights(config)
    batch = batch_of()
    value, gradients = loss_and_gradient(config)(golden_scale(config)["params"], None)
    direction = np.random.default_rng(8).standard_normal(config.d_model)

    def truth_at(step: float) -> float:
        moved = weights | {"token_shift": weights["token_shift"].astype(np.float64) + step * direction}
        return reference.mean_loss(reference.logits(moved, config, batch["inputs"]), batch["labels"])

    assert float(value) == pytest.approx(truth_at(0), rel=1e-5)
    slope = (truth_at(1e-5) - truth_at(-1e-5)) / 2e-5
    assert abs(slope) > 0.01
    assert np.vdot(gradients["shift"], direction) == pytest.approx(slope, rel=1e-3)


@pytest.mark.slow
def test_a_device_that_takes_its_own_row_before_is_noticed(monkeypatch):
    """Rows of the history split over devices: the token before each lies on another device."""
    jax.clear_caches()
    model = dataclasses.replace(TRAINED, token_shift=True)
    one = gradient(model, TRAIN)
    real = loss_module.tokens_before
    monkeypatch.setattr(loss_module, "tokens_before", lambda tokens, documents, back: real(real(tokens)))
    assert gradient_error(one, gradient(model, TRAIN, MESHES["data, window, context"])) > 0.01
    jax.clear_caches()


@pytest.mark.parametrize("schedule", ["cosine", "paper"])
def test_a_small_rate_moves_it_and_nothing_makes_it_decay(schedule):
    """An update at a rate of 3e-4 moves s by ten times as much; it never decays."""
    config, horizon = shifted("tlinformer"), Horizon(10, 10)
    train = dataclasses.replace(TRAIN, learning_rate=3e-4, schedule="constant", warmup_steps=0, batch_size=2)
    params = golden_scale(config)["params"]
    optimizer = build_optimizer(train, horizon)
    updates = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(params), params)[0])(
        jax.tree.map(np.ones_like, params)
    )
    np.testing.assert_allclose(SHIFT_SCALE * updates["shift"], -3e-3, rtol=1e-3)
    decays = decay_mask(dataclasses.replace(TRAIN, schedule=schedule, steps="1epoch"), params)
    assert not decays["shift"]
    assert decays["embedding"]


def test_model_flops_are_those_without_it():
    assert training_flops(SHIFTED, 64) == training_flops(dataclasses.replace(SHIFTED, token_shift=False), 64)


# ---- Files


@pytest.mark.parametrize("architecture", SHIFTING)
def test_safetensors_there_and_back(architecture, tmp_path):
    need_modules("safetensors", extra="convert")
    config = shifted(architecture)
    variables = golden_scale(config)
    write_safetensors(tmp_path / "model.safetensors", params_to_reference(variables, config), config)
    arrays = read_weights(tmp_path / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, params_from_reference(arrays, config), variables)
    with pytest.raises(DataError, match="unknown token_shift"):
        params_from_reference(arrays, dataclasses.replace(config, token_shift=False))
    del arrays["token_shift"]
    with pytest.raises(DataError, match="missing token_shift"):
        params_from_reference(arrays, config)


def test_a_decoder_of_half_precision_reads_the_rows_of_the_forward_pass():
    """The shifted rows themselves, bit for bit: the vector stays float32, and the sum is rounded once."""
    config = shifted("tlinformer", dtype="bfloat16")
    model, variables = build_model(config), golden_scale(config)
    tokens = jnp.asarray(truth(config, FED, 3)[0], jnp.int32)
    rows = embed(model.apply(variables, method=model.parameters), config, tokens)
    params = Decoder(model, variables).params
    for before in (None, tokens_before(tokens)):
        jax.tree.map(np.testing.assert_array_equal, decoded(params, tokens, before), rows)
