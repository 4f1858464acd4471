"""`model.key_taps` against the NumPy reference, on every path that makes keys of the history, and its refusals.

The taps are drawn at golden scale: s is of the order of 1, like the embeddings.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parallel.test_batch_split import MODEL as TRAINED
from tests.parallel.test_batch_split import TRAIN
from tests.support import golden, reference
from tests.support.models import SMALL
from tlinformer_jax import DualWindowBlock, ModelConfig, build_model
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.model import RECURRENT, ExecutionPlan
from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.evaluation.history import _sums
from tlinformer_jax.interop import params_from_reference, params_to_reference
from tlinformer_jax.models import model as model_module
from tlinformer_jax.models import paired, streams, taps, tlinformer
from tlinformer_jax.parallel.sharding import build_mesh
from tlinformer_jax.training.loss import summed_loss
from tlinformer_jax.training.optimizer import decay_mask
from tlinformer_jax.training.setup import check_sequences_divide

TOLERANCE = 2e-5
TAPPED = dataclasses.replace(SMALL, hidden_depth=0, history_window=3, key_taps=3)
LENGTH = 18  # four windows of 4 tokens, and one of 2
# What each case changes: the plan, and the shape that it needs.
WAYS = {
    "one window at a time": {"memory": ExecutionPlan(2, checkpointing=True), "num_blocks": 3},
    "all together": {"memory": ExecutionPlan(together=5)},
    "in groups": {"memory": ExecutionPlan(2, together=3, checkpointing=True)},
    "in pairs": {"memory": ExecutionPlan(checkpointing=True, paired=True), "num_blocks": 3},
    "in chunks": {"memory": ExecutionPlan(2, chunk=5, checkpointing=True), "num_blocks": 3},
    "chunks shorter than the taps": {"memory": ExecutionPlan(chunk=2, checkpointing=True)},
    "block 0 with the token shift": {"memory": ExecutionPlan(2, checkpointing=True), "token_shift": True},
    "overlapping": {"memory": ExecutionPlan(2, checkpointing=True), "window_overlap": 2},
    "tconstformer": {"memory": ExecutionPlan(checkpointing=True), "architecture": "tconstformer"},
    "transformer": {"memory": ExecutionPlan(scan_layers=True, checkpointing=True), "architecture": "transformer"},
    "transformer with the token shift": {
        "memory": ExecutionPlan(scan_layers=True, checkpointing=True),
        "architecture": "transformer",
        "token_shift": True,
        "num_blocks": 3,
    },
}


@functools.cache
def weights_of(config: ModelConfig) -> dict[str, np.ndarray]:
    drawn = golden.random_weights(dataclasses.replace(config, key_taps=0))
    rng = np.random.default_rng(7)
    return drawn | {"taps": 0.1 * rng.standard_normal((config.num_blocks, config.key_taps, config.d_model))}


def params_of(config: ModelConfig) -> dict:
    drawn = dict(weights_of(config))
    vectors = drawn.pop("taps").astype(np.float32)
    params = params_from_reference(drawn, dataclasses.replace(config, key_taps=0))["params"]
    for block, tap in np.ndindex(*vectors.shape[:2]):
        if block < config.token_shift:
            continue
        layer = params[f"blocks_{block}"]["compress"] if config.windowed else params[f"layers_{2 * block}"]
        layer[f"tap_{tap + 1}"] = jnp.asarray(vectors[block, tap])
    return params


def batch_of() -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(3).integers(0, TAPPED.vocab_size, (2, LENGTH + 1)).astype(np.int32)
    weights = np.random.default_rng(4).integers(0, 2, (2, LENGTH)).astype(np.float32)
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": weights}


def cross_entropy(logits, batch):
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["labels"][..., None], axis=-1)[..., 0]
    return jnp.sum(losses * batch["weights"])


@functools.cache
def plain(config: ModelConfig):
    """Loss and gradients by ordinary differentiation of the whole forward pass, and its logits."""
    model, batch = build_model(config), batch_of()

    def loss(params):
        logits = model.apply({"params": params}, batch["inputs"])
        return cross_entropy(logits, batch), logits

    (total, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params_of(config))
    return total, gradient, logits


def trained(config: ModelConfig):
    """Loss and gradients, as training has them."""
    model, batch = build_model(config), batch_of()

    def loss(params):
        return summed_loss(params, batch, jax.random.key(0), model=model)[0]

    return jax.jit(jax.value_and_grad(loss))(params_of(config))


def error(way: str) -> float:
    """How far training is from the whole forward pass: of the arrays' gradients, the largest relative error."""
    config = dataclasses.replace(TAPPED, **WAYS[way])
    truth, true_gradient, _ = plain(dataclasses.replace(config, memory=ExecutionPlan(9)))
    loss, gradient = trained(config)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(true_gradient), strict=True)
    norms = [float(jnp.linalg.norm(value - expected) / jnp.linalg.norm(expected)) for value, expected in pairs]
    return max(abs(float(loss / truth) - 1), *norms)


