"""Histories of the later blocks with `model.causal_history`, in the cache of one sequence.

A window's rows of C' depend on that window and its z alone (`causal_history.next_rows`), so a history only grows: a
slide appends the window that becomes history, and `prefill` all windows before n. Both read the keys and values of z
and of the window from the cache of the block before, so that they compute the same rows, also from an int8 cache.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.history import SequenceRows
from tlinformer_jax.kernels.key_value import KeyValue
from tlinformer_jax.models.cached_attention import natural_rows, write_rows
from tlinformer_jax.models.causal_history import WINDOWS_TOGETHER, next_rows
from tlinformer_jax.models.layers import LayerParams, project
from tlinformer_jax.models.streams import Stream
from tlinformer_jax.models.windows import slice_rows


def fill_histories(at: SequenceRows, histories: tuple[KeyValue, ...]) -> tuple[KeyValue, ...]:
    """Fills the caches of blocks 1, 2, ... from that of block 0, for all windows before `at.length`."""
    size, room = at.config.generation_window, at.cache.capacity
    most = room // size
    if len(histories) == 1 or not most:
        return histories
    # Each window also reads its z.
    together = max(1, at.chunk // (size + at.config.observed_rows(room)))
    if not _neighbours(at.config):  # each z is a slice of its own, and many take long to compile
        together = min(together, WINDOWS_TOGETHER)

    def body(number: Array, histories: tuple[KeyValue, ...]) -> tuple[KeyValue, ...]:
        # The last group may begin earlier, so that it ends within the cache. Rows past the history have no meaning.
        return extend_histories(at, histories, jnp.minimum(number * together, most - together), together)

    windows = at.length // size
    return jax.lax.fori_loop(0, -(-windows // together), body, histories)


def extend_histories(
    at: SequenceRows, histories: tuple[KeyValue, ...], first: Int[Array, ""], count: int = 1
) -> tuple[KeyValue, ...]:
    """Writes windows first .. first + count - 1 to the caches of blocks 1, 2, ...

    All caches contain the rows before these windows; block 0's also contains theirs.
    """
    config, size = at.config, at.config.generation_window
    start, whole = first * size, at.whole()
    rows, rope = whole.embed(start, count * size).rows, whole.rope(start, count * size)
    filled = [histories[0]]
    for (block, next_block), history in zip(itertools.pairwise(at.params.blocks), histories[1:]):
        query = project(block.compress, rows, rope, "q")[0]
        z, key, value = _read_windows(at, filled[-1], first, count, query)
        own, query = (array.reshape(count, size, *array.shape[2:]) for array in (rows, query))
        following = next_rows(block.compress, config, z, Stream(own, Q=query, K=key, V=value))
        rows = following.reshape(rows.shape)
        filled.append(_write(at, history, start, next_block.compress, rows))
    return tuple(filled)


def _read_windows(
    at: SequenceRows, history: KeyValue, first: Int[Array, ""], count: int, query: Float[Array, "1 n heads d_h"]
) -> tuple[Stream, Float[Array, "count m heads d_h"], Float[Array, "count m heads d_h"]]:
    """Returns windows' z with keys and values, and the windows' own keys and values, from a block's cache.

    They have the dtype and the width of `query`.
    """
    config, size, room = at.config, at.config.generation_window, at.cache.capacity
    observed = np.array([config.observed_rows(window * size) for window in range(room // size)], np.int32)
    width = int(observed.max())
    # The rows of all windows and of their z.
    span = min(width + count * size, room)
    begin = jnp.clip(first * size - width, 0, room - span)
    block = _gather_rows(at, history, begin, span).widened(query.dtype)
    arrays = [natural_rows(array, query.shape[-1]) for array in (block.key, block.value)]
    # Window 0 has no z and reads the zeros before row 0. Slices of a short z can reach past the last row.
    padded = [jnp.pad(array, ((0, 0), (size, width), (0, 0), (0, 0))) for array in arrays]
    back = jnp.asarray(np.where(observed, observed, size))
    windows = first + jnp.arange(count, dtype=jnp.int32)
    starts = windows * size - begin
    z_starts, stride = starts + size - back[windows], size if _neighbours(config) else None
    z_key, z_value = (slice_rows(array, z_starts, width, count, stride) for array in padded)
    key, value = (slice_rows(array, starts, size, count, size) for array in arrays)
    return Stream(None, K=z_key, V=z_value, length=jnp.asarray(observed)[windows]), key, value


def _neighbours(config: ModelConfig) -> bool:
    """Returns whether each z is the window before, so that those of neighbouring windows are one slice."""
    return config.history_window == config.generation_window


def _gather_rows(at: SequenceRows, history: KeyValue, start: Array, count: int) -> KeyValue:
    """Returns rows start .. start + count - 1 of the sequence from a block's cache, on every device."""
    split = at.cache.split

    def some(array: Array) -> Array:
        own, axis = jax.lax.dynamic_slice_in_dim(array, at.row, 1), array.ndim - 1
        if split is None:
            rows = jax.lax.dynamic_slice_in_dim(own, start, count, axis)
        else:
            rows = split.gather(own, start, count, axis)
        # The layout of a cache: otherwise XLA might copy the whole cache to that of the rows.
        return with_layout_constraint(rows, Layout(tuple(range(rows.ndim))))

    return jax.tree.map(some, history)


def _write(
    at: SequenceRows, history: KeyValue, start: Array, layer: LayerParams, rows: Float[Array, "1 n D"]
) -> KeyValue:
    """Writes keys and values of rows start .. start + n - 1 of C' to a block's cache, each device its own rows."""
    split, first, count, backend = at.cache.split, start, rows.shape[1], at.config.attention
    if split is not None:
        # All devices write the same number of rows, see `windowed.slide`.
        count = -(-count // split.parts)
        first = jnp.minimum(split.count(start), at.cache.room - count)
        rows = jnp.take(rows, at.positions(first, count) - start, axis=1, mode="clip")
    positions, rotations = at.positions(first, count), at.rotations(first, count)
    keyed = at.keyed(layer, rows, positions)
    if split is None or at.config.generation_window % split.parts == 0:
        return write_rows(history, at.row, first, layer, rows, rotations, backend, keyed)
    # The first row may be one before `start`, which must stay as it is. A row past the last is not valid yet.
    zero = jnp.int32(0)
    new = jax.tree.map(lambda array: jnp.zeros((1, *array.shape[1:-1], count), array.dtype), history)
    new = write_rows(new, zero, zero, layer, rows, rotations, backend, keyed)

    def put(array: Array, new: Array) -> Array:
        begin = (at.row, *[zero] * (array.ndim - 2), first)
        old = jax.lax.dynamic_slice(array, begin, new.shape)
        return jax.lax.dynamic_update_slice(array, jnp.where(positions < start, old, new), begin)

    return jax.tree.map(put, history, new)
