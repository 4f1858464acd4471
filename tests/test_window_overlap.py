"""`model.window_overlap` against the NumPy reference, on every path that runs a window."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.uncached import jit_uncached_logits
from tests.decoding.test_exactness import TOLERANCE, largest_error, make_decoder, truth
from tests.parallel.test_batch_split import MESHES, check
from tests.parallel.test_batch_split import MODEL as TRAINED
from tests.support import golden, reference
from tests.support.models import SMALL
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.config.model import ExecutionPlan
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.interop import params_from_reference
from tlinformer_jax.training.loss import summed_loss

OVERLAPPING = dataclasses.replace(SMALL, hidden_depth=0, history_window=3, window_overlap=2)
FED = 27  # six windows of 4 tokens, and one of 3

slow = pytest.mark.slow


def overlapping(**changes) -> ModelConfig:
    return dataclasses.replace(OVERLAPPING, **changes)


def golden_scale(config: ModelConfig):
    return params_from_reference(golden.random_weights(config), config)


@pytest.fixture
def own_traces():
    """No trace of what the test patches is served to another."""
    jax.clear_caches()
    yield
    jax.clear_caches()


# ---- The configuration


@pytest.mark.parametrize("value", [-1, 1.0, True, None, "2"])
def test_it_is_an_integer(value):
    with pytest.raises(ConfigError, match=r"model\.window_overlap = .*: must be an integer >= 0"):
        ModelConfig(window_overlap=value)


@pytest.mark.parametrize("value", [4, 9])
def test_it_is_less_than_the_window(value):
    with pytest.raises(ConfigError, match=rf"overlap = {value}: must be less than model\.generation_window = 4$"):
        overlapping(window_overlap=value)


@pytest.mark.parametrize("architecture", ["transformer", "sliding_window"])
def test_a_baseline_has_none(architecture):
    allowed = rf"model\.window_overlap = 2: must be 0 for model\.architecture = '{architecture}'$"
    with pytest.raises(ConfigError, match=allowed):
        overlapping(architecture=architecture)
    assert ModelConfig().window_overlap == 0


# ---- The forward pass

PLANS = {
    "one after the other": ExecutionPlan(segments=2),
    "together": ExecutionPlan(segments=2, together=3),
    "all together": ExecutionPlan(together=6, scan_layers=False),
    "checkpointing": ExecutionPlan(segments=3, together=2, checkpointing=True),
    "chunks": ExecutionPlan(chunk=2, checkpointing=True),
}
SHAPES = {
    "paper's block": {"hidden_depth": 2},
    "one": {"window_overlap": 1},
    "all but one": {"window_overlap": 3},
    "tconstformer": {"architecture": "tconstformer"},
    "auto": {"history_window": "auto", "generation_window": 6, "window_overlap": 5},
    "shift": {"token_shift": True, "num_blocks": 3},
}


@pytest.mark.parametrize(
    ("shape", "plan"),
    [("paper's block", "one after the other"), ("one", "together"), ("auto", "one after the other")]
    + [pytest.param(shape, "together", marks=slow) for shape in SHAPES if shape != "one"]
    + [
        pytest.param("paper's block", plan, marks=slow)
        for plan in PLANS
        if plan not in ("one after the other", "together")
    ],
)
def test_logits_are_the_references(shape, plan):
    config = overlapping(**SHAPES[shape], memory=PLANS[plan])
    tokens, expected = truth(config, FED, 2)
    logits = jax.jit(build_model(config).apply)(golden_scale(config), tokens)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
    size = config.generation_window
    without = reference.logits(golden.random_weights(config), dataclasses.replace(config, window_overlap=0), tokens)
    np.testing.assert_array_equal(without[:, :size], expected[:, :size])
    assert np.abs(without - expected)[:, size:].max(-1).min() > 1e-3, "every later token is another"


def test_windows_from_a_position_on_are_those_of_the_whole():
    """As a task's evaluation runs them: the first that is wanted has its overlap, too."""
    config = OVERLAPPING
    tokens, expected = truth(config, FED, 2)
    model, variables = build_model(config), golden_scale(config)
    hidden = model.apply(variables, tokens, start=9, method=model.hidden_states)
    np.testing.assert_allclose(hidden @ variables["params"]["embedding"].T, expected[:, 9:], atol=TOLERANCE)


# ---- Generation


@pytest.mark.parametrize("shape", [name if name == "one" else pytest.param(name, marks=slow) for name in SHAPES])
def test_prefill_step_and_slide_equal_the_reference(shape):
    """Prompts of unequal lengths in one batch, each continued across at least three slides."""
    config = overlapping(**SHAPES[shape])
    size = config.generation_window
    prompts = [max(size - 1, 1), size, size + 1, 1, 3 * size]
    decoder = make_decoder(config)
    assert largest_error(decoder, prompts, 6 * size + 3) < TOLERANCE
    tokens, expected = truth(config, 6 * size + 3, len(prompts))
    for length in (1, 2 * size, 2 * size + 1):
        alone = jit_uncached_logits(decoder.params, config, jnp.asarray(tokens[0, :length], jnp.int32))
        np.testing.assert_allclose(alone, expected[0, length - 1], atol=TOLERANCE)


