"""The history C of one cached sequence, as `prefill` and `slide` pass it to the block.

For a million rows, neither C nor its projections fit into memory beside the cache. So C at the entrance of a block is
a function that computes one chunk of rows at a time: embeddings, or rows that the blocks before have restored. With
`config.causal_history` the keys of later blocks come from the cache alone: `decoding.causal` fills it before.
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
from tlinformer_jax.decoding.params import DecoderParams, embed, look_up_before
from tlinformer_jax.kernels.common import merge_softmaxes
from tlinformer_jax.kernels.key_value import KeyValue
from tlinformer_jax.models.attention import OutputAndLse, attend_parts, merge_parts, no_parts
from tlinformer_jax.models.cached_attention import TokenTable, attend_context, attend_history, write_rows, write_tokens
from tlinformer_jax.models.history import RestoreLayer, ZMask
from tlinformer_jax.models.key_rows import plus, tap_sum
from tlinformer_jax.models.layers import Dropout, Embedded, LayerParams, project, projections
from tlinformer_jax.models.rope import Rope, Rotations, rope_table, rotate
from tlinformer_jax.models.streams import Stream

# Block 0's projections, before rotation, depend only on the token. If the history has room for at least this many rows
# per token of the vocabulary, the whole vocabulary is projected once, and rows are looked up. With a token shift keys
# also depend on the token before, so every row is projected.
ROWS_PER_TOKEN = 4


@dataclasses.dataclass(frozen=True)
class SequenceRows:
    """The history of one sequence, its first `length` tokens; if rows are split, this device's rows."""

    params: DecoderParams
    config: ModelConfig
    cache: WindowedCache
    row: Int[Array, ""]
    length: Int[Array, ""]

    @property
    def chunk(self) -> int:
        """Number of rows processed at once."""
        return chunk_rows(self.cache.room)

    @property
    def held(self) -> Int[Array, ""]:
        """Number of history rows on this device."""
        return self.length if self.cache.split is None else self.cache.split.count(self.length)

    def whole(self) -> "SequenceRows":
        """Returns the same sequence as if this device had all rows; its cached arrays must not be read."""
        return dataclasses.replace(self, cache=dataclasses.replace(self.cache, split=None))

    def positions(self, start: Int[Array, ""], count: int | None = None) -> Int[Array, " count"]:
        """Returns positions of this device's `count` rows (default: a chunk) from row `start` on."""
        count, split = count or self.chunk, self.cache.split
        if split is not None:
            return split.positions(start, count)
        return start + jnp.arange(count, dtype=jnp.int32)

    def rope(self, start: Int[Array, ""], count: int | None = None) -> Rope:
        """Returns the rotations of these rows."""
        return rope_table(self.positions(start, count), self.config.head_dim, self.config.longest_wavelength)

    def rotations(self, start: Int[Array, ""], count: int | None = None) -> Rotations:
        """Returns the rotations of these rows, for `cached_attention`'s functions that write them."""
        return Rotations(self.positions(start, count), self.config.head_dim, self.config.longest_wavelength)

    def ids(self, start: Int[Array, ""], count: int | None = None) -> Int[Array, "1 count"]:
        """Returns the tokens of these rows."""
        count = count or self.chunk
        tokens, split = self.cache.tokens, self.cache.split
        if split is None:
            return jax.lax.dynamic_slice(tokens, (self.row, start), (1, count))
        ids = jax.lax.dynamic_slice(tokens, (self.row, start * split.parts), (1, count * split.parts))
        return split.take(ids)

    def embed(self, start: Int[Array, ""], count: int | None = None) -> Embedded:
        """Returns these rows of block 0's C, the embeddings."""
        ids = self.ids(start, count)
        if self.params.shift is None:
            return embed(self.params, ids)
        return embed(self.params, ids, self.cache.tokens_before(self.row, self.positions(start, count))[None])

    def observed(self, start: Int[Array, ""], count: Int[Array, ""], rope: Rope, parts: str) -> Stream:
        """Returns block 0's z: embeddings from row `start` on, `count` of them valid, projected to `parts`.

        `rope` contains the rotations of all rows of z; they are the same on every device.
        """
        width, before = len(rope.cos), None
        tokens = jax.lax.dynamic_slice(self.cache.tokens, (self.row, start), (1, width))
        if self.params.shift is not None and "k" in parts:  # a token shift changes keys only
            before = self.cache.tokens_before(self.row, start + jnp.arange(width, dtype=jnp.int32))[None]
        z = embed(self.params, tokens, before)
        return Stream.of(self.params.blocks[0].compress, z.rows, rope, parts, count, key_rows=z.key_rows)

    def keyed(
        self, layer: LayerParams, rows: Float[Array, "1 n D"], positions: Int[Array, " n"]
    ) -> Float[Array, "1 n D"] | None:
        """Returns the input of the keys of rows of C' at these positions; None if that is the rows.

        `layer` is the `compress` layer that reads C'.
        """
        return None if layer.taps is None else plus(rows, self.tap_sum(layer.taps, positions))

    def tap_sum(self, taps: Float[Array, "K D"], positions: Int[Array, " n"]) -> Float[Array, "1 n D"]:
        """Returns what key taps add to the input of the keys of rows of C' at these positions."""
        ids = [self.cache.tokens_before(self.row, positions, back)[None] for back in range(1, len(taps) + 1)]
        return tap_sum(taps, [look_up_before(self.params, each) for each in ids])


