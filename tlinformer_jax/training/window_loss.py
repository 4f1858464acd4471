"""The loss of a long sequence, window after window, each window's gradient made together with its loss.

Window sampling: a training step on k of a sequence's n windows. Windows are independent given the embeddings, so the
gradient of k of them, drawn without replacement with equal probabilities and weighted by n / k, is right in
expectation; a step on a very long sequence then costs its embeddings, block 0's projections and k windows. All
sequences of a micro-batch take the same windows.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.recompute import add_wide, rounded, wide_zeros
from tlinformer_jax.models.streams import History, Stream
from tlinformer_jax.models.tlinformer import PreparedSequence
from tlinformer_jax.models.windows import Segment, assign_runs, num_windows
from tlinformer_jax.parallel.batch_split import SequenceSplit, assign_windows

WindowLoss = Callable[[Any, Any, Any, Any], tuple[Float[Array, ""], Float[Array, ""]]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sum_with_gradients(
    branches: tuple[WindowLoss, ...],
    shared: Any,
    parts: Any,
    fixed: Any,
    steps: Any,
    which: Int[Array, " steps"] | None,
) -> tuple[tuple[Float[Array, ""], Float[Array, ""]], Float[Array, " steps"]]:
    """The sum of the windows' losses, and each window's, such that differentiation keeps nothing of any window.

    Why this is not simply differentiated. A window reads all of the history before it, so what its backward pass
    needs (the attention's inputs, the feed-forward's inner values of C, z and x) is as large as its history. Over a
    sequence of N tokens JAX would keep that for every window until the last one is done: memory that grows with
    N^2 / W_og. `jax.checkpoint` around each window would keep nothing, but compute each window twice, and add up the
    gradients of what the windows share in its own dtype: in bfloat16 the sum over a thousand windows stops growing
    after a few hundred.

    But the loss is a sum. The gradient of a sum can be made term by term, and the only thing that the rest of the
    program can still change about a term's gradient is a factor, the slope of whatever is done with the sum. So when
    this function is differentiated, its *forward* pass runs, window after window,

        loss_w, pull = jax.vjp(window_loss, shared, part_w)        the window's forward pass
        gradient    += pull(1)                                     at once its backward pass, added up in float32

    and keeps the summed gradient alone. The backward pass multiplies it with the slope. So:

    - memory is that of one window, of the shared arrays' gradient in float32, and of the parts' gradients;
    - nothing is computed twice: the work is that of differentiating everything at once;
    - the loop's carry is (sum, gradient), whatever the length of the sequence.

    What is shared (parameters, and the history with its projections) and what is a window's own (its rows) are
    differentiated; the chain goes on from there to the embeddings and to the parameters that made them, outside of
    the loop. Not differentiated are rotations, dropout, labels and window indices.

    Windows of different static shapes can take turns: where `which` chooses among several branches, what one of them
    needs exists while it runs only. That is how sampled windows, each with a history of its own length, share a loop.

    Args:
      branches: window_loss(fixed, step, shared, part) -> two float32 [], the loss, and what is summed along with it
        and has no gradient; must not close over traced values.
      shared: pytree of floating arrays that every window reads; differentiated.
      parts: pytree of floating arrays [steps, ...] (or empty), a slice for each window; differentiated.
      fixed: pytree that every window reads; not differentiated.
      steps: pytree of arrays [steps, ...], a slice for each window; not differentiated.
      which: the branch of each window; None with a single branch.

    Returns:
      both sums; and each window's loss, float32 [steps]. Gradients flow through the sum of losses alone.
    """

    def body(sums: Any, item: Any) -> tuple[Any, Array]:
        part, step, index = item
        run = branches[0] if index is None else functools.partial(jax.lax.switch, index, branches)
        values = run(fixed, step, shared, part)
        return jax.tree.map(jnp.add, sums, values), values[0]

    return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), (parts, steps, which))


def _forward(branches, shared, parts, fixed, steps, which):
    start = (jnp.float32(0), jnp.float32(0)), wide_zeros(shared)
    choices = [functools.partial(_add_loss_and_gradient, branch, shared, fixed) for branch in branches]

    def chosen(carry, item):
        return jax.lax.switch(item[2], choices, carry, item)

    body = choices[0] if which is None else chosen
    (sums, total), (each, part_gradients) = jax.lax.scan(body, start, (parts, steps, which))
    return (sums, each), (rounded(total, shared), part_gradients)


def _add_loss_and_gradient(branch, shared, fixed, carry, item):
    """One window: its loss and its gradient, added to the sums of those before it."""
    (sums, total), (part, step, _) = carry, item
    loss, pull, aux = jax.vjp(functools.partial(branch, fixed, step), shared, part, has_aux=True)
    gradient, part_gradient = pull(jnp.ones_like(loss))
    return (jax.tree.map(jnp.add, sums, (loss, aux)), add_wide(total, gradient)), (loss, part_gradient)


def _backward(branches, gradients, cotangents):
    (slope, _), _ = cotangents
    shared, parts = jax.tree.map(lambda array: (array.astype(jnp.float32) * slope).astype(array.dtype), gradients)
    return shared, parts, None, None, None


sum_with_gradients.defvjp(_forward, _backward)


def draw_windows(key: jax.Array, config: ModelConfig, length: int, count: int) -> jax.Array | None:
    """`count` different windows of a sequence of `length` tokens, int32 [count]; None if those are all.

    They are sorted, so that a loop through them goes from short histories to long ones.
    """
    windows = num_windows(config, length)
    if count == 0 or count >= windows:
        return None
    return jnp.sort(jax.random.permutation(key, windows)[:count]).astype(jnp.int32)


def window_weight(config: ModelConfig, length: int, windows: jax.Array | None) -> float:
    """n / k, by which the sampled windows' losses count."""
    return 1.0 if windows is None else num_windows(config, length) / windows.shape[0]


