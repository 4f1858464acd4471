"""What devices send each other in training, read from the compiled forward and backward pass."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from tests.support.models import SMALL
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.models.model import build_model
from tlinformer_jax.parallel.sharding import BatchSplit, batch_sharding, build_mesh, tree_shardings
from tlinformer_jax.training.step import batch_gradient
from tools.collectives import collectives

MODEL = dataclasses.replace(
    SMALL,
    hidden_depth=0,
    history_window=128,
    generation_window=256,
    memory=ExecutionPlan(segments=2, checkpointing=True),
)


def compiled(length, **mesh):
    """Collectives of loss and gradient of one sequence, and the number of parameters."""
    model, mesh = build_model(MODEL), build_mesh(mesh)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        params,
        tree_shardings(params, mesh),
    )
    rows = {
        name: jax.ShapeDtypeStruct((1, length), dtype, sharding=batch_sharding(mesh))
        for name, dtype in (("inputs", jnp.int32), ("labels", jnp.int32), ("weights", jnp.float32))
    }
    with jax.set_mesh(mesh):

        def spread(batch, params, divisor, step):
            split = BatchSplit.of(jax.sharding.get_abstract_mesh())
            function = functools.partial(batch_gradient, model=model, config=TrainConfig(), split=split)
            loss, _, gradient = split.over_devices(function)(batch, params, divisor, step)
            return loss, gradient

        program = jax.jit(spread).lower(rows, params, jnp.float32(1), jnp.int32(0)).compile()
    return collectives(program.as_text()), sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_over_windows_only_the_sums_of_loss_and_gradients_are_sent():
    found, parameters = compiled(4096, window=8)
    assert {collective.kind for collective in found} == {"all-reduce"}
    assert {collective.trips for collective in found} == {1}
    assert sum(collective.total_bytes for collective in found) == 4 * (parameters + 1)


@pytest.mark.slow
def test_over_context_what_is_sent_for_a_window_does_not_grow_with_the_history():
    sent, largest = {}, {}
    for length in (4096, 32768):
        found, parameters = compiled(length, context=8)
        assert all(collective.known_trips for collective in found)
        inside = [collective for collective in found if collective.trips > 1]
        windows = length // MODEL.generation_window - 1
        sent[length] = sum(collective.total_bytes for collective in inside) / windows
        shapes = [shape for one in found for shape in (*one.operands, *one.results)]
        largest[length] = sorted({shape.dims for shape in shapes})
        assert sum(c.total_bytes for c in found if c.trips == 1) < 8 * parameters * 4
    assert sent[4096] == sent[32768] > 0
    assert largest[4096] == largest[32768]
    # A few times the rows that read, of D features, in float32, there and back.
    readers = (MODEL.history_window + MODEL.generation_window) * MODEL.d_model * 4
    assert sent[4096] <= 16 * MODEL.num_layers * readers
