"""The loss of a batch: the model gives hidden states, of a sequence or of a window; here they meet their labels.

A long sequence is computed window after window, each window's gradient made together with its loss. Windows are
independent given the embeddings, so the gradient of k of n windows, weighted by n / k, is right in expectation: a step
may sample them, the same in all sequences of a micro-batch.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.feed_forward import with_router_losses
from tlinformer_jax.models.layers import Dropout, layer_norm
from tlinformer_jax.models.model import (
    LanguageModel,
    ModelParams,
    embed,
    hidden_states,
    prepare_params,
    tokens_before,
)
from tlinformer_jax.models.recompute import add_wide, rounded, wide_zeros
from tlinformer_jax.models.streams import History, Stream
from tlinformer_jax.models.tlinformer import PreparedSequence, place_in_run, prepare_sequence, window_states
from tlinformer_jax.models.windows import Segment, assign_runs, num_windows
from tlinformer_jax.parallel.sharding import UNSPLIT, WHOLE, BatchSplit, SequenceSplit, assign_windows
from tlinformer_jax.training.cross_entropy import (
    LOSS_CHUNK,
    AnswersOf,
    at_places,
    summed_losses_and_hits,
    weighted_places,
)

DeviceBatch = dict[str, jax.Array]
LossAndRight = tuple[Float[Array, ""], Float[Array, ""]]
RowsLoss = Callable[[jax.Array, jax.Array, DeviceBatch], LossAndRight]
WindowLoss = Callable[[Any, Any, Any, Any], LossAndRight]


def summed_loss(
    params: Any,
    batch: DeviceBatch,
    key: jax.Array,
    windows: jax.Array | None = None,
    *,
    model: LanguageModel,
    split: BatchSplit = UNSPLIT,
    answers: AnswersOf | None = None,
    divisor: jax.Array | float = 1.0,
    z_loss: float = 0.0,
) -> LossAndRight:
    """Cross-entropy in nats, weighted and summed over a batch; and the weight of the labels that are right.

    Of the hidden states of a whole sequence, or window after window. Where devices share the batch, or its sequences,
    it is this device's share.

    Args:
      batch: as `train_step` takes it, and `answers`; with `documents` where a sample holds several, see `Embedded`.
      key: of the dropout.
      windows: generation windows to train on, int32 [k], whose losses count n / k times; None for all n.
      split: of the batch over devices.
      divisor: of the sum.
      z_loss: of the gradient, see `TrainConfig`.
    """
    shape, inputs, sequences = model.config, batch["inputs"], split.sequence
    rows = {name: batch[name] for name in ("labels", "weights")}
    length, documents = inputs.shape[1], batch.get("documents")
    known = None if answers is None else answers(length)
    most, start = (None, 0) if known is None else (known.most, known.first if windows is None else 0)
    typed = prepare_params(model.apply({"params": params}, method=model.parameters), shape)  # type: ignore[arg-type]
    rows_loss = functools.partial(weighted_loss, most=most, z_loss=z_loss)
    dropout = Dropout.by_key(key, shape.dropout, split.shard_index()) if shape.dropout else None
    first = start // shape.generation_window
    plan = shape.plan(num_windows(shape, length) - first)
    if windows is None and sequences == WHOLE and not (shape.windowed and plan.checkpointing):
        typed = count_routers(typed, shape, rows["weights"], divisor)
        hidden = hidden_states(typed, shape, embed(typed, shape, inputs, documents=documents), dropout, start)
        rows = jax.tree.map(lambda array: array[:, start:], rows)
        total, right = rows_loss(hidden, typed.embedding, rows)
        return total / divisor, right
    before = None
    if sequences.rows is not None:
        # The rows of a device are not neighbours: the token before each lies on another device.
        padding = -length % sequences.row_parts
        if shape.token_shift:
            before = sequences.rows.take(pad_rows(tokens_before(inputs, documents), padding))
        inputs = sequences.rows.take(pad_rows(inputs, padding))
    if windows is not None or sequences != WHOLE:
        plan = dataclasses.replace(plan, together=1)
    embeddings = embed(typed, shape, inputs, before, documents)
    sequence = prepare_sequence(typed.blocks, shape, embeddings, length, plan, dropout, sequences, first)
    total, right = jnp.float32(0), jnp.float32(0)
    for loop in window_loops(shape, sequence, rows, sequences, windows):
        branches = tuple(functools.partial(window_loss, shape, run, rows_loss) for run in loop.runs)
        shared, steps = (typed, loop.history), (loop.indices, loop.rows)
        loss, hits = sum_with_gradients(branches, shared, loop.own, sequence.fixed, steps, loop.which)
        total, right = total + loss, right + hits
    # n / k, by which sampled windows count.
    weight = 1.0 if windows is None else num_windows(shape, length) / windows.shape[0]
    return total * weight / divisor, right


def window_loss(
    shape: ModelConfig,
    run: Segment,
    rows_loss: RowsLoss,
    fixed: Any,
    step: tuple[jax.Array, DeviceBatch],
    shared: tuple[ModelParams, History],
    x: Stream | None,
) -> LossAndRight:
    """`weighted_loss` of a generation window, or of those that run together, as `sum_with_gradients` takes it.

    `step` are the window's index, its labels and weights; `shared` parameters and history; `x` the window's own rows,
    after those that overlap. Where rows are split over devices, it is of this device's rows, and `x` is None.
    """
    (params, history), (index, rows) = shared, step
    size, split, overlap = shape.generation_window, history.split, run.overlap(shape)
    if split is not None:
        whole = Stream(history.rows, history.Q, history.K, history.V)
        x = jax.tree.map(lambda array: history.slice(array, run.starts(shape, index), overlap + size), whole)
    assert x is not None
    if x.rows.shape[1] > overlap + size:  # the first window, drawn among others
        x = jax.tree.map(lambda array: array[:, -size:], x)
    C, frame, dropout = place_in_run(shape, run, history, fixed, index)
    params = count_routers(params, shape, rows["weights"], split.parts if split else 1)
    states = window_states(params.blocks, shape, C, x, frame, dropout)
    if overlap:
        states = states[:, overlap:]
    if split is not None:
        states, rows = jax.tree.map(lambda array: split.take(pad_rows(array, -size % split.parts)), (states, rows))
    hidden = layer_norm(states, params.norm_scale, params.norm_bias)
    return rows_loss(hidden, params.embedding, rows)


def count_routers(
    params: ModelParams, shape: ModelConfig, weights: jax.Array, divisor: jax.Array | float
) -> ModelParams:
    """The parameters with the routers' losses, which count as much as these labels, `weights`, do in the loss."""
    return with_router_losses(params, jnp.sum(weights) / divisor) if shape.mixture else params


