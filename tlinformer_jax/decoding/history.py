"""C of one cached sequence, as `prefill` and `slide` give it to the block: in chunks of rows, its keys in a cache.

Of a million rows neither C nor their projections fit beside the cache. So C at the entrance of a block is a function
that makes a chunk of its rows when they are wanted: the embeddings, or what the blocks before have restored of them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import WindowedCache, chunk_rows, for_chunks
from tlinformer_jax.decoding.params import DecoderParams, embed
from tlinformer_jax.decoding.vocabulary import VocabularyProjections, project_vocabulary
from tlinformer_jax.kernels.common import merge_softmaxes
from tlinformer_jax.models.attention import attend_parts, merge_parts, no_parts
from tlinformer_jax.models.cached_attention import (
    KeyValue,
    attend_context,
    attend_history,
    for_writing,
    write_rows,
    write_tokens,
)
from tlinformer_jax.models.dropout import Dropout
from tlinformer_jax.models.layers import LayerParams, project
from tlinformer_jax.models.rope import Rope, rope_table
from tlinformer_jax.models.streams import Stream
from tlinformer_jax.parallel.batch_split import SplitRows


@dataclasses.dataclass(frozen=True)
class SequenceRows:
    """Which rows of a sequence's history are worked on; of those split over devices, which lie on this one.

    Attributes:
      head_dim: d_h.
      row: the sequence's index in the batch, int32 [].
      tokens: ids of the batch, int32 [batch, capacity or more].
      length: n, rows of history, int32 [].
      room: rows that a device has room for.
      split: how rows are split over devices; None where this device has all of them.
    """

    head_dim: int
    row: Int[Array, ""]
    tokens: Int[Array, "batch capacity"]
    length: Int[Array, ""]
    room: int
    split: SplitRows | None

    @property
    def chunk(self) -> int:
        """Rows that are worked on at once."""
        return chunk_rows(self.room)

    @property
    def held(self) -> Int[Array, ""]:
        """Rows of history that this device has."""
        return self.length if self.split is None else self.split.count(self.length)

    def rope(self, start: Array) -> Rope:
        """Rotations of this device's chunk of rows from `start` on."""
        if self.split is None:
            return rope_of(self.head_dim, start, self.chunk)
        return rope_table(self.split.positions(start, self.chunk), self.head_dim)

    def ids(self, start: Array) -> Int[Array, "1 chunk"]:
        """Tokens of the same rows."""
        if self.split is None:
            return jax.lax.dynamic_slice(self.tokens, (self.row, start), (1, self.chunk))
        parts = self.split.parts
        ids = jax.lax.dynamic_slice(self.tokens, (self.row, start * parts), (1, self.chunk * parts))
        return self.split.take(ids)