@flax.struct.dataclass
class WindowLoop:
    """Windows that one loop goes through, as `sum_with_gradients` takes them.

    Attributes:
      runs: the static shapes that its windows have, a branch for each.
      history: what its windows reach of it.
      own: the windows' rows; None where devices share them.
      indices: of the windows, int32 [steps], or of those that run together, [steps, g].
      rows: what goes along with the tokens, such as labels, [steps, ...]; zeros where there is no window.
      which: of `runs`, for each window; None with a single one.
      places: of a loop whose windows are split over devices, where this device's stand among all `count`; else None.
    """

    history: History
    own: Stream | None
    indices: Array
    rows: Any
    which: Array | None
    places: Array | None
    runs: tuple[Segment, ...] = flax.struct.field(pytree_node=False)
    count: int = flax.struct.field(pytree_node=False)

    def gathered(self, each: Float[Array, " steps"]) -> Float[Array, " count"]:
        """Each window's loss at its place among those of all devices, zeros for others'."""
        each = jax.lax.stop_gradient(each)
        if self.places is None:
            return each
        at = jnp.where(self.places < 0, self.count, self.places)
        return jnp.zeros(self.count, each.dtype).at[at].add(each, mode="drop")


def window_loops(
    config: ModelConfig, sequence: PreparedSequence, rows: Any, split: SequenceSplit, windows: Array | None
) -> Iterator[WindowLoop]:
    """The loops over a sequence's windows, or over this device's of them.

    Args:
      config: of the model.
      sequence: prepared.
      rows: pytree of arrays [batch, length, ...].
      split: of sequences over devices.
      windows: of all windows only these, int32 [k], ascending, in a single loop; None for all of `sequence.runs`.
    """
    padding = sequence.count * config.generation_window - jax.tree.leaves(rows)[0].shape[1]
    rows = jax.tree.map(lambda array: pad_rows(array, padding), rows)
    if windows is not None:
        yield _sampled_loop(config, sequence, rows, split, windows)
        return
    for run, assigned in zip(sequence.runs, assign_runs(sequence.runs, split.window_parts)):
        own, indices = sequence.windows(config, run), jnp.asarray(run.windows)
        taken = run.rows(config, rows)
        places = None if split.windows is None else split.windows.mine(assigned)
        if places is not None:
            own, indices, taken = _take(own, places), _take(indices, places), _masked(_take(taken, places), places)
        yield WindowLoop(sequence.reach(config, run), own, indices, taken, None, places, (run,), run.count)


def _sampled_loop(
    config: ModelConfig, sequence: PreparedSequence, rows: Any, split: SequenceSplit, windows: Array
) -> WindowLoop:
    """One loop through any windows; each takes the branch of the run that it lies in."""
    count, places = windows.shape[0], None
    if split.windows is not None:
        places = split.windows.mine(assign_windows(count, split.window_parts, np.zeros(split.window_parts)))
        windows = _take(windows, places)
    firsts = jnp.asarray([run.first for run in sequence.runs[1:]], jnp.int32)
    which = jnp.sum(windows[:, None] >= firsts, axis=1, dtype=jnp.int32)
    every = Segment(0, (0,) * sequence.count, 0, 0)  # of it only which windows it has is read
    own = _take(sequence.windows(config, every), windows)
    taken = _take(every.rows(config, rows), windows)
    if places is not None:
        taken = _masked(taken, places)
    return WindowLoop(sequence.history, own, windows, taken, which, places, sequence.runs, count)


def pad_rows(array: Array, count: int) -> Array:
    """[batch, rows, ...] with `count` rows of zeros after them."""
    return jnp.pad(array, ((0, 0), (0, count), *((0, 0),) * (array.ndim - 2)))


def _take(arrays: Any, places: Array) -> Any:
    """Elements at `places` of arrays [count, ...]; any for NO_WINDOW."""
    return jax.tree.map(lambda array: jnp.take(array, jnp.maximum(places, 0), axis=0), arrays)


def _masked(arrays: Any, places: Array) -> Any:
    """Zeros for NO_WINDOW."""

    def masked(array: Array) -> Array:
        return jnp.where((places >= 0).reshape(-1, *(1,) * (array.ndim - 1)), array, jnp.zeros_like(array))

    return jax.tree.map(masked, arrays)
