"""The sum of a function over a sequence's generation windows, gradients made along with it: what training computes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.dropout import Dropout
from tlinformer_jax.models.recompute import Branch, sum_with_gradients
from tlinformer_jax.models.streams import BlockParams, History
from tlinformer_jax.models.tlinformer import FIRST_WINDOW, Fixed, Sequence, Shared, prepare, window_branch
from tlinformer_jax.models.windows import Place, Segment, window_rows
from tlinformer_jax.parallel.sequence_split import WHOLE, SequenceSplit, deal_windows

# What becomes of a window: (what it reads besides, hidden states [batch, rows, D], the same rows of what goes along
# with the sequence) -> two float32 [], sums over the rows, of which the first is differentiated. It must not close over
# traced values.
Readout = Callable[[Any, jax.Array, Any], tuple[jax.Array, jax.Array]]


def sum_windows(
    blocks: tuple[BlockParams, ...],
    config: ModelConfig,
    embeddings: jax.Array,
    readout: Readout,
    readout_shared: Any,
    rows: Any,
    dropout: Dropout | None = None,
    windows: jax.Array | None = None,
    split: SequenceSplit = WHOLE,
    first: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sums of `readout` over the windows of a sequence, or over some of them, or this device's share of the sums.

    A window's forward and backward pass follow one another, so that of no window anything is kept but its gradient,
    and nothing is computed twice.

    Args:
      blocks: parameters, from `prepare_layers`.
      config: of the model.
      embeddings: [batch, length, D] in the compute dtype; where rows are split, this device's.
      readout: what is summed.
      readout_shared: pytree of floating arrays that every readout reads; differentiated.
      rows: pytree of arrays [batch, length, ...] that go along with the sequence; where they are 0, as they are made
        past its end, the readout must be 0. Not differentiated.
      dropout: None outside training; each window draws masks of its own.
      windows: indices of the windows that are wanted, int32 [k], ascending; None for all. Their number does not change
        the size of the program.
      split: how the sequence is split over devices; their windows do not run together.
      first: of all windows, the first that is wanted.

    Returns:
      float32 [] both, of this device, and of the first the share of each window that is run, float32 [windows or k] (of
      windows that run together, each group's). No gradient flows through the last two.
    """
    together = None if windows is None and split == WHOLE else 1
    length = jax.tree.leaves(rows)[0].shape[1]
    sequence = prepare(blocks, config, embeddings, length, dropout, readout_shared, together, split, first)
    padding = sequence.count * config.generation_window - length
    rows = jax.tree.map(lambda array: _padded(array, padding), rows)
    if windows is not None:
        return _sum_sampled(config, sequence, readout, rows, windows, split)
    runs = sequence.segments if first else (FIRST_WINDOW, *sequence.segments)
    dealt = deal_runs(runs, split.window_parts)
    sums = [_sum_run(config, sequence, run, readout, rows, split, part) for run, part in zip(runs, dealt)]
    totals, beside, each = zip(*sums)
    return jnp.sum(jnp.stack(totals)), jnp.sum(jnp.stack(beside)), jnp.concatenate(each)


def deal_runs(runs: tuple[Segment, ...], parts: int) -> list[np.ndarray]:
    """By `deal_windows`, for each run of windows; from the longest windows to the shortest, which even out the rest."""
    loads = np.zeros(parts)
    return [deal_windows(run.count, parts, loads, run.first) for run in reversed(runs)][::-1]


def _sum_run(
    config: ModelConfig,
    sequence: Sequence,
    run: Segment,
    readout: Readout,
    rows: Any,
    split: SequenceSplit,
    dealt: np.ndarray,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sums over a run of windows of one static shape, or over those of them that are dealt to this device."""
    taken = jax.tree.map(lambda array: window_rows(config, array, run.first, run.count, run.together), rows)
    own, steps = sequence.own(config, run), jnp.asarray(run.windows)
    places = None if split.windows is None else split.windows.mine(dealt)
    if places is not None:
        own, steps, taken = _take(own, places), _take(steps, places), _take(taken, places, zero=True)
    branch = _read(config, run, readout, split)
    shared = sequence.reach(config, run)
    total, beside, each = sum_with_gradients((branch,), shared, own, sequence.fixed, (steps, taken))
    return total, beside, each if places is None else _put(each, places, run.count)


def _sum_sampled(
    config: ModelConfig,
    sequence: Sequence,
    readout: Readout,
    rows: Any,
    windows: jax.Array,
    split: SequenceSplit,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same over any windows: one loop runs through them; each takes the branch of the segment that it lies in."""
    count, places = windows.shape[0], None
    if split.windows is not None:
        places = split.windows.mine(deal_windows(count, split.window_parts, np.zeros(split.window_parts)))
        windows = _take(windows, places)
    firsts = jnp.asarray([segment.first for segment in sequence.segments], jnp.int32)
    which = jnp.sum(windows[:, None] >= firsts, axis=1, dtype=jnp.int32)
    every = Segment(0, (0,) * sequence.count, 0, 0)  # of it only which windows it has is read
    own = _take(sequence.own(config, every), windows)
    taken = _take(jax.tree.map(lambda array: window_rows(config, array, 0, sequence.count), rows), windows)
    if places is not None:
        taken = _masked(taken, places)
    branches = tuple(_read(config, run, readout, split) for run in (FIRST_WINDOW, *sequence.segments))
    total, beside, each = sum_with_gradients(branches, sequence.shared, own, sequence.fixed, (windows, taken), which)
    return total, beside, each if places is None else _put(each, places, count)


def _read(config: ModelConfig, run: Segment, readout: Readout, split: SequenceSplit) -> Branch:
    """A window and what becomes of it; where rows are split, of this device's rows of the window."""
    window = window_branch(config, run)

    def branch(shared: Shared, own: History | None, fixed: Fixed, step: tuple[Place, Any]) -> Any:
        place, rows = step
        if split.rows is None or shared.history is None:
            return readout(shared.readout, window(shared, own, fixed, place), rows)
        size, history, share = config.generation_window, shared.history, split.rows
        own = jax.tree.map(lambda array: history.part(array, place * size, size), history)
        whole = window(shared, own, fixed, place), rows
        padding = -size % share.parts
        hidden, rows = jax.tree.map(lambda array: share.take(_padded(array, padding)), whole)
        return readout(shared.readout, hidden, rows)

    return branch


def _padded(array: jax.Array, count: int) -> jax.Array:
    """[batch, rows, ...] with `count` rows of zeros after them."""
    return jnp.pad(array, ((0, 0), (0, count), *((0, 0),) * (array.ndim - 2)))


def _take(arrays: Any, places: jax.Array, zero: bool = False) -> Any:
    """Elements at `places` of arrays [count, ...]; for NO_WINDOW any, or zeros."""
    taken = jax.tree.map(lambda array: jnp.take(array, jnp.maximum(places, 0), axis=0), arrays)
    return _masked(taken, places) if zero else taken


def _masked(arrays: Any, places: jax.Array) -> Any:
    """Zeros where no window has taken its place."""

    def masked(array: jax.Array) -> jax.Array:
        return jnp.where((places >= 0).reshape(-1, *(1,) * (array.ndim - 1)), array, jnp.zeros_like(array))

    return jax.tree.map(masked, arrays)


def _put(values: jax.Array, places: jax.Array, count: int) -> jax.Array:
    """Values float32 [places] at their places, zeros at others': float32 [count]."""
    return jnp.zeros(count, values.dtype).at[jnp.where(places < 0, count, places)].add(values, mode="drop")
