"""Training on some of a sequence's windows: unbiased, at a cost that the configuration sets; windows run together."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import golden, reference
from tests.test_model import SMALL as THREE_LAYERS
from tests.test_model import count_equations, golden_scale
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.models import build_model
from tlinformer_jax.models.recompute import map_steps
from tlinformer_jax.models.windows import trained_tokens
from tlinformer_jax.training.loss import summed_loss
from tlinformer_jax.training.optimizer import Horizon
from tlinformer_jax.training.step import TrainState, init_state, train_step
from tlinformer_jax.training.window_loss import draw_windows

# Compress and restore only, and one history segment: compilation is what these tests cost.
SMALL = dataclasses.replace(THREE_LAYERS, hidden_depth=0)
LENGTH = 18  # four windows of 4 tokens, and one of 2


def batch_of(length: int = LENGTH) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(3).integers(0, SMALL.vocab_size, (2, length + 1)).astype(np.int32)
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": np.ones((2, length), np.float32)}


def loss_and_gradient(config):
    """A jitted function of (params, windows or None)."""
    model = build_model(config)

    def loss(params, windows):
        key = jax.random.key(0)
        total, _ = summed_loss(params, batch_of(), key, model=model, windows=windows)
        return total / (2 * LENGTH)

    return jax.jit(jax.value_and_grad(loss))


OPTIONS = {"token_shift": True, "key_taps": 2, "window_overlap": 2, "longest_wavelength": 20}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "segments", "options"),
    [
        ("tlinformer", 2, OPTIONS),
        ("tlinformer", 2, {"causal_history": True, "token_shift": True}),
        ("tconstformer", 1, {}),
    ],
)
def test_over_all_subsets_the_mean_loss_and_gradient_are_the_full_ones(architecture, segments, options):
    """Every subset of k = 2 of n = 5 windows, the last one short; loss and gradients to 1e-6."""
    model = dataclasses.replace(SMALL, architecture=architecture, history_window=5, **options)
    config = dataclasses.replace(model, memory=ExecutionPlan(segments))
    params = golden_scale(config)["params"]
    function = loss_and_gradient(config)
    loss, gradient = function(params, None)
    sampled = [function(params, jnp.array(subset)) for subset in itertools.combinations(range(5), 2)]
    assert len(sampled) == 10
    whole = reference.logits(golden.random_weights(config), config, batch_of()["inputs"])
    assert float(loss) == pytest.approx(reference.mean_loss(whole, batch_of()["labels"]), rel=1e-5)
    losses = [float(value) for value, _ in sampled]
    assert np.std(losses) > 0.05, "the windows must differ for the mean to say something"
    assert np.mean(losses) == pytest.approx(float(loss), rel=1e-6)
    mean = jax.tree.map(lambda *arrays: np.mean(np.asarray(arrays, np.float64), axis=0), *(g for _, g in sampled))
    for value, truth in zip(jax.tree.leaves(mean), jax.tree.leaves(gradient), strict=True):
        assert np.linalg.norm(value - truth) <= 1e-6 * max(1.0, np.linalg.norm(truth))


def test_trained_tokens_are_the_mean_over_all_subsets_of_windows():
    sizes = [4, 4, 4, 4, 2]
    for count in range(1, 6):
        mean = np.mean([sum(subset) for subset in itertools.combinations(sizes, count)])
        assert trained_tokens(SMALL, LENGTH, count) == pytest.approx(mean)
    assert trained_tokens(SMALL, LENGTH, 0) == LENGTH


def test_windows_are_drawn_without_replacement_and_evenly():
    draw = jax.vmap(lambda key: draw_windows(key, SMALL, LENGTH, 3))
    windows = np.asarray(draw(jax.random.split(jax.random.key(0), 4000)))
    assert windows.shape == (4000, 3)
    assert (np.diff(windows, axis=1) > 0).all()
    counts = np.bincount(windows.reshape(-1), minlength=5) / 4000
    np.testing.assert_allclose(counts, 3 / 5, atol=0.03)
    assert draw_windows(jax.random.key(0), SMALL, LENGTH, 5) is None
    assert draw_windows(jax.random.key(0), SMALL, LENGTH, 0) is None


def test_a_step_draws_other_windows_than_the_one_before_and_reports_an_estimate():
    config = TrainConfig(sampled_windows=2, batch_size=2, warmup_steps=0, learning_rate=0.0)
    shape = dataclasses.replace(SMALL, num_blocks=1)
    model, horizon = build_model(shape), Horizon(9, 9)
    state = init_state(jax.random.key(0), model, config, horizon).replace(params=golden_scale(shape)["params"])
    step = jax.jit(lambda state: train_step(state, batch_of(), model=model, config=config, horizon=horizon))
    losses = []
    for number in range(12):
        metrics = step(TrainState(jnp.int32(number), state.params, state.opt_state))[1]
        losses.append(float(metrics["loss"]))
    full = float(loss_and_gradient(shape)(state.params, None)[0])
    assert len(set(losses)) > 6
    assert np.mean(losses) == pytest.approx(full, rel=0.15)
    assert float(metrics["tokens"]) == 2 * LENGTH


@pytest.mark.slow
def test_cost_grows_with_the_sampled_windows_not_with_the_sequence():
    """The program has one loop of k steps, whatever the sequence; its body reads what a segment needs."""
    config = dataclasses.replace(SMALL, memory=ExecutionPlan(3))
    model, variables = build_model(config), golden_scale(config)

    def traced(windows, length):
        row = jnp.zeros((1, length), jnp.int32)
        batch = {"inputs": row, "labels": row, "weights": jnp.ones((1, length))}

        def apply(variables, which):
            key = jax.random.key(0)
            return summed_loss(variables["params"], batch, key, model=model, windows=which)[0]

        return jax.make_jaxpr(jax.grad(apply))(variables, jnp.arange(windows)).jaxpr

    sizes = [count_equations(traced(*shape)) for shape in ((2, 64), (7, 64), (2, 4096))]
    assert sizes[0] == sizes[1]
    assert sizes[2] == pytest.approx(sizes[0], rel=0.01)


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        ({"architecture": "transformer"}, {"sampled_windows": 1}, "must be 0 for model.architecture = 'transformer'"),
        ({}, {"sampled_windows": 6}, "train.sampled_windows = 6: must be at most the 5 windows of a sequence"),
    ],
)
def test_impossible_samples_are_refused(model, train, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(
            dataclasses.replace(SMALL, **model),
            TrainConfig(**train),
            DataConfig(sequence_length=LENGTH),
        )


@pytest.mark.parametrize(
    ("together", "segments", "fields"),
    [
        pytest.param(9, 4, {"history_window": "auto", "hidden_depth": 1}, marks=pytest.mark.slow),
    ],
)
def test_windows_that_run_together_give_what_they_give_alone(together, segments, fields):
    """Loss 1e-5, gradients 1e-4 per array."""
    alone = dataclasses.replace(SMALL, **fields)
    folded = dataclasses.replace(alone, memory=ExecutionPlan(segments, together))
    params = golden_scale(alone)["params"]
    (loss, gradient), (truth, true_gradient) = (loss_and_gradient(c)(params, None) for c in (folded, alone))
    assert float(loss) == pytest.approx(float(truth), abs=1e-5)
    for value, expected in zip(jax.tree.leaves(gradient), jax.tree.leaves(true_gradient), strict=True):
        assert jnp.linalg.norm(value - expected) <= 1e-4 * jnp.linalg.norm(expected)


def test_recomputed_loop_sums_shared_gradients_in_float32():
    """1024 equal terms in bfloat16 would stop adding up at 256."""
    weight = jnp.ones((3,), jnp.bfloat16)
    parts = jnp.arange(1024.0)[:, None] * jnp.ones(3)

    def branch(shared, constants, item):
        part, number = item
        return shared * constants * jnp.where(number >= 0, 1, 0) + part.astype(shared.dtype) * 0 + part * 2

    def total(weight, parts):
        return map_steps(branch, weight, parts, jnp.bfloat16(1), 1024).astype(jnp.float32).sum()

    gradient, part_gradient = jax.grad(total, argnums=(0, 1))(weight, parts)
    np.testing.assert_array_equal(gradient, jnp.full(3, 1024, jnp.bfloat16))
    np.testing.assert_array_equal(part_gradient, jnp.full((1024, 3), 2.0))