# ---- Training


def batch_of() -> dict[str, np.ndarray]:
    tokens, _ = truth(OVERLAPPING, FED + 1, 2)
    tokens = tokens.astype(np.int32)
    weights = np.random.default_rng(4).integers(0, 2, (2, FED)).astype(np.float32)
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": weights}


def loss_and_gradient(config):
    """A jitted function of (params, windows or None), of the summed loss."""
    model = build_model(config)
    return jax.jit(
        jax.value_and_grad(
            lambda params, windows: summed_loss(params, batch_of(), jax.random.key(0), model=model, windows=windows)[0]
        )
    )


def reference_loss(weights, config) -> float:
    given = batch_of()
    logits = reference.logits(weights, config, given["inputs"])
    rows = zip(logits.reshape(-1, 1, logits.shape[-1]), given["labels"].reshape(-1, 1))
    losses = [reference.mean_loss(row, label) for row, label in rows]
    return float(np.dot(losses, given["weights"].reshape(-1)))


@pytest.mark.parametrize(
    ("shape", "plan"),
    [
        ("paper's block", "checkpointing"),
        *(pytest.param("paper's block", plan, marks=slow) for plan in PLANS if plan != "checkpointing"),
        *(pytest.param(shape, "checkpointing", marks=slow) for shape in SHAPES if shape != "paper's block"),
    ],
)
def test_loss_and_gradient_are_the_references(shape, plan):
    """Differentiated as a whole, or window by window; the gradient along the weights themselves."""
    config = overlapping(**SHAPES[shape], memory=PLANS[plan])
    weights = golden.random_weights(config)
    params = golden_scale(config)["params"]
    value, gradients = loss_and_gradient(config)(params, None)
    assert float(value) == pytest.approx(reference_loss(weights, config), rel=1e-5)

    def scaled(factor: float) -> float:
        return reference_loss({name: np.asarray(w, np.float64) * factor for name, w in weights.items()}, config)

    slope = (scaled(1 + 1e-6) - scaled(1 - 1e-6)) / 2e-6
    assert abs(slope) > 1
    along = sum(np.vdot(g, p) for g, p in zip(jax.tree.leaves(gradients), jax.tree.leaves(params), strict=True))
    assert along == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize(
    "plan", [slow_ if slow_ == "together" else pytest.param(slow_, marks=slow) for slow_ in ("together", "chunks")]
)
def test_gradients_window_by_window_are_those_of_the_whole(plan):
    whole, parts = (
        loss_and_gradient(overlapping(memory=dataclasses.replace(PLANS[plan], checkpointing=checkpointing)))
        for checkpointing in (False, True)
    )
    params = golden_scale(OVERLAPPING)["params"]
    one, other = (function(params, None) for function in (whole, parts))
    assert float(one[0]) == pytest.approx(float(other[0]), rel=1e-6)
    for value, expected in zip(jax.tree.leaves(other[1]), jax.tree.leaves(one[1]), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5 * np.abs(expected).max())


@slow
@pytest.mark.parametrize("architecture", ["tlinformer", "tconstformer"])
def test_sampled_windows_are_unbiased(architecture):
    """The mean over every two of seven windows is the whole; so is each sampled loss that of its windows."""
    config = overlapping(architecture=architecture, memory=ExecutionPlan(2))
    function, params = loss_and_gradient(config), golden_scale(config)["params"]
    loss, gradients = function(params, None)
    sampled = [function(params, jnp.array(subset)) for subset in itertools.combinations(range(7), 2)]
    assert np.mean([float(value) for value, _ in sampled]) == pytest.approx(float(loss), rel=1e-6)
    mean = jax.tree.map(lambda *arrays: np.mean(np.asarray(arrays, np.float64), axis=0), *(g for _, g in sampled))
    for value, expected in zip(jax.tree.leaves(mean), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5 * np.abs(expected).max())


SPREAD = [(axes, "tlinformer", axes == "data, window, context") for axes in MESHES if axes != "data"]
SPREAD += [(axes, "tconstformer", False) for axes in ("window", "context")]


@pytest.mark.parametrize(
    ("axes", "architecture"),
    [pytest.param(axes, a, marks=() if quick else slow) for axes, a, quick in SPREAD],
)
def test_loss_and_gradients_on_eight_devices_are_those_of_one(axes, architecture):
    check(dataclasses.replace(TRAINED, window_overlap=3, architecture=architecture), MESHES[axes])
