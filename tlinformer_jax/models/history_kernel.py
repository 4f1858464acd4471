"""GPU kernels of a slide, written in Pallas for Triton: many rows into the cache, and a few queries over all of it.

Keys and values lie as [batch, heads, d_h, rows] (`models.cached_attention`), which is also the order in which the
matrix units want the keys.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from tlinformer_jax.models.decode_kernel import call_kernel

# Queries and rows that a program multiplies at once.
QUERY_TILE = 128
ROW_TILE = 64
# Programs to aim for: two for each of the 132 multiprocessors of an H100.
PROGRAMS = 264
LOG2_E = 1.4426950408889634


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    row: jax.Array,
    length: jax.Array,
    scale: float,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of a few queries to the cached rows of one sequence, split over the rows.

    Args:
      query: rotated, [queries, heads, width >= d_h]; features past d_h are padding.
      key: [batch, heads, d_h, rows]; value: the same.
      row: the sequence's place in the batch, int32 [].
      length: valid rows, int32 [].
      scale: of the scores.
      interpret: run on the CPU, for tests.

    Returns:
      float32 [queries, heads, d_h]; 0 where no row is valid.
    """
    queries, heads, _ = query.shape
    width, room = key.shape[2:]
    tiles = pl.cdiv(queries, QUERY_TILE)
    parts = max(1, min(PROGRAMS // (heads * tiles), room // (4 * ROW_TILE)))
    kernel = functools.partial(_attend_kernel, scale=scale * LOG2_E, queries=queries, width=width, parts=parts)
    shape = (parts, heads, queries)
    outputs = [
        jax.ShapeDtypeStruct((*shape, width), jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    ]
    place = jnp.stack([row, length]).astype(jnp.int32)
    sums, tops, totals = call_kernel(
        kernel,
        (tiles, heads, parts),
        outputs,
        [query, key, value, place],
        "attend_history",
        interpret,
        num_warps=4,
        num_stages=3,
    )
    factor = jnp.exp2(tops - jnp.max(tops, axis=0))
    total = jnp.sum(totals * factor, axis=0)
    merged = jnp.sum(sums * factor[..., None], axis=0) / jnp.where(total > 0, total, 1.0)[..., None]
    return jnp.swapaxes(merged, 0, 1)


def _attend_kernel(
    query_ref, key_ref, value_ref, place_ref, sums_ref, tops_ref, totals_ref, *, scale, queries, width, parts
) -> None:
    """One part of the rows, for a tile of the queries and one head."""
    from jax.experimental.pallas import triton

    tile, head, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    row, length = place_ref[0], place_ref[1]
    padded = max(16, pl.next_power_of_2(width))
    numbers = tile * QUERY_TILE + _iota(QUERY_TILE)
    features = _iota(padded)
    lanes = _iota(ROW_TILE)
    query = triton.load(
        query_ref.at[numbers[:, None], head, features[None, :]],
        mask=(numbers < queries)[:, None] & (features < width)[None, :],
        other=0.0,
    )
    query = (query.astype(jnp.float32) * scale).astype(query_ref.dtype)
    is_feature = (features < width)[:, None]

    def block(index, carry):
        top, total, sums = carry
        rows = index * ROW_TILE + lanes
        # Every row up to the cache's end may be read; what is not valid gets no weight.
        key = triton.load(key_ref.at[row, head, features[:, None], rows[None, :]], mask=is_feature, other=0.0)
        scores = _dot(query, key, 0)
        scores = jnp.where((rows < length)[None, :], scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        factor = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - new_top[:, None])
        value = triton.load(value_ref.at[row, head, features[:, None], rows[None, :]], mask=is_feature, other=0.0)
        read = _dot(weights.astype(value.dtype), value, 1)
        return new_top, total * factor + jnp.sum(weights, axis=1), sums * factor[:, None] + read

    blocks = pl.cdiv(length, ROW_TILE)
    each = pl.cdiv(blocks, parts)
    begin = part * each
    start = (
        # Finite, so that parts without a valid row merge to nothing.
        jnp.full((QUERY_TILE,), -1e30, jnp.float32),
        jnp.zeros((QUERY_TILE,), jnp.float32),
        jnp.zeros((QUERY_TILE, padded), jnp.float32),
    )
    top, total, sums = jax.lax.fori_loop(begin, jnp.minimum(begin + each, blocks), block, start)
    valid = numbers < queries
    triton.store(
        sums_ref.at[part, head, numbers[:, None], features[None, :]],
        sums,
        mask=valid[:, None] & (features < width)[None, :],
    )
    triton.store(tops_ref.at[part, head, numbers], top, mask=valid)
    triton.store(totals_ref.at[part, head, numbers], total, mask=valid)


def store(cache: jax.Array, rows: jax.Array, row: jax.Array, start: jax.Array, interpret: bool = False) -> jax.Array:
    """Writes rows [rows, heads, width >= d_h] of one sequence into a cache [batch, heads, d_h, room], in place.

    Args:
      cache: keys or values; it must have room for the rows.
      rows: as many as a multiple of ROW_TILE.
      row: the sequence's place in the batch, int32 [].
      start: where the first of them goes, int32 [].
      interpret: run on the CPU, for tests.
    """
    place = jnp.stack([row, start]).astype(jnp.int32)
    return call_kernel(
        functools.partial(_store_kernel, width=cache.shape[2]),
        (rows.shape[0] // ROW_TILE, rows.shape[1]),
        jax.ShapeDtypeStruct(cache.shape, cache.dtype),
        [cache, rows, place],
        "store_history",
        interpret,
        aliases={0: 0},
        num_warps=4,
        num_stages=1,
    )


def _store_kernel(_, rows_ref, place_ref, cache_ref, *, width: int) -> None:
    """A tile of the rows, for one head."""
    from jax.experimental.pallas import triton

    tile, head = pl.program_id(0), pl.program_id(1)
    features = _iota(pl.next_power_of_2(width))
    numbers = tile * ROW_TILE + _iota(ROW_TILE)
    is_feature = features < width
    block = triton.load(
        rows_ref.at[numbers[:, None], head, features[None, :]],
        mask=is_feature[None, :] & (numbers >= 0)[:, None],
        other=0.0,
    )
    to = place_ref[1] + numbers
    triton.store(
        cache_ref.at[place_ref[0], head, features[:, None], to[None, :]],
        jnp.transpose(block),
        mask=is_feature[:, None] & (to >= 0)[None, :],
    )


def _iota(size: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (size,), 0)


def _dot(left: jax.Array, right: jax.Array, contracted: int) -> jax.Array:
    """Product of left [m, k] and right over right's axis `contracted`, accumulated in float32."""
    axes = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)
