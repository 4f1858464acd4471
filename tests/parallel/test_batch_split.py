"""Training over every axis of the mesh: loss and gradients are those of one device."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.device_load import attention_by_device
from tests.test_model import SMALL, golden_scale
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.tasks import AnswerPositions
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.models import ModelConfig, build_model, history
from tlinformer_jax.parallel.sharding import (
    NO_WINDOW,
    UNSPLIT,
    BatchSplit,
    SplitRows,
    assign_windows,
    batch_sharding,
    build_mesh,
    tree_shardings,
)
from tlinformer_jax.training.setup import check_sequences_divide
from tlinformer_jax.training.step import batch_gradient

TRAIN = TrainConfig()
LENGTH = 43  # ten windows of 4 tokens, and one of 3
MODEL = dataclasses.replace(
    SMALL, num_heads=4, d_ff=32, hidden_depth=0, history_window=6, memory=ExecutionPlan(checkpointing=True)
)
MESHES = {
    "data": {},
    "window": {"window": 8},
    "context": {"context": 8},
    "data, window, context": {"window": 2, "context": 2},
    "fsdp, tensor": {"fsdp": 4, "tensor": 2},
    "data, fsdp, tensor": {"fsdp": 2, "tensor": 2},
}
QUICK = ("data, window, context",)


def batch(rows: int = 8) -> dict[str, jax.Array]:
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, MODEL.vocab_size, (rows, LENGTH + 1)).astype(np.int32)
    weights = rng.integers(0, 2, (rows, LENGTH)).astype(np.float32)
    return jax.tree.map(jnp.asarray, {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": weights})


def gradient(model, train, mesh=None, data=None, answers=None):
    """(loss, weight of the right labels, gradients) of the batch, on one device or over a mesh."""
    return program(model, train, mesh, answers)(batch() if data is None else data, golden_scale(model)["params"], 3)


def program(model, train, mesh=None, answers=None):
    """What `gradient` calls: a function of batch, parameters and number of the update, compiled once."""
    options = {"model": build_model(model), "config": train, "answers": answers}
    divisor = jnp.float32(100)
    if mesh is None:
        alone = jax.jit(functools.partial(batch_gradient, split=UNSPLIT, **options))
        return lambda data, params, step: alone(data, params, divisor, jnp.int32(step))
    mesh = build_mesh(mesh)

    @jax.jit
    def spread(batch, params, *rest):
        split = BatchSplit.of(jax.sharding.get_abstract_mesh())
        return split.over_devices(functools.partial(batch_gradient, split=split, **options))(batch, params, *rest)

    def over_mesh(data, params, step):
        with jax.set_mesh(mesh):
            placed = jax.device_put((data, params), (batch_sharding(mesh), tree_shardings(params, mesh)))
            return spread(*placed, divisor, jnp.int32(step))

    return over_mesh


@functools.cache
def alone(model, train=TRAIN):
    """`gradient` of the batch on one device."""
    return gradient(model, train)


def check(model, mesh, train=TRAIN):
    """One device computes by MODEL's plan, whatever the model's own is: tests/test_training_paths.py compares them."""
    one = alone(dataclasses.replace(model, memory=MODEL.memory), train)
    agree(one, gradient(model, train, mesh))


def gradient_error(one, many) -> float:
    """The largest difference of gradients, over the largest value of its array."""
    pairs = zip(jax.tree.leaves(many[2]), jax.tree.leaves(one[2]), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in jax.device_get([*pairs]))


def agree(one, many):
    np.testing.assert_allclose(many[0], one[0], rtol=1e-5)
    assert many[1] == one[1]
    assert gradient_error(one, many) < 1e-4


# With all options, "fsdp, tensor" is in tests/test_options_together.py.
ALONE = [name for name in MESHES if name != "fsdp, tensor"]


@pytest.mark.parametrize("axes", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in ALONE])
def test_loss_and_gradients_are_those_of_one_device(axes):
    check(MODEL, MESHES[axes])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "mesh"),
    [
        ({"history_window": "auto", "hidden_depth": 1}, {"window": 2, "context": 4}),
        ({"memory": ExecutionPlan(chunk=2, checkpointing=True)}, {"window": 2, "context": 2}),
        ({"architecture": "tconstformer", "hidden_depth": 1}, {"window": 4, "context": 2}),
        (
            {"memory": ExecutionPlan(segments=2, checkpointing=True), "generation_window": 3, "history_window": 5},
            {"window": 2, "context": 4},
        ),
        ({"memory": ExecutionPlan()}, {"window": 2, "context": 2}),
        ({"memory": ExecutionPlan(checkpointing=True, paired=True), "history_window": 4}, {"fsdp": 2, "tensor": 2}),
        ({"memory": ExecutionPlan(2, checkpointing=True, paired=True), "history_window": 4}, {"window": 2}),
        # Without `gathered`, XLA aborts on the look-up in the embedding, and on that of the token shift.
        ({"architecture": "transformer", "token_shift": True}, {"fsdp": 2, "tensor": 2}),
    ],
)
def test_other_models_are_split_as_well(changes, mesh):
    check(dataclasses.replace(MODEL, **changes), mesh)


@pytest.mark.slow
def test_sampled_windows_and_micro_batches_are_those_of_one_device():
    check(MODEL, {"window": 2, "context": 2}, TrainConfig(batch_size=8, accumulation=2, sampled_windows=5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "mesh"),
    # In the third of eleven windows, and in the last, which one device gets.
    [(9, {"window": 2, "context": 2}), (42, {"window": 8})],
)
def test_windows_before_the_first_answer_are_left_out_on_any_mesh(first, mesh):
    data, params = batch(), golden_scale(MODEL)["params"]
    data["weights"] = jnp.where(jnp.arange(LENGTH) < first, 0, 1.0) * jnp.maximum(data["weights"], 0.5)
    answered = program(MODEL, TRAIN, mesh, lambda length: AnswerPositions(first, length - first))
    agree(gradient(MODEL, TRAIN, None, data), answered(data, params, 3))
    # Where labels before it do have weights, those of the windows left out are missed.
    wrong = answered(batch(), params, 3)
    assert abs(wrong[0] / alone(MODEL)[0] - 1) > 0.1


@pytest.mark.slow
def test_dropout_does_not_depend_on_the_devices():
    check(dataclasses.replace(MODEL, dropout=0.3), {"window": 2, "fsdp": 2}, TrainConfig(batch_size=8, accumulation=1))


@pytest.mark.slow
def test_dropout_over_split_rows_keeps_the_mean():
    """In gradients of layers' last matrices, which are zero: they are linear in what dropout is applied to, so that
    their mean over masks is the gradient without dropout."""
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 0 * leaf if path[-1].key in ("out_kernel", "down_kernel") else leaf,
        golden_scale(MODEL)["params"],
    )
    mesh, updates = {"context": 2}, 24
    _, _, expected = program(MODEL, TRAIN, mesh)(batch(), params, 0)
    run = program(dataclasses.replace(MODEL, dropout=0.2), TRAIN, mesh)
    drawn = [run(batch(), params, step)[2] for step in range(updates)]
    for block, layer in itertools.product(("blocks_0", "blocks_1"), ("compress", "restore")):
        for name in ("out_kernel", "down_kernel"):
            truth = np.asarray(expected[block][layer][name], np.float64)
            each = [np.vdot(found[block][layer][name], truth) / np.vdot(truth, truth) for found in drawn]
            assert np.std(each) > 0.005, "masks differ"
            assert np.mean(each) == pytest.approx(1, abs=0.07), (block, layer, name)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", ["contiguous positions", "count", "gather", "gradients not summed"])
def test_a_mistake_is_noticed(mutation, monkeypatch):
    model = dataclasses.replace(MODEL, num_blocks=1)
    one = alone(model)
    jax.clear_caches()
    if mutation == "contiguous positions":
        monkeypatch.setattr(
            SplitRows, "take", lambda self, rows, axis=1: jnp.split(rows, self.parts, axis=axis)[0], raising=True
        )
    elif mutation == "count":
        monkeypatch.setattr(SplitRows, "count", lambda self, length: length // self.parts - 1)
    elif mutation == "gather":
        real = history.History.slice

        def at_zero(self, array, start, *rest, **named):
            return real(self, array, 0, *rest, **named)

        monkeypatch.setattr(history.History, "slice", at_zero)
    else:
        monkeypatch.setattr(BatchSplit, "psum", lambda self, values: values)
    error = gradient_error(one, gradient(model, TRAIN, MESHES["data, window, context"]))
    assert error > 0.01, "a hundred times what is allowed"
    jax.clear_caches()


@pytest.mark.parametrize("parts", [2, 8])
def test_every_window_is_assigned_once(parts):
    assigned = assign_windows(21, parts)
    np.testing.assert_array_equal(np.sort(assigned[assigned != NO_WINDOW]), np.arange(21))


@pytest.mark.parametrize(
    ("length", "parts"), [(65_536, 2), (65_536, 8), (1_048_576, 8), (40_960, 8), (16_384, 8), (1_048_576, 64)]
)
def test_no_device_has_much_more_attention_than_the_mean(length, parts):
    config = ModelConfig(history_window=1024, generation_window=1024)
    loads, (whole,) = attention_by_device(config, length, parts), attention_by_device(config, length, 1)
    assert loads.max() <= 1.1 * loads.mean()
    assert loads.sum() == pytest.approx(whole, rel=0.07), "but for windows computed in vain"


def test_axes_that_split_sequences_are_refused_where_they_cannot():
    mesh = build_mesh({"window": 8})
    baseline = dataclasses.replace(MODEL, architecture="transformer")
    with pytest.raises(
        ConfigError, match=r"train.mesh = 'window=8': window must be 1 for model.architecture = 'transformer'"
    ):
        check_sequences_divide(mesh, baseline, LENGTH, 0)
    for length, sampled in ((17, 0), (LENGTH, 5)):
        with pytest.raises(
            ConfigError, match=r"train.mesh = 'window=8': window must be at most the 5 windows of a sequence"
        ):
            check_sequences_divide(mesh, MODEL, length, sampled)
    check_sequences_divide(mesh, MODEL, LENGTH, 0)
    with pytest.raises(ConfigError, match=r"train.mesh = 'context=8': context must be 1 for"):
        check_sequences_divide(build_mesh({"context": 8}), baseline, LENGTH, 0)
