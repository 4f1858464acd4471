"""The loss of a long sequence, window by window, each window's gradient together with its loss.

Windows are independent given the embeddings, so k sampled windows of n, weighted by n / k, have the right gradient in
expectation. The sampled windows are the same for all sequences of a micro-batch.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.feed_forward import with_router_losses
from tlinformer_jax.models.history import History
from tlinformer_jax.models.key_rows import tokens_before
from tlinformer_jax.models.layers import Embedded, layer_norm
from tlinformer_jax.models.model import ModelParams, embed
from tlinformer_jax.models.recompute import add_wide, rounded, wide_zeros
from tlinformer_jax.models.streams import Stream
from tlinformer_jax.models.tlinformer import Constants, PreparedSequence, place_in_segment, window_states
from tlinformer_jax.models.windows import Segment, num_windows, pad_rows, window_rows
from tlinformer_jax.parallel.sharding import SequenceSplit, assign_windows

DeviceBatch = dict[str, jax.Array]
LossAndRight = tuple[Float[Array, ""], Float[Array, ""]]
RowsLoss = Callable[[jax.Array, jax.Array, DeviceBatch], LossAndRight]
WindowLoss = Callable[[Any, Any, Any, Any], LossAndRight]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_with_gradients(
    branches: tuple[WindowLoss, ...],
    shared: Any,
    parts: Any,
    constants: Any,
    steps: Any,
    which: Int[Array, " steps"] | None,
) -> LossAndRight:
    """Sums the windows' losses, and keeps no window's intermediate values for differentiation.

    A window reads the whole history before it, so what its backward pass needs is as large as that history. Over N
    tokens JAX would keep this for every window: memory that grows with N^2 / W_og. `jax.checkpoint` around each window
    would compute the window twice, and sum gradients of shared arrays in bfloat16, where a growing sum loses its terms.

    But the loss is a sum, so its gradient can be computed term by term; the rest of the program only scales it by a
    factor, the cotangent of the sum. So the *forward* pass computes, window by window,

        loss_w, pull = jax.vjp(window_loss, shared, part_w)        the window's forward pass
        gradient    += pull(1)                                     its backward pass, summed in float32

    and keeps only the summed gradient, which the backward pass multiplies by the cotangent. Memory is that of one
    window and of the gradients, and nothing is computed twice.

    Windows of different static shapes, such as sampled ones, use several branches, among which `which` chooses.

    Args:
      branches: window_loss(constants, step, shared, part) -> the loss, and a second sum without a gradient. They must
        not close over traced values.
      shared: pytree of floating-point arrays that every window reads, parameters and history; differentiated.
      parts: pytree of floating-point arrays [steps, ...] (or empty), a slice for each window; differentiated.
      constants: pytree that every window reads; not differentiated.
      steps: pytree of arrays [steps, ...], a slice for each window; not differentiated.
      which: the branch of each window; None with a single branch.
    """

    def body(sums: Any, item: Any) -> tuple[Any, None]:
        part, step, index = item
        branch = branches[0] if index is None else functools.partial(jax.lax.switch, index, branches)
        return jax.tree.map(jnp.add, sums, branch(constants, step, shared, part)), None

    return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), (parts, steps, which))[0]


def _forward(branches, shared, parts, constants, steps, which):
    start = (jnp.float32(0), jnp.float32(0)), wide_zeros(shared)
    choices = [functools.partial(_add_loss_and_gradient, branch, shared, constants) for branch in branches]

    def chosen(carry, item):
        return jax.lax.switch(item[2], choices, carry, item)

    body = choices[0] if which is None else chosen
    found = jax.lax.scan(body, start, (parts, steps, which))
    (sums, total), part_gradients = jax.lax.optimization_barrier(found)
    return sums, (rounded(total, shared), part_gradients)


def _add_loss_and_gradient(branch, shared, constants, carry, item):
    """Adds one window's loss and gradient to the sums over the windows before it."""
    (sums, total), (part, step, _) = carry, item
    loss, pull, aux = jax.vjp(functools.partial(branch, constants, step), shared, part, has_aux=True)
    gradient, part_gradient = pull(jnp.ones_like(loss))
    return (jax.tree.map(jnp.add, sums, (loss, aux)), add_wide(total, gradient)), part_gradient


def _backward(branches, gradients, cotangents):
    slope, _ = cotangents
    shared, parts = jax.tree.map(lambda array: (array.astype(jnp.float32) * slope).astype(array.dtype), gradients)
    return shared, parts, None, None, None


sum_with_gradients.defvjp(_forward, _backward)


def draw_windows(key: jax.Array, config: ModelConfig, length: int, count: int) -> jax.Array | None:
    """Draws `count` different windows, int32 [count], ascending; None if all windows are to be trained."""
    windows = num_windows(config, length)
    if count == 0 or count >= windows:
        return None
    return jnp.sort(jax.random.permutation(key, windows)[:count]).astype(jnp.int32)


