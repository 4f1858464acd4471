"""The ways in which training computes a sequence's windows, against the NumPy reference, a plain loop over them."""

import dataclasses
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import golden, reference
from tests.test_model import SMALL, golden_scale
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.interop.reference import published_views
from tlinformer_jax.models import (
    attention,
    block,
    build_model,
    causal_history,
    paired,
    streams,
    windows,
)
from tlinformer_jax.models import history as model_history
from tlinformer_jax.models import model as model_module
from tlinformer_jax.models.paired import PairedHistory
from tlinformer_jax.training import step, window_loss
from tlinformer_jax.training.loss import summed_loss
from tlinformer_jax.training.optimizer import Horizon

LENGTH = 15  # three windows of 4 tokens, and one of 3
# What each case changes.
WAYS = {
    "one after the other": {"memory": ExecutionPlan(2, chunk=3, checkpointing=True)},
    "a segment each": {"memory": ExecutionPlan(9, checkpointing=True)},
    "one segment in chunks": {"memory": ExecutionPlan(chunk=8, checkpointing=True), "history_window": 9},
    "in groups": {"memory": ExecutionPlan(4, together=2, chunk=5, checkpointing=True)},
    "in threes": {"memory": ExecutionPlan(2, together=3, scan_layers=False, checkpointing=True)},
    "eight windows in threes": {
        "memory": ExecutionPlan(2, together=3, scan_layers=False, checkpointing=True),
        "generation_window": 2,
    },
    "in pairs": {"memory": ExecutionPlan(checkpointing=True, paired=True), "history_window": 4},
    "three blocks in pairs": {
        "memory": ExecutionPlan(checkpointing=True, paired=True),
        "history_window": 2,
        "generation_window": 3,
        "num_blocks": 3,
    },
    "all together": {"memory": ExecutionPlan(together=5), "history_window": 9},
    "all kept": {"memory": ExecutionPlan(2)},
    "growing windows": {"memory": ExecutionPlan(2, checkpointing=True), "history_window": "auto"},
    "growing windows in chunks": {"memory": ExecutionPlan(chunk=4, checkpointing=True), "history_window": "auto"},
    "two hidden layers": {"memory": ExecutionPlan(chunk=7, checkpointing=True), "hidden_depth": 2, "history_window": 6},
    "three blocks": {"memory": ExecutionPlan(chunk=5, checkpointing=True), "num_blocks": 3},
    "tconstformer": {
        "memory": ExecutionPlan(chunk=3, checkpointing=True),
        "architecture": "tconstformer",
        "hidden_depth": 1,
    },
    "causal history": {
        "memory": ExecutionPlan(2, together=2, chunk=5, checkpointing=True, paired=True),
        "causal_history": True,
    },
    "causal history, one after the other": {
        "memory": ExecutionPlan(2, chunk=3, checkpointing=True),
        "causal_history": True,
        "history_window": 6,
        "hidden_depth": 2,
        "num_blocks": 3,
    },
    "causal history, all kept": {"memory": ExecutionPlan(together=5), "causal_history": True, "history_window": 9},
    "causal history, eight windows": {
        "memory": ExecutionPlan(together=7),
        "causal_history": True,
        "history_window": 3,
        "generation_window": 2,
    },
    "causal history, z after z": {
        "memory": ExecutionPlan(together=3),
        "causal_history": True,
        "history_window": 2,
        "generation_window": 2,
    },
}
DEFAULT = ("in groups",)
# Of compress and restore, where a case asks for no more: compilation is the cost.
SHALLOW = dataclasses.replace(SMALL, hidden_depth=0)