@dataclasses.dataclass(frozen=True)
class CachedHistory:
    """C at the entrance of a block, which `block.compress` reads and `block.restore` restores.

    Attributes:
      at: the sequence and its rows.
      layer: the block's `compress` layer.
      z, z_rope: rows h .. n - 1 of C with their queries (and with `config.causal_history` their keys and values), and
        their rotations; the same on every device.
      observed_start: h.
      rows: function from a row index to the chunk of C's rows from there on (this device's rows).
      queries: function from a row index and the chunk's rows to the chunk's queries.
      keys: caches of keys and values that are not filled yet, of this and later blocks; empty for TConstFormer.
      filled: caches that are filled, of this block and those before; empty for TConstFormer.
      key_rows: function like `queries` for the input of the chunk's keys; None, or returns None, if that is its rows.
    """

    at: SequenceRows
    layer: LayerParams
    z: Stream
    z_rope: Rope
    observed_start: Int[Array, ""]
    rows: Callable[[Array], Float[Array, "1 chunk D"]]
    queries: Callable[[Array, Array], Float[Array, "1 chunk heads d_h"]]
    keys: tuple[KeyValue, ...]
    filled: tuple[KeyValue, ...] = ()
    key_rows: Callable[[Array, Array], Float[Array, "1 chunk D"] | None] | None = None

    def read(self, query: Array, config: ModelConfig, dropout: Dropout | None, *readers: Stream) -> Array:
        """Returns attend(Q, Kc, Vc)."""
        return self._read_first(query, config, self.at.held)[0].astype(query.dtype)

    def read_before(self, query: Array, config: ModelConfig, dropout: Dropout | None, *readers: Stream) -> OutputAndLse:
        """Returns attention to the rows before the observation window, and its log-sum-exp; float32."""
        split = self.at.cache.split
        before = self.observed_start if split is None else split.count(self.observed_start)
        return self._read_first(query, config, before)

    def _read_first(self, query: Array, config: ModelConfig, held: Int[Array, ""]) -> OutputAndLse:
        """Returns attention to each device's first `held` rows; keys come from the cache, or are computed in chunks."""
        at, scale, backend = self.at, config.attention_scale, config.attention
        if self.filled:
            parts = attend_history(query, self.filled[-1], at.row, held, scale, at.chunk, backend)
        else:

            def body(start: Array, parts: tuple[Array, Array]) -> tuple[Array, Array]:
                rows = self.rows(start)
                keyed = self.key_rows and self.key_rows(start, rows)
                key, value = project(self.layer, rows, at.rope(start), "kv", keyed)
                return merge_parts(parts, attend_parts(query, key, value, held - start, scale, backend))

            parts = for_chunks(held, at.cache.room, body, no_parts(query))
        split = at.cache.split
        return parts if split is None else merge_softmaxes(*parts, split.axis)

    def restore(
        self, restore_rows: Callable[..., Array], layer: RestoreLayer, mask: ZMask, next_layer: LayerParams, parts: str
    ) -> "CachedHistory":
        """Returns C' for the next block, with its keys cached; rows are stored if that block restores C' again."""
        attend = functools.partial(attend_context, head_dim=self.at.config.head_dim)

        def rows(start: Array) -> Array:
            before = self.rows(start)
            return restore_rows(before, self.queries(start, before), layer, mask, attend=attend)

        def queries(start: Array, rows: Array) -> Array:
            return project(next_layer, rows, self.at.rope(start), "q")[0]

        def key_rows(start: Array, rows: Array) -> Array | None:
            return self.at.keyed(next_layer, rows, self.at.positions(start))

        z_rows = restore_rows(self.z.rows, self.z.Q, layer, mask, attend=attend)
        z = Stream.of(next_layer, z_rows, self.z_rope, "q")
        new = dataclasses.replace(self, layer=next_layer, z=z, rows=rows, queries=queries, key_rows=key_rows)
        return new._fill(keep_rows="q" in parts)

    def continued(self, z_rows: Float[Array, "1 width D"], next_layer: LayerParams) -> "CachedHistory":
        """Returns C' with `config.causal_history`, given z'; the cache has its keys already, see `decoding.causal`."""
        positions = self.observed_start + jnp.arange(z_rows.shape[1], dtype=jnp.int32)
        keyed = self.at.keyed(next_layer, z_rows, positions)
        z = Stream.of(next_layer, z_rows, self.z_rope, "qkv", self.z.length, key_rows=keyed)
        cached, *rest = self.keys
        return dataclasses.replace(self, layer=next_layer, z=z, keys=tuple(rest), filled=(*self.filled, cached))

    def _fill(self, keep_rows: bool) -> "CachedHistory":
        """Fills the cache of this block's keys; with `keep_rows`, also stores all rows of C in one array."""
        if not self.keys and not keep_rows:
            return self
        at, (keys, *rest), backend = self.at, self.keys or (None,), self.at.config.attention
        kept = jnp.zeros((1, at.cache.room, self.z.rows.shape[-1]), self.z.rows.dtype) if keep_rows else None

        def body(start: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            keys, kept = carry
            rows = self.rows(start)
            if kept is not None:
                kept = jax.lax.dynamic_update_slice(kept, rows, (0, start, 0))
            if keys is not None:
                keyed = self.key_rows and self.key_rows(start, rows)
                rotations = at.rotations(start)
                keys = write_rows(keys, at.row, start, self.layer, rows, rotations, backend, keyed, is_chunk=True)
            return keys, kept

        keys, kept = for_chunks(at.held, at.cache.room, body, (keys, kept))
        new = self if keys is None else dataclasses.replace(self, keys=tuple(rest), filled=(*self.filled, keys))
        if kept is None:
            return new
        shape = (1, at.chunk, kept.shape[-1])
        return dataclasses.replace(new, rows=lambda start: jax.lax.dynamic_slice(kept, (0, start, 0), shape))


def embedded_history(
    at: SequenceRows, z: Stream, z_rope: Rope, observed_start: Int[Array, ""], fill: bool
) -> CachedHistory:
    """Returns block 0's C, the embeddings; `fill` computes its keys, which the cache otherwise contains already.

    For `z`, `z_rope` and `observed_start` see `CachedHistory`.
    """
    params = at.params
    layer, vocabulary = params.blocks[0].compress, params.embedding[None]
    backend, caches = at.config.attention, at.cache.history
    first, later = caches[:1], caches[1:]

    def rows(start: Array) -> Array:
        return at.embed(start).rows

    def key_rows(start: Array, rows: Array) -> Any:
        return at.embed(start).key_rows

    def projected(start: Array, rows: Array) -> Array:
        return project(layer, rows, at.rope(start), "q")[0]

    def looked_up(start: Array, rows: Array) -> Array:
        return rotate(jnp.take(table, at.ids(start), axis=0, mode="clip"), at.rope(start))

    def write(start: Array, keys: KeyValue) -> KeyValue:
        return write_tokens(keys, at.row, start, token_table, at.rotations(start), at.ids(start)[0], backend)

    if params.shift is not None or at.cache.room < ROWS_PER_TOKEN * at.config.vocab_size:
        keyed = None if params.shift is None else key_rows
        if not fill:
            return CachedHistory(at, layer, z, z_rope, observed_start, rows, projected, later, first, keyed)
        empty = CachedHistory(at, layer, z, z_rope, observed_start, rows, projected, caches, (), keyed)
        return empty._fill(keep_rows=False)
    table = projections(layer, vocabulary, "q")[0, :, 0]  # [V, heads, d_h (padded)]
    if fill and first:
        token_table = TokenTable.of(layer, vocabulary, first[0], at.chunk, backend)
        first = tuple(for_chunks(at.held, at.cache.room, write, keys) for keys in first)
    return CachedHistory(at, layer, z, z_rope, observed_start, rows, looked_up, later, first)