def weighted_loss(
    hidden: jax.Array, embedding: jax.Array, rows: DeviceBatch, most: int | None, z_loss: float
) -> LossAndRight:
    """`summed_losses_and_hits`; of tasks, of the `most` rows that have weights alone."""
    if most is not None and (places := weighted_places(rows["weights"], most)) is not None:
        hidden, rows = jax.tree.map(lambda array: at_places(array, places), (hidden, rows))
    return summed_losses_and_hits(hidden, embedding, rows["labels"], rows["weights"], LOSS_CHUNK, z_loss)


# ---- Window after window


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_with_gradients(
    branches: tuple[WindowLoss, ...],
    shared: Any,
    parts: Any,
    fixed: Any,
    steps: Any,
    which: Int[Array, " steps"] | None,
) -> LossAndRight:
    """The sum of the windows' losses such that differentiation keeps nothing of any window.

    A window reads all of the history before it, so what its backward pass needs is as large as its history. Over N
    tokens JAX would keep that for every window: memory that grows with N^2 / W_og. `jax.checkpoint` around each window
    would compute it twice, and add up what windows share in bfloat16, where such a sum stops growing.

    But the loss is a sum, so its gradient can be made term by term, and all that the rest of the program can still
    change is a factor, the slope of whatever is done with the sum. So the *forward* pass runs, window after window,

        loss_w, pull = jax.vjp(window_loss, shared, part_w)        the window's forward pass
        gradient    += pull(1)                                     at once its backward pass, added up in float32

    and keeps the summed gradient alone, which the backward pass multiplies with the slope. Memory is that of one window
    and of the gradients; nothing is computed twice.

    Windows of different static shapes, such as sampled ones, can take turns: `which` chooses among several branches.

    Args:
      branches: window_loss(fixed, step, shared, part) -> the loss, and what is summed along with it and has no
        gradient; must not close over traced values.
      shared: pytree of floating arrays that every window reads, parameters and history; differentiated.
      parts: pytree of floating arrays [steps, ...] (or empty), a slice for each window; differentiated.
      fixed: pytree that every window reads; not differentiated.
      steps: pytree of arrays [steps, ...], a slice for each window; not differentiated.
      which: the branch of each window; None with a single branch.
    """

    def body(sums: Any, item: Any) -> tuple[Any, None]:
        part, step, index = item
        run = branches[0] if index is None else functools.partial(jax.lax.switch, index, branches)
        return jax.tree.map(jnp.add, sums, run(fixed, step, shared, part)), None

    return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), (parts, steps, which))[0]


