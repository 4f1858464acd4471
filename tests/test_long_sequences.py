"""Very long sequences: history in chunks of rows, and memory that grows no faster than the sequence."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_model import SMALL, golden_scale
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.models import ModelConfig, build_model
from tlinformer_jax.training.loss import summed_loss


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [3])  # does not divide the history
def test_history_in_chunks_of_rows_changes_nothing(chunk):
    """Of logits and their gradients; tests/test_training_paths.py has the training loss, in all ways."""
    config = dataclasses.replace(SMALL, hidden_depth=0)
    params = golden_scale(config)["params"]
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, SMALL.vocab_size, (2, 18)))

    def outcome(config):
        model = build_model(config)
        return jax.jit(jax.value_and_grad(lambda params: (model.apply({"params": params}, tokens) ** 2).mean()))(params)

    plan = dataclasses.replace(config.plan(5), chunk=chunk)
    (loss, gradient), (truth, expected) = (outcome(c) for c in (dataclasses.replace(config, memory=plan), config))
    assert float(loss) == pytest.approx(float(truth), rel=1e-5)
    for value, expectation in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected), strict=True):
        assert jnp.linalg.norm(value - expectation) <= 1e-4 * jnp.linalg.norm(expectation)


NARROW = ModelConfig(
    vocab_size=64,
    d_model=8,
    num_heads=1,
    num_blocks=2,
    hidden_depth=0,
    d_ff=64,
    history_window=64,
    generation_window=64,
    dtype="float32",
    memory=ExecutionPlan(segments=2, checkpointing=True),
)


@pytest.fixture(autouse=True)
def small_chunks_of_logits(monkeypatch):
    monkeypatch.setattr("tlinformer_jax.training.loss.LOSS_CHUNK", 512)


def temporary_bytes(config: ModelConfig, length: int, sampled: int = 0) -> int:
    """What the compiled gradient of one sequence needs beside its arguments and results."""
    model = build_model(config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]

    def loss(params, batch):
        windows = jnp.arange(sampled, dtype=jnp.int32) if sampled else None
        return summed_loss(params, batch, jax.random.key(0), model=model, windows=windows)[0]

    row = jax.ShapeDtypeStruct((1, length), jnp.int32)
    batch = {"inputs": row, "labels": row, "weights": jax.ShapeDtypeStruct((1, length), jnp.float32)}
    return jax.jit(jax.grad(loss)).lower(params, batch).compile().memory_analysis().temp_size_in_bytes


def needed(jaxpr, equation) -> set[int]:
    """The indices of all equations that an equation waits for."""
    made = {id(variable): index for index, eqn in enumerate(jaxpr.eqns) for variable in eqn.outvars}
    found, left = set(), [equation]
    while left:
        for index in {made[id(v)] for v in left.pop().invars if id(v) in made} - found:
            found.add(index)
            left.append(jaxpr.eqns[index])
    return found


@pytest.mark.parametrize("together", [3, 1])
def test_a_loop_over_windows_starts_when_the_gradients_of_the_one_before_are_there(together):
    """A compiler unrolls a loop of one step. If it were free to mix two, both would be in memory."""
    config = dataclasses.replace(NARROW, memory=ExecutionPlan(2, together, checkpointing=True))
    model, length = build_model(config), 8 * config.generation_window
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]

    def loss(params):
        row = jnp.ones((1, length), jnp.int32)
        batch = {"inputs": row, "labels": row, "weights": jnp.ones((1, length))}
        return summed_loss(params, batch, jax.random.key(0), model=model)[0]

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params).jaxpr
    loops = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"]
    assert len(loops) >= 3
    barriers = {index for index, eqn in enumerate(jaxpr.eqns) if eqn.primitive.name == "optimization_barrier"}
    for loop, following in itertools.pairwise(loops):
        results = {id(variable) for variable in loop.outvars}
        whole = {index for index in barriers if results <= {id(variable) for variable in jaxpr.eqns[index].invars}}
        assert whole & needed(jaxpr, following)


@pytest.mark.slow
def test_memory_grows_as_the_sequence_does_and_is_lower_with_chunks_and_samples():
    """At 65,536 tokens at most 1.5 times as much a token as at 32,768: no term grows with the square."""
    whole = temporary_bytes(NARROW, 32_768)
    assert temporary_bytes(NARROW, 65_536) <= 1.5 * 2 * whole
    wide = dataclasses.replace(NARROW, d_ff=512)
    chunked = dataclasses.replace(wide, memory=ExecutionPlan(segments=2, chunk=2048, checkpointing=True))
    assert temporary_bytes(chunked, 32_768) < 0.5 * temporary_bytes(wide, 32_768)
    sampled = temporary_bytes(NARROW, 32_768, sampled=4)
    assert sampled < 1.5 * whole
    assert temporary_bytes(NARROW, 65_536, sampled=4) <= 3 * sampled