class WindowLoop(NamedTuple):
    """The windows of one loop, as arguments of `sum_with_gradients`."""

    segments: tuple[Segment, ...]  # one for each static shape of a window; a branch for each
    history: History  # as much as these windows can read
    own: Stream | None  # the windows' own rows; None if devices split them
    indices: Array  # int32 [steps], or [steps, g] for g windows computed together
    rows: Any  # labels and weights, [steps, ...]; zeros for steps without a window
    which: Array | None = None  # index into `segments` for each window; None with a single one

    def on_device(self, assigned: np.ndarray) -> "WindowLoop":
        """Returns the loop over this device's windows; `assigned` comes from `assign_windows`."""
        if assigned.shape[1] == 1:
            return self
        windows = jnp.asarray(assigned, jnp.int32)[:, jax.lax.axis_index("window")]
        beyond = jnp.where(windows < 0, assigned.size, windows)
        take = functools.partial(jnp.take, indices=jnp.maximum(windows, 0), axis=0)
        fill = functools.partial(jnp.take, indices=beyond, axis=0, mode="fill", fill_value=0)
        own, indices, which = jax.tree.map(take, (self.own, self.indices, self.which))
        return self._replace(own=own, indices=indices, rows=jax.tree.map(fill, self.rows), which=which)


def window_loops(
    config: ModelConfig, sequence: PreparedSequence, rows: Any, split: SequenceSplit, windows: Array | None
) -> Iterator[WindowLoop]:
    """Yields the loops over a sequence's windows, or over this device's share; `rows` are arrays [batch, length, ...].

    With `windows`, int32 [k], ascending, there is one loop over these windows; else one loop for each segment.
    """
    padding = sequence.count * config.generation_window - jax.tree.leaves(rows)[0].shape[1]
    rows = jax.tree.map(lambda array: pad_rows(array, padding), rows)
    parts, segments = split.window_parts, sequence.segments
    if windows is None:
        rounds = 0
        for segment in segments:
            own, indices = sequence.windows(config, segment), jnp.asarray(segment.windows)
            loop = WindowLoop((segment,), sequence.reach(config, segment), own, indices, segment.rows(config, rows))
            assigned = assign_windows(segment.count, parts, rounds)
            rounds += len(assigned)
            yield loop.on_device(assigned)
        return

    rows = jax.tree.map(lambda array: window_rows(config, array, 0, sequence.count), rows)
    own, taken = jax.tree.map(lambda array: jnp.take(array, windows, axis=0), (sequence.every_window(config), rows))
    # A window takes the branch of the segment that contains it.
    firsts = jnp.asarray([segment.first for segment in segments[1:]], jnp.int32)
    which = jnp.sum(windows[:, None] >= firsts, axis=1, dtype=jnp.int32)
    loop = WindowLoop(segments, sequence.history, own, windows, taken, which)
    yield loop.on_device(assign_windows(windows.shape[0], parts))


# ---- One window


def embed_rows(
    typed: ModelParams,
    shape: ModelConfig,
    inputs: Int[Array, "batch length"],
    documents: Int[Array, "batch length"] | None,
    sequences: SequenceSplit,
) -> Embedded:
    """Returns the embeddings of a sequence; of this device's rows if devices split the rows."""
    if sequences.rows is None:
        return embed(typed, shape, inputs, documents=documents)
    # Each device holds rows from all over the sequence, so the tokens before a row are usually on other devices.
    earlier = [tokens_before(inputs, documents, back) for back in range(1, shape.key_reach + 1)]
    padding = -inputs.shape[1] % sequences.row_parts
    own, *before = [sequences.rows.take(pad_rows(ids, padding)) for ids in (inputs, *earlier)]
    return embed(typed, shape, own, before, documents)


def window_loss(
    shape: ModelConfig,
    segment: Segment,
    rows_loss: RowsLoss,
    constants: Constants,
    step: tuple[jax.Array, DeviceBatch],
    shared: tuple[ModelParams, History],
    x: Stream | None,
) -> LossAndRight:
    """Returns `rows_loss` of a generation window, or of windows computed together; used by `sum_with_gradients`.

    `step` holds the window's index, labels and weights; `shared` the parameters and the history; `x` the window's own
    rows, after those that overlap. If devices split the rows, the loss is of this device's rows, and `x` is None.
    """
    (params, history), (index, rows) = shared, step
    size, split, overlap = shape.generation_window, history.split, segment.overlap(shape)
    if split is not None:
        whole = Stream(history.rows, history.Q, history.K, history.V)
        x = jax.tree.map(lambda array: history.slice(array, segment.starts(shape, index), overlap + size), whole)
    assert x is not None
    if x.rows.shape[1] > overlap + size:  # a sampled first window: it has no overlap
        x = jax.tree.map(lambda array: array[:, -size:], x)
    C, frame, dropout = place_in_segment(shape, segment, history, constants, index)
    params = with_router_losses(params, rows["weights"], split.parts if split else 1)
    states = window_states(params.blocks, shape, C, x, frame, dropout)
    if overlap:
        states = states[:, overlap:]
    if split is not None:
        states, rows = jax.tree.map(lambda array: split.take(pad_rows(array, -size % split.parts)), (states, rows))
    hidden = layer_norm(states, params.norm_scale, params.norm_bias)
    return rows_loss(hidden, params.embedding, rows)
