"""Attention of one new row per sequence to cached keys and values: what a generated token costs.

Cached keys and values lie as [batch, heads, d_h, rows]: rows are contiguous, so that a pass over them streams memory
on a GPU, and pads nothing on a TPU, whose lanes a last dimension of 36 features would fill to 128. How many rows are
valid differs between the sequences of a batch and is known at run time only.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from tlinformer_jax.kernels import history as history_kernel
from tlinformer_jax.kernels.common import available, merge_softmaxes
from tlinformer_jax.models.attention import attend, attend_parts, merge_parts, no_parts
from tlinformer_jax.models.layers import LayerParams, project, unbiased_projections
from tlinformer_jax.models.rope import Rope, rotate
from tlinformer_jax.parallel.batch_split import SplitRows


@flax.struct.dataclass
class KeyValue:
    """Cached keys (rotated) and values, each [..., batch, heads, d_h, rows]; leading axes count layers."""

    key: jax.Array
    value: jax.Array

    @property
    def rows(self) -> int:
        """Rows there is room for."""
        return self.key.shape[-1]


@flax.struct.dataclass
class CachedRows:
    """The first `length` rows of a cache, for one softmax.

    Attributes:
      cache: keys and values [batch, heads, d_h, rows], or [layers, batch, heads, d_h, rows].
      length: valid rows of each sequence, int32 [batch].
      layer: which of the layers (static); None for a cache without that axis.
      split: how the rows are split over devices, each of which has only its own here, inside `jax.shard_map`
        (static); None where a device has all of them.
    """

    cache: KeyValue
    length: jax.Array
    layer: int | None = flax.struct.field(pytree_node=False, default=None)
    split: SplitRows | None = flax.struct.field(pytree_node=False, default=None)

    def arrays(self) -> KeyValue:
        """Keys and values of the layer, [batch, heads, d_h, rows]."""
        return self.cache if self.layer is None else jax.tree.map(lambda array: array[self.layer], self.cache)

    def merged(self, output: jax.Array, lse: jax.Array) -> jax.Array:
        """What the softmax over the rows of all devices gives, float32 [batch, heads, d_h], from that over these and
        its log-sum-exp [batch, heads]."""
        if self.split is None:
            return output
        # By one collective: for the few queries of a token its latency costs more than bytes in the number of devices.
        both = jax.lax.all_gather(jnp.concatenate([output, lse[..., None]], axis=-1), self.split.axis)
        return merge_softmaxes(both[..., :-1], both[..., -1], axis=0)[0]


def attend_cached(
    query: jax.Array, own: KeyValue, past: CachedRows, context: CachedRows | None, scale: float
) -> jax.Array:
    """Exact attention of one new row per sequence, by two softmaxes whose results are added; by plain products.

    Args:
      query: [batch, heads, d_h], rotated.
      own: key and value of the new row itself, each [batch, heads, d_h].
      past: rows before it that share a softmax with its own key: its generation window's, or a baseline's cache.
      context: rows with a softmax of their own: history or compressed context; where none are valid they add 0.
      scale: of the scores.

    Returns:
      [batch, heads, d_h] in query's dtype.
    """
    output, _ = _softmax_sum(query, past, own, scale)
    if context is not None:
        output = output + context.merged(*_softmax_sum(query, context, None, scale))
    return output.astype(query.dtype)


def lane_rows(rows: jax.Array, head_dim: int) -> jax.Array:
    """Keys or values of many rows [..., rows, heads, width >= d_h] as a cache keeps them: [..., heads, d_h, rows].

    The layout is pinned: left free, XLA gives the whole cache the layout of what is written to it, and copies
    the cache into it and back.
    """
    moved = jnp.moveaxis(rows[..., :head_dim], -3, -1)
    return with_layout_constraint(moved, Layout(tuple(range(moved.ndim))))


def for_writing(layer: LayerParams, rows: int, backend: str) -> LayerParams:
    """A layer as `write_rows` takes it for so many rows at a time; to be called outside of loops.

    Args:
      layer: from `prepare_layers`.
      rows: that each call will write.
      backend: of the attention; 'xla' takes plain operations everywhere.
    """
    head_dim = layer.out_kernel.shape[-1] // layer.out_kernel.shape[0]  # D / heads; the kernels' heads are padded
    if not _stores_by_kernel(layer.qkv_kernel.dtype, head_dim, rows, backend):
        return layer
    kernel, bias = (history_kernel.halves_apart(array, head_dim) for array in (layer.qkv_kernel, layer.qkv_bias))
    return dataclasses.replace(layer, qkv_kernel=kernel, qkv_bias=bias)


def _stores_by_kernel(dtype: Any, head_dim: int, rows: int, backend: str) -> bool:
    return use_kernels(dtype, head_dim, backend) and rows % history_kernel.STORE_TILE == 0


def write_rows(
    cache: KeyValue, row: jax.Array, start: jax.Array, layer: LayerParams, rows: jax.Array, rope: Rope, backend: str
) -> KeyValue:
    """Projects many rows of one sequence to keys and values and writes these, in place where the cache is donated.

    Args:
      cache: [batch, heads, d_h, room].
      row: the sequence's place in the batch, int32 [].
      start: where the first row goes, int32 [].
      layer: whose keys and values, from `for_writing`.
      rows: of the residual stream, [1, rows, D].
      rope: rotations of the rows.
      backend: as `for_writing` had it.
    """
    if _stores_by_kernel(cache.key.dtype, cache.key.shape[2], rows.shape[1], backend):
        projected, bias = unbiased_projections(layer, rows, "kv")
        return KeyValue(*history_kernel.store(cache.key, cache.value, projected[0], bias, rope, row, start))

    return _write_plainly(cache, row, start, *project(layer, rows, rope, "kv"))


def write_tokens(
    cache: KeyValue, row: jax.Array, start: jax.Array, table: jax.Array, tokens: jax.Array, rope: Rope, backend: str
) -> KeyValue:
    """`write_rows` of keys and values that depend on the token alone, looked up.

    Args:
      cache: [batch, heads, d_h, room].
      row: the sequence's place in the batch, int32 [].
      start: where the first row goes, int32 [].
      table: keys and values of the whole vocabulary by a layer from `for_writing`, not rotated,
        [V, 2, heads, d_h or more].
      tokens: int32 [rows].
      rope: rotations of the rows.
      backend: as `for_writing` had it.
    """
    if _stores_by_kernel(cache.key.dtype, cache.key.shape[2], tokens.size, backend):
        no_bias = jnp.zeros(table.shape[1:], table.dtype)
        stored = history_kernel.store(cache.key, cache.value, table, no_bias, rope, row, start, tokens)
        return KeyValue(*stored)
    key, value = jnp.moveaxis(jnp.take(table, tokens, axis=0, mode="clip")[None], 2, 0)
    return _write_plainly(cache, row, start, rotate(key, rope), value)


def _write_plainly(cache: KeyValue, row: jax.Array, start: jax.Array, key: jax.Array, value: jax.Array) -> KeyValue:
    """Writes keys and values [1, rows, heads, d_h or more]."""

    def write(array: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(array, lane_rows(new, array.shape[2]), (row, 0, 0, start))

    return KeyValue(write(cache.key, key), write(cache.value, value))


def attend_history(
    query: jax.Array, cache: KeyValue, row: jax.Array, length: jax.Array, scale: float, chunk: int, backend: str
) -> tuple[jax.Array, jax.Array]:
    """Attention of a few queries to all cached rows of one sequence.

    Args:
      query: rotated, [1, queries, heads, d_h or more].
      cache: [batch, heads, d_h, room].
      row: the sequence's place in the batch, int32 [].
      length: valid rows, int32 [].
      scale: of the scores.
      chunk: rows to take at once where no kernel reads the cache as it lies; it divides the room.
      backend: of the attention.

    Returns:
      float32 [1, queries, heads, as wide as the queries], 0 where no row is valid; and the log-sum-exp of the scores,
      float32 [1, queries, heads].
    """
    width = query.shape[-1]
    if use_kernels(query.dtype, cache.key.shape[2], backend):
        read, lse = history_kernel.attend(query[0], cache.key, cache.value, row, length, scale)
        return jnp.pad(read[None], [(0, 0)] * 3 + [(0, width - read.shape[-1])]), lse[None]
    shape = (1, *cache.key.shape[1:3], chunk)

    def body(number: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        start = number * chunk
        parts = (jax.lax.dynamic_slice(part, (row, 0, 0, start), shape) for part in (cache.key, cache.value))
        key, value = (_natural_rows(part, width) for part in parts)
        return merge_parts(carry, attend_parts(query, key, value, length - start, scale, backend))

    return jax.lax.fori_loop(0, -(-length // chunk), body, no_parts(query))


def attend_context(
    query: jax.Array, key: jax.Array, value: jax.Array, *, head_dim: int, key_length: jax.Array, **options: Any
) -> jax.Array:
    """`attend` of many queries to the few rows of a compressed context; not differentiable, and without dropout.

    Args:
      query: [1, queries, heads, d_h or more].
      key: [1, rows, heads, d_h or more]; value: the same.
      head_dim: d_h.
      key_length: valid rows, int32 [].
      options: as `attend` takes them.

    Returns:
      as `query`; 0 where no row is valid.
    """
    if use_kernels(query.dtype, head_dim, options["backend"]):
        padding = ((0, 0), (0, -key.shape[1] % history_kernel.ROW_TILE), (0, 0), (0, 0))
        key, value = (lane_rows(jnp.pad(array, padding), head_dim)[0] for array in (key, value))
        return history_kernel.attend_few(query[0], key, value, key_length, options["scale"])[None]
    return attend(query, key, value, key_length=key_length, **options)


def use_kernels(dtype: Any, head_dim: int, backend: str) -> bool:
    """Whether the GPU kernels of `kernels.history` run here, are wanted, and take heads of this dtype and width."""
    takes = dtype in (jnp.bfloat16, jnp.float16) and head_dim <= history_kernel.MOST_WIDTH
    return takes and backend != "xla" and available("history")


def _natural_rows(rows: jax.Array, width: int) -> jax.Array:
    """Cached keys or values [..., heads, d_h, rows] as attention takes many: [..., rows, heads, width], zero-padded."""
    moved = jnp.moveaxis(rows, -1, -3)
    return jnp.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, width - moved.shape[-1])])


def write_row(cache: KeyValue, own: KeyValue, row: jax.Array, active: jax.Array) -> KeyValue:
    """Writes one new row per active sequence into every layer's cache, in place where the cache is donated.

    Args:
      cache: [layers, batch, heads, d_h, rows].
      own: new keys and values, each [layers, batch, heads, d_h].
      row: where, int32 [batch].
      active: bool [batch]; of the others nothing changes.
    """

    def write_one(array: jax.Array, new: jax.Array) -> jax.Array:
        at = (0, 0, 0, 0, row[0])
        old = jax.lax.dynamic_slice(array, at, (*array.shape[:4], 1))
        return jax.lax.dynamic_update_slice(array, jnp.where(active[0], new[..., None], old), at)

    def write_all(array: jax.Array, new: jax.Array) -> jax.Array:
        # Rows past the end are dropped. The indexed axes come first in what `set` takes.
        at = jnp.where(active, row, array.shape[-1])
        return array.at[:, jnp.arange(at.size), :, :, at].set(jnp.moveaxis(new, 1, 0), mode="drop")

    return jax.tree.map(write_one if row.size == 1 else write_all, cache, own)


def _softmax_sum(
    query: jax.Array, source: CachedRows, own: KeyValue | None, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Softmax attention by plain products, float32 [batch, heads, d_h], and its log-sum-exp [batch, heads]; 0 and -inf
    where nothing is valid."""
    cache = source.arrays()
    scores = jnp.einsum("bhd,bhdk->bhk", query, cache.key, preferred_element_type=jnp.float32) * scale
    valid = jnp.arange(cache.rows) < source.length[:, None, None]
    scores = jnp.where(valid, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    if own is not None:
        wide = query.astype(jnp.float32) * own.key.astype(jnp.float32)
        own_score = jnp.sum(wide, axis=-1, keepdims=True) * scale
        top = jnp.maximum(top, own_score)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    output = jnp.einsum(
        "bhk,bhdk->bhd", weights.astype(cache.value.dtype), cache.value, preferred_element_type=jnp.float32
    )
    if own is not None:
        own_weight = jnp.exp(own_score - top)
        total = total + own_weight
        output = output + own_weight * own.value.astype(jnp.float32)
    safe = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)
    return output / safe, lse[..., 0]