@dataclasses.dataclass(frozen=True)
class CachedHistory:
    """C at the entrance of a block; what `block.compress` reads and `block.restore` restores.

    Attributes:
      at: which rows.
      layer: the block's `compress`.
      z: rows h .. n - 1 of C with their queries, on every device.
      rows: of C, this device's chunk from a row on, [1, chunk, D].
      queries: of the same rows, given them, [1, chunk, heads, d_h].
      keys: caches of keys and values of this block and those that follow; empty where none are kept.
      filled: the caches of this block and those before it.
    """

    at: SequenceRows
    layer: LayerParams
    z: Stream
    z_rope: Rope
    config: ModelConfig
    rows: Callable[[Array], Float[Array, "1 chunk D"]]
    queries: Callable[[Array, Array], Float[Array, "1 chunk heads d_h"]]
    keys: tuple[KeyValue, ...]
    filled: tuple[KeyValue, ...] = ()

    def read(self, query: Array, config: ModelConfig, dropout: Dropout | None) -> Array:
        """attend(Q, Kc, Vc): keys come from the cache, or are made chunk by chunk where none are kept."""
        at, scale, backend = self.at, config.attention_scale, config.attention
        if self.filled:
            parts = attend_history(query, self.filled[-1], at.row, at.held, scale, at.chunk, backend)
        else:

            def body(start: Array, parts: tuple[Array, Array]) -> tuple[Array, Array]:
                key, value = project(self.layer, self.rows(start), at.rope(start), "kv")
                return merge_parts(parts, attend_parts(query, key, value, at.held - start, scale, backend))

            parts = for_chunks(at.held, at.room, body, no_parts(query))
        output = parts[0] if at.split is None else merge_softmaxes(*parts, at.split.axis)[0]
        return output.astype(query.dtype)

    def restore(
        self, restore_rows: Callable[..., Array], shared: Any, fixed: Any, next_layer: LayerParams, parts: str
    ) -> "CachedHistory":
        """C' of the next block, whose keys are cached; its rows are kept if it restores them in its turn."""
        restore_rows = functools.partial(
            restore_rows,
            shared=shared,
            fixed=fixed,
            attend=functools.partial(attend_context, head_dim=self.config.head_dim),
        )

        def rows(start: Array) -> Array:
            before = self.rows(start)
            return restore_rows(before, self.queries(start, before))

        def queries(start: Array, rows: Array) -> Array:
            return project(next_layer, rows, self.at.rope(start), "q")[0]

        z = Stream.of(next_layer, restore_rows(self.z.rows, self.z.Q), self.z_rope, "q")
        new = dataclasses.replace(self, layer=next_layer, z=z, rows=rows, queries=queries)
        return new._made(keep_rows="q" in parts)

    def _made(self, keep_rows: bool) -> "CachedHistory":
        """With the block's keys in their cache, and with all rows of C in one array, if so asked."""
        if not self.keys and not keep_rows:
            return self
        at, (keys, *rest) = self.at, self.keys or (None,)
        kept = jnp.zeros((1, at.room, self.z.rows.shape[-1]), self.z.rows.dtype) if keep_rows else None
        writer = for_writing(self.layer, at.chunk, self.config.attention)

        def body(start: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            keys, kept = carry
            rows = self.rows(start)
            if kept is not None:
                kept = jax.lax.dynamic_update_slice(kept, rows, (0, start, 0))
            if keys is not None:
                keys = write_rows(keys, at.row, start, writer, rows, at.rope(start), self.config.attention)
            return keys, kept

        keys, kept = for_chunks(at.held, at.room, body, (keys, kept))
        new = self if keys is None else dataclasses.replace(self, keys=tuple(rest), filled=(*self.filled, keys))
        if kept is None:
            return new
        shape = (1, at.chunk, kept.shape[-1])
        return dataclasses.replace(new, rows=lambda start: jax.lax.dynamic_slice(kept, (0, start, 0), shape))


def embedded_history(
    params: DecoderParams,
    config: ModelConfig,
    cache: WindowedCache,
    at: SequenceRows,
    z_rows: Float[Array, "1 width D"],
    z_rope: Rope,
    fill: bool,
) -> CachedHistory:
    """C of block 0, the embeddings; with `fill` its keys are made, else the cache has them."""
    layer, table = params.blocks[0].compress, project_vocabulary(params, config, cache.room, at.chunk)

    def rows(start: Array) -> Array:
        return embed(params, at.ids(start))

    def queries(start: Array, rows: Array) -> Array:
        if table is None:
            return project(layer, rows, at.rope(start), "q")[0]
        return table.rotated_query(at.ids(start), at.rope(start))

    z = Stream.of(layer, z_rows, z_rope, "q")
    history = CachedHistory(at, layer, z, z_rope, config, rows, queries, cache.history)
    if not cache.history:
        return history
    if fill and table is None:
        return history._made(keep_rows=False)
    first = _looked_up(config, cache.history[0], at, table) if fill and table is not None else cache.history[0]
    return dataclasses.replace(history, keys=cache.history[1:], filled=(first,))


def _looked_up(config: ModelConfig, keys: KeyValue, at: SequenceRows, table: VocabularyProjections) -> KeyValue:
    """The cache of block 0's keys and values, filled from those of the vocabulary."""

    def body(start: Array, keys: KeyValue) -> KeyValue:
        ids, rope = at.ids(start)[0], at.rope(start)
        return write_tokens(keys, at.row, start, table.key_value, ids, rope, config.attention)

    return for_chunks(at.held, at.room, body, keys)


def appended(
    config: ModelConfig, cache: WindowedCache, row: Array, before: Array
) -> tuple[Array, Int[Array, "1 rows"], Rope]:
    """The rows that a slide after `before` tokens of history appends: where they begin, tokens, rotations."""
    size, split, head_dim = config.generation_window, cache.split, config.head_dim
    if split is None:
        return before, jax.lax.dynamic_slice(cache.tokens, (row, before), (1, size)), rope_of(head_dim, before, size)
    # As many on every device. Some have one less to append: it writes again its last old row, or one more that is not
    # yet valid and is written again by the next slide.
    count = -(-size // split.parts)
    start = jnp.minimum(split.count(before), cache.room - count)
    positions = split.positions(start, count)
    return start, cache.tokens[row, positions][None], rope_table(positions, head_dim)


def rope_of(head_dim: int, start: Array, length: int) -> Rope:
    """Rotations of rows start .. start + length - 1 of the sequence."""
    return rope_table(start + jnp.arange(length, dtype=jnp.int32), head_dim)