def _forward(branches, shared, parts, fixed, steps, which):
    start = (jnp.float32(0), jnp.float32(0)), wide_zeros(shared)
    choices = [functools.partial(_add_loss_and_gradient, branch, shared, fixed) for branch in branches]

    def chosen(carry, item):
        return jax.lax.switch(item[2], choices, carry, item)

    body = choices[0] if which is None else chosen
    (sums, total), part_gradients = jax.lax.scan(body, start, (parts, steps, which))
    return sums, (rounded(total, shared), part_gradients)


def _add_loss_and_gradient(branch, shared, fixed, carry, item):
    """One window: its loss and its gradient, added to the sums of those before it."""
    (sums, total), (part, step, _) = carry, item
    loss, pull, aux = jax.vjp(functools.partial(branch, fixed, step), shared, part, has_aux=True)
    gradient, part_gradient = pull(jnp.ones_like(loss))
    return (jax.tree.map(jnp.add, sums, (loss, aux)), add_wide(total, gradient)), part_gradient


def _backward(branches, gradients, cotangents):
    slope, _ = cotangents
    shared, parts = jax.tree.map(lambda array: (array.astype(jnp.float32) * slope).astype(array.dtype), gradients)
    return shared, parts, None, None, None


sum_with_gradients.defvjp(_forward, _backward)


def draw_windows(key: jax.Array, config: ModelConfig, length: int, count: int) -> jax.Array | None:
    """`count` different windows, int32 [count], ascending; None if those are all."""
    windows = num_windows(config, length)
    if count == 0 or count >= windows:
        return None
    return jnp.sort(jax.random.permutation(key, windows)[:count]).astype(jnp.int32)


class WindowLoop(NamedTuple):
    """Windows that one loop goes through, as `sum_with_gradients` takes them."""

    runs: tuple[Segment, ...]  # the static shapes they have, a branch for each
    history: History  # what they reach of it
    own: Stream | None  # their rows; None where devices share them
    indices: Array  # int32 [steps], or of those that run together, [steps, g]
    rows: Any  # what goes along with the tokens, such as labels, [steps, ...]; zeros where there is no window
    which: Array | None = None  # of `runs`, for each window; None with a single one

    def on_device(self, assigned: np.ndarray) -> "WindowLoop":
        """The loop over this device's windows, as `assign_windows` has dealt them out."""
        if assigned.shape[1] == 1:
            return self
        places = jnp.asarray(assigned, jnp.int32)[:, jax.lax.axis_index("window")]
        beyond = jnp.where(places < 0, assigned.size, places)
        take = functools.partial(jnp.take, indices=jnp.maximum(places, 0), axis=0)
        fill = functools.partial(jnp.take, indices=beyond, axis=0, mode="fill", fill_value=0)
        own, indices, which = jax.tree.map(take, (self.own, self.indices, self.which))
        return self._replace(own=own, indices=indices, rows=jax.tree.map(fill, self.rows), which=which)


def window_loops(
    config: ModelConfig, sequence: PreparedSequence, rows: Any, split: SequenceSplit, windows: Array | None
) -> Iterator[WindowLoop]:
    """The loops over a sequence's windows, or over this device's of them; `rows` are arrays [batch, length, ...].

    With `windows`, int32 [k], ascending, a single loop over only these; else one for each of `sequence.runs`.
    """
    padding = sequence.count * config.generation_window - jax.tree.leaves(rows)[0].shape[1]
    rows = jax.tree.map(lambda array: pad_rows(array, padding), rows)
    parts, runs = split.window_parts, sequence.runs
    if windows is None:
        for run, assigned in zip(runs, assign_runs(runs, parts)):
            own, indices = sequence.windows(config, run, run.overlap(config)), jnp.asarray(run.windows)
            loop = WindowLoop((run,), sequence.reach(config, run), own, indices, run.rows(config, rows))
            yield loop.on_device(assigned)
        return
    every = Segment(0, (0,) * sequence.count, 0, 0)  # of it only which windows it has is read
    arrays = sequence.windows(config, every, config.window_overlap), every.rows(config, rows)
    own, taken = jax.tree.map(lambda array: jnp.take(array, windows, axis=0), arrays)
    # Each takes the branch of the run that it lies in.
    firsts = jnp.asarray([run.first for run in runs[1:]], jnp.int32)
    which = jnp.sum(windows[:, None] >= firsts, axis=1, dtype=jnp.int32)
    loop = WindowLoop(runs, sequence.history, own, windows, taken, which)
    yield loop.on_device(assign_windows(windows.shape[0], parts, np.zeros(parts)))


def pad_rows(array: Array, count: int) -> Array:
    """[batch, rows, ...] with `count` rows of zeros after them."""
    return jnp.pad(array, ((0, 0), (0, count), *((0, 0),) * (array.ndim - 2)))