@pytest.mark.parametrize(
    ("architecture", "blocks", "shift"),
    [
        *(
            ("tlinformer", 3, False),
            ("tconstformer", 2, False),
            ("transformer", 2, False),
            ("sliding_window", 2, False),
        ),
        *(("tlinformer", 2, True), ("transformer", 3, True)),
    ],
)
def test_logits_are_the_references(architecture, blocks, shift):
    """Of all positions, and of those from the third window on alone, as evaluation computes them."""
    config = dataclasses.replace(TAPPED, architecture=architecture, num_blocks=blocks, token_shift=shift)
    config = dataclasses.replace(config, memory=ExecutionPlan(9))
    tokens, model = batch_of()["inputs"], build_model(config)
    expected = reference.logits(weights_of(config), config, tokens)
    np.testing.assert_allclose(plain(config)[2], expected, atol=TOLERANCE)
    variables = {"params": params_of(config)}
    rest = model.apply(variables, tokens, start=9, method=model.hidden_states)
    np.testing.assert_allclose(rest @ variables["params"]["embedding"].T, expected[:, 9:], atol=TOLERANCE)
    for block in range(shift, blocks):
        without = weights_of(config)["taps"].copy()
        without[block] = 0
        others = reference.logits(weights_of(config) | {"taps": without}, config, tokens)
        assert np.abs(others - expected)[:, 9:].max(-1).min() > 1e-3, "the taps of each block matter"


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_training_is_the_whole_forward_pass(way):
    assert error(way) < 1e-4