def sequences() -> dict[str, jax.Array]:
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, SMALL.vocab_size, (2, LENGTH + 1)).astype(np.int32)
    weights = rng.integers(0, 2, (2, LENGTH)).astype(np.float32)
    return jax.tree.map(jnp.asarray, {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": weights})


def trained(config):
    """Loss and gradients, as training has them."""
    model, batch = build_model(config), sequences()

    def loss(params):
        return summed_loss(params, batch, jax.random.key(0), model=model)

    (total, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(golden_scale(config)["params"])
    return total, gradient


@functools.cache
def truth(config) -> tuple[float, dict[str, tuple[np.ndarray, float]]]:
    """The loss by the NumPy reference, window by window; for each published array a random direction, and the loss's
    slope along it.

    Numerical, as a gradient of the plain loop would have to compile its windows one by one, which takes longer than
    all that is tested. An error of the gradient changes the slope by its norm times a number drawn from N(0, 1), so
    that the tolerance is below what the norm of an error might be.
    """
    weights, rng = golden.random_weights(config), np.random.default_rng(6)
    weights = {name: array.astype(np.float64) for name, array in weights.items() if "lm_head" not in name}  # is tied
    batch = jax.device_get(sequences())

    def loss(changes) -> float:
        logits = reference.logits(weights | changes, config, batch["inputs"])
        return float((reference.token_losses(logits, batch["labels"]) * batch["weights"]).sum())

    slopes = {}
    for name, array in weights.items():
        direction = rng.standard_normal(array.shape)
        above, below = (loss({name: array + step * direction}) for step in (1e-5, -1e-5))
        slopes[name] = direction, (above - below) / 2e-5
    return loss({}), slopes


def errors(way: str) -> tuple[float, float]:
    """How far training is from the reference: in the loss per token; in the slope along a direction of the array where
    that is farthest, over the norm of the array's gradient."""
    config = dataclasses.replace(SHALLOW, **WAYS[way])
    expected, slopes = truth(dataclasses.replace(config, memory=SHALLOW.memory))
    loss, gradient = trained(config)
    count, found = float(sequences()["weights"].sum()), published_views(jax.device_get(gradient), config)
    assert set(found) - {"transformer.lm_head.weight"} == set(slopes)
    parts = [(found[name], *pair) for name, pair in slopes.items()]
    far = [abs(np.vdot(array, along) - slope) / (np.linalg.norm(array) + 1e-8) for array, along, slope in parts]
    return abs(float(loss) - expected) / count, float(np.max(far))


@pytest.mark.parametrize("way", [way if way in DEFAULT else pytest.param(way, marks=pytest.mark.slow) for way in WAYS])
def test_every_way_gives_what_the_reference_gives(way):
    """Loss per token to 1e-5, slopes to 2e-5 of the norm of each array's gradient."""
    loss, gradient = errors(way)
    assert loss < 1e-5
    assert gradient < 2e-5


def test_rows_of_a_causal_history_in_a_loop_over_windows(monkeypatch):
    """As for many windows: here one alone, then two at a time. With fewer than eight, no row of the second two is read:
    the last window reads this history only before z."""
    monkeypatch.setattr(causal_history, "WINDOWS_TOGETHER", 2)
    loss, gradient = errors("causal history, eight windows")
    assert loss < 1e-5
    assert gradient < 2e-5


@pytest.mark.slow
def test_pairs_tell_the_kernel_that_the_first_window_reads_nothing(monkeypatch, request):
    """cuDNN sees at least one key unless it is told that there may be none."""
    real = attention._attend_xla

    def one_key_at_least(*inputs):
        *arrays, key_length = inputs[:5]
        return real(*arrays, None if key_length is None else jnp.maximum(key_length, 1), *inputs[5:])

    def attend(query, key, value, **options):
        with monkeypatch.context() as patch:
            if options.get("never_empty") or query.shape[1] == 0:
                patch.setattr(attention, "_attend_xla", one_key_at_least)
            return attention.attend(query, key, value, **options)

    for module in (block, paired):
        monkeypatch.setattr(module, "attend", attend)
    request.addfinalizer(jax.clear_caches)
    jax.clear_caches()
    assert errors("in pairs")[1] < 2e-5


def dropouts_of(way: str, monkeypatch) -> list[tuple[int, ...]]:
    """The random keys by which one evaluation of the loss drops attention weights and outputs of feed-forwards."""
    drawn = []

    def recorded(function, position):
        def call(*arrays, **options):
            jax.debug.callback(lambda words: drawn.append(tuple(words.tolist())), arrays[position].words)
            return function(*arrays, **options)

        return call

    monkeypatch.setattr(attention, "_attend", recorded(attention._attend, 5))
    for module in (block, causal_history, streams, model_history):
        monkeypatch.setattr(module, "update", recorded(module.update, 3))
    config = dataclasses.replace(SHALLOW, **WAYS[way], dropout=0.5)
    jax.jit(functools.partial(summed_loss, model=build_model(config)))(
        golden_scale(config)["params"], sequences(), jax.random.key(0)
    )
    jax.effects_barrier()
    return drawn


@pytest.mark.slow
def test_every_part_of_a_pair_draws_its_own_dropout(monkeypatch):
    """Both histories, and the rows that `restore` computes, too."""
    drawn = dropouts_of("in pairs", monkeypatch)
    # A block: 3 reads and an update in `compress`, 2 and one in `restore`; the first block also restores C. Two pairs.
    assert len(drawn) == 2 * (7 + 2 + 7)
    assert len(set(drawn)) == len(drawn)


@pytest.mark.slow
def test_every_part_of_a_causal_history_draws_its_own_dropout(monkeypatch):
    """The first windows' z has invalid rows, so x reads z by a softmax of its own."""
    drawn = dropouts_of("causal history, all kept", monkeypatch)
    assert drawn
    assert len(set(drawn)) == len(drawn)


def too_few_chunks(monkeypatch):
    """The last chunk of a history is left out."""
    real = model_history.map_steps
    monkeypatch.setattr(model_history, "map_steps", lambda *args: real(*args[:-1], args[-1] - 1))


def forgotten_windows(monkeypatch):
    """Gradients of what windows share are those of the last window only."""
    monkeypatch.setattr(window_loss, "add_wide", lambda total, gradient: jax.tree.map(lambda t, g: g, total, gradient))


def first_windows_rows(monkeypatch):
    """Every window has the rows of the window before it."""
    real = windows.window_rows
    monkeypatch.setattr(windows, "window_rows", lambda c, a, first, *rest: real(c, a, max(first - 1, 0), *rest))


def long_histories_rows(monkeypatch):
    """The short history of a pair has rows of the long one."""
    monkeypatch.setattr(PairedHistory, "second", lambda self, array: array[:, : self.longest_second])


def one_observation_window(monkeypatch):
    """All rows of a pair's histories are restored from the window of the long one."""
    real = paired.choose
    monkeypatch.setattr(paired, "choose", lambda array, long: real(array, jnp.ones_like(long)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutate", "way"),
    [(mutate, "one after the other") for mutate in (too_few_chunks, forgotten_windows, first_windows_rows)]
    + [(mutate, "in pairs") for mutate in (long_histories_rows, one_observation_window, forgotten_windows)],
)
def test_mutations_are_caught(mutate, way, monkeypatch, request):
    mutate(monkeypatch)
    request.addfinalizer(jax.clear_caches)
    jax.clear_caches()
    assert errors(way)[1] > 0.01, "hundreds of times what is allowed"


PACKAGE = str(pathlib.Path(step.__file__).parents[1])


@pytest.mark.parametrize(
    ("length", "changes"),
    [
        (LENGTH, {"memory": ExecutionPlan()}),
        (40, {"memory": ExecutionPlan(checkpointing=True)}),
        (8, {"architecture": "transformer"}),
    ],
)
def test_the_way_from_the_step_to_the_attention_is_short(length, changes, monkeypatch):
    """At most 12 frames of the package, `train_step` and `attend` included."""
    config, train, horizon = dataclasses.replace(SMALL, hidden_depth=2, **changes), TrainConfig(), Horizon(9, 9)
    model, real, depths = build_model(config), attention.attend, []

    def counted(*arrays, **options):
        frame, depth = sys._getframe(1), 2
        while frame.f_code is not step.train_step.__code__:
            depth += frame.f_code.co_filename.startswith(PACKAGE)
            frame = frame.f_back
        depths.append(depth)
        return real(*arrays, **options)

    for module in (block, model_history, model_module):
        monkeypatch.setattr(module, "attend", counted)
    state = jax.eval_shape(lambda key: step.init_state(key, model, train, horizon), jax.random.key(0))
    rows = {
        name: jax.ShapeDtypeStruct((2, length), dtype)
        for name, dtype in (("inputs", jnp.int32), ("labels", jnp.int32), ("weights", jnp.float32))
    }
    jax.eval_shape(lambda *given: step.train_step(*given, model=model, config=train, horizon=horizon), state, rows)
    assert depths
    assert max(depths) <= 12