def test_the_gradient_of_the_taps_is_the_references_slope():
    config = dataclasses.replace(TAPPED, memory=ExecutionPlan(2, checkpointing=True))
    weights, batch = weights_of(config), batch_of() | {"weights": np.ones((2, LENGTH), np.float32)}
    model = build_model(config)
    gradient = jax.grad(lambda params: summed_loss(params, batch, jax.random.key(0), model=model)[0])(params_of(config))
    for block in range(config.num_blocks):
        for tap in range(config.key_taps):
            direction = np.zeros_like(weights["taps"])
            direction[block, tap] = np.random.default_rng(8).standard_normal(config.d_model)

            def truth_at(step, direction=direction):
                logits = reference.logits(
                    weights | {"taps": weights["taps"] + step * direction}, config, batch["inputs"]
                )
                return reference.mean_loss(logits, batch["labels"]) * batch["labels"].size

            slope = (truth_at(1e-5) - truth_at(-1e-5)) / 2e-5
            found = np.vdot(gradient[f"blocks_{block}"]["compress"][f"tap_{tap + 1}"], direction[block, tap])
            assert found == pytest.approx(slope, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("architecture", ["tlinformer", "transformer"])
def test_taps_start_at_zero_and_then_change_nothing(architecture):
    config = dataclasses.replace(TAPPED, architecture=architecture)
    off, tokens = dataclasses.replace(config, key_taps=0), batch_of()["inputs"]
    variables, without = (jax.jit(build_model(model).init)(jax.random.key(3), tokens[:, :1]) for model in (config, off))
    on, off = (
        jax.jit(build_model(model).apply)(given, tokens) for model, given in ((config, variables), (off, without))
    )
    np.testing.assert_allclose(on, off, atol=1e-6)
    found = dict(jax.tree_util.tree_leaves_with_path(variables))
    names = [path for path in found if path[-1].key.startswith("tap_")]
    assert len(names) == config.num_blocks * config.key_taps
    assert not any(found[path].any() for path in names)
    for path, leaf in jax.tree_util.tree_leaves_with_path(without):
        np.testing.assert_array_equal(leaf, found[path])
    decays = decay_mask(dataclasses.replace(TRAIN, schedule="paper", steps="1epoch"), variables["params"])
    assert not any(decays[path[1].key][path[2].key][path[3].key] for path in names if len(path) == 4)


def test_the_history_is_measured_with_taps():
    """Losses of windows without a cut are those of the whole forward pass."""
    model, batch = build_model(TAPPED), batch_of()
    params = model.apply({"params": params_of(TAPPED)}, method=model.parameters)
    sums = _sums(params, batch, config=TAPPED, cut=None)
    assert float(sums["losses"].sum()) == pytest.approx(float(plain(TAPPED)[0]), rel=1e-5)


# ---- Mistakes


def history_without_taps(monkeypatch):
    """Only block 0 has taps."""
    monkeypatch.setattr(streams, "tapped", lambda layer, rows: None)


def chunks_begin_with_zeros(monkeypatch):
    """The first rows of a chunk have no rows before."""
    real = taps.tapped
    monkeypatch.setattr(taps, "tapped", lambda layer, rows, before: real(layer, rows))


def short_history_forwards(monkeypatch):
    """The short history of a pair takes the rows after."""
    real = taps.tapped
    monkeypatch.setattr(paired, "tapped", lambda layer, rows, before: real(layer, rows))


def one_block_without(monkeypatch):
    """Block 0 has no taps."""
    monkeypatch.setattr(tlinformer, "tapped", lambda layer, rows: None)


def later_layers_without(monkeypatch):
    """Only a Transformer's first layer would have taps."""
    monkeypatch.setattr(model_module, "tapped", lambda layer, rows: None)


@pytest.mark.parametrize(
    ("mutate", "way"),
    [
        (history_without_taps, "one window at a time"),
        (one_block_without, "one window at a time"),
        (chunks_begin_with_zeros, "in chunks"),
        (short_history_forwards, "in pairs"),
        (later_layers_without, "transformer"),
    ],
)
def test_mistakes_are_caught(mutate, way, monkeypatch, own_traces):
    plain(dataclasses.replace(TAPPED, **(WAYS[way] | {"memory": ExecutionPlan(9)})))
    mutate(monkeypatch)
    assert error(way) > 0.01, "a hundred times what is allowed"


# ---- Refusals


@pytest.mark.parametrize("value", [-1, 4, True, "3"])
def test_only_zero_to_three_are_allowed(value):
    with pytest.raises(ConfigError, match=r"model\.key_taps = .*: must be an integer from 0 to 3"):
        ModelConfig(key_taps=value)


def test_what_cannot_have_taps_says_so():
    model = build_model(TAPPED)
    refused = r"model\.key_taps = 3: must be 0 for"
    for architecture in RECURRENT:
        with pytest.raises(ConfigError, match=rf"{refused} model\.architecture = '{architecture}'"):
            dataclasses.replace(TAPPED, architecture=architecture, d_ff=64)
    with pytest.raises(ConfigError, match=rf"{refused} generation"):
        Decoder(model, {"params": params_of(TAPPED)})
    with pytest.raises(ConfigError, match=rf"{refused} a block outside"):
        DualWindowBlock(TAPPED).init(jax.random.key(0), jnp.zeros((1, 4, TAPPED.d_model)))
    with pytest.raises(ConfigError, match=rf"{refused} published names"):
        params_to_reference({"params": params_of(TAPPED)}, TAPPED)
    with pytest.raises(DataError, match=r"documents: must be None for model\.key_taps = 3"):
        model.apply({"params": params_of(TAPPED)}, jnp.zeros((1, 4), int), documents=jnp.zeros((1, 4), int))
    with pytest.raises(ConfigError, match=r"data\.document_masking = True: must be False for model\.key_taps = 3"):
        RunConfig(TAPPED, TRAIN, DataConfig(document_masking=True))
    mesh = build_mesh({"context": 2}, jax.devices()[:2])
    with pytest.raises(ConfigError, match=r"train\.mesh = .*context must be 1 for model\.key_taps = 3"):
        check_sequences_divide(mesh, dataclasses.replace(TRAINED, key_taps=3), 64, 0)
