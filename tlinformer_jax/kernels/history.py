"""GPU kernels with which prefill and slide read, in Pallas for Triton.

`attend` reads the whole cache for a few queries, and `attend_few` reads a compressed context for many queries. The
plain versions are in `models.cached_attention`: `attend_history` and `attend_context` without kernels. Gain at a
million tokens, measured before slide and prefill became faster: without `attend` a slide takes 32% longer and a prefill
31%; without `attend_few` 3.3% and 5.4%.

Keys and values are [batch, heads, d_h, rows] (`models.cached_attention`); the matrix units need this order of the keys,
too. With an int8 cache `attend` reads integers.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from tlinformer_jax.kernels.common import (
    LEAST_PIECE,
    LOG2_E,
    call_kernel,
    dot,
    feature_pieces,
    iota,
    masked_load,
    masked_store,
    merge_softmaxes,
    powers,
)
from tlinformer_jax.kernels.key_value import KeyValue, value_dtype

# Queries and rows that a program of `attend` multiplies at once, its warps, and its pipeline stages.
QUERY_TILE = 64
ROW_TILE = 64
WARPS = 4
STAGES = 3
# A program of `attend_few` that can load all rows at once, at most MOST_ROWS_ONCE in heads of at most MOST_WIDTH_ONCE
# features, does so for up to QUERY_TILES tiles of queries; otherwise it computes one tile.
QUERY_TILES = 8
MOST_ROWS_ONCE = 256
MOST_WIDTH_ONCE = 48
# Short texts get fewer tiles a program, so that there are at least this many programs; measured at a million tokens.
LEAST_PROGRAMS = 768
# Target number of programs: eight for each of the 132 multiprocessors of an H100.
PROGRAMS = 1056
# With these tiles wider heads would not fit into a multiprocessor's shared memory.
MOST_WIDTH = 128


def attend(
    query: Float[Array, "queries heads width"],
    cache: KeyValue,
    row: Array,
    length: Array,
    scale: float,
    interpret: bool = False,
) -> tuple[Float[Array, "queries heads d_h"], Float[Array, "queries heads"]]:
    """Computes softmax attention of a few rotated queries to the first `length` cached rows of sequence `row`.

    The work is split over the rows. Features of the queries past d_h are padding.

    Returns:
      the output, float32, and the log-sum-exp of the scaled scores; 0 and -inf if no row is valid.
    """
    queries, heads, _ = query.shape
    width, room = cache.key.shape[2:]
    tiles = pl.cdiv(queries, QUERY_TILE)
    parts = max(1, min(PROGRAMS // (heads * tiles), room // (4 * ROW_TILE)))
    sizes = {"queries": queries, "width": width, "parts": parts}
    kernel = functools.partial(_attend_kernel, scale=scale * LOG2_E, interpret=interpret, **sizes)
    shape = (parts, heads, queries)
    outputs = [
        jax.ShapeDtypeStruct((*shape, width), jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.float32),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    ]
    row_and_length = jnp.stack([row, length]).astype(jnp.int32)
    sums, tops, totals = call_kernel(
        kernel,
        (tiles, heads, parts),
        outputs,
        [query, cache, row_and_length],
        "attend_history",
        interpret,
        num_warps=WARPS,
        num_stages=STAGES,
    )
    # A part without rows gets -inf: the rounding errors of its finite top, -1e30, would exceed the range of exp.
    tops = jnp.where(totals > 0, tops / LOG2_E, -jnp.inf)
    merged, lse = merge_softmaxes(sums, tops, 0, totals)
    return jnp.swapaxes(merged, 0, 1), jnp.swapaxes(lse, 0, 1)


def _attend_kernel(
    query_ref, cache, row_and_length_ref, sums_ref, tops_ref, totals_ref, *, scale, queries, width, parts, interpret
) -> None:
    """Computes one part of the rows for a tile of queries and one head; scaled scores are to base 2."""
    tile, head, part = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    numbers = tile * QUERY_TILE + iota(QUERY_TILE)
    pieces = feature_pieces(width, LEAST_PIECE)
    query = _load_queries(query_ref, numbers, head, queries, width)
    length = row_and_length_ref[1]
    each = pl.cdiv(pl.cdiv(length, ROW_TILE), parts)
    begin = part * each
    blocks = (begin, begin + each)
    top, total, sums = _stream(query, cache, (row_and_length_ref[0], head), length, blocks, width, scale, interpret)
    is_query = numbers < queries
    for (start, size), values in zip(pieces, sums):
        features = start + iota(size)
        mask = is_query[:, None] & (features < width)[None, :]
        masked_store(sums_ref.at[part, head, numbers[:, None], features[None, :]], values, mask)
    masked_store(tops_ref.at[part, head, numbers], top * scale, is_query)
    masked_store(totals_ref.at[part, head, numbers], total, is_query)


def attend_few(
    query: Float[Array, "queries heads width"],
    key: Float[Array, "heads d_h rows"],
    value: Float[Array, "heads d_h rows"],
    length: Array,
    scale: float,
    interpret: bool = False,
) -> Float[Array, "queries heads width"]:
    """Computes softmax attention of many queries to a few rows, as from the history to the compressed context.

    The number of rows is a multiple of ROW_TILE; the first `length` rows are valid, and the result is 0 if none is.
    Features past d_h are padding, and 0 in the result.
    """
    (queries, heads, _), (_, width, rows) = query.shape, key.shape
    once = rows <= MOST_ROWS_ONCE and width <= MOST_WIDTH_ONCE
    tiles = min(QUERY_TILES, max(1, pl.cdiv(queries, QUERY_TILE) * heads // LEAST_PROGRAMS)) if once else 1
    sizes = {"queries": queries, "width": width, "tiles": tiles, "once": once}
    return call_kernel(
        functools.partial(_attend_few_kernel, scale=scale * LOG2_E, interpret=interpret, **sizes),
        (pl.cdiv(queries, tiles * QUERY_TILE), heads),
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        [query, KeyValue(key[None], value[None]), length.astype(jnp.int32)[None]],
        "attend_context",
        interpret,
        num_warps=WARPS,
        num_stages=STAGES,
    )


def _attend_few_kernel(
    query_ref, cache, length_ref, output_ref, *, scale, queries, width, tiles, once, interpret
) -> None:
    """Computes all rows for several tiles of queries and one head; few narrow rows are loaded once for all tiles."""
    first, head, length = pl.program_id(0) * tiles, pl.program_id(1), length_ref[0]
    rows, pieces = cache.key.shape[3], feature_pieces(width, LEAST_PIECE)
    loaded = _load_rows(cache, head, width) if once else None

    def tile(number: Array, _: None, masked: bool) -> None:
        numbers = (first + number) * QUERY_TILE + iota(QUERY_TILE)
        query = _load_queries(query_ref, numbers, head, queries, width)
        if loaded is None:
            blocks = (0, pl.cdiv(length, ROW_TILE))
            _, total, sums = _stream(query, cache, (0, head), length, blocks, width, scale, interpret)
        else:
            total, sums = _read(query, loaded, length if masked else None, width, scale, interpret)
        inverse = (1.0 / jnp.where(total > 0, total, 1.0))[:, None]
        for (start, size), values in zip(pieces, sums):
            features = start + iota(size)
            mask = (numbers < queries)[:, None] & (features < output_ref.shape[2])[None, :]
            values = values * inverse
            if start + size > width:
                values = jnp.where((features < width)[None, :], values, 0.0)
            target = output_ref.at[numbers[:, None], head, features[None, :]]
            masked_store(target, values.astype(output_ref.dtype), mask)

    if not once:
        tile(jnp.int32(0), None, masked=True)
        return
    # Almost always all rows are valid, and none is masked.
    full = jnp.minimum(length // pl.next_power_of_2(rows), 1) * tiles
    jax.lax.fori_loop(0, full, functools.partial(tile, masked=False), None)
    jax.lax.fori_loop(full, tiles, functools.partial(tile, masked=True), None)


def _load_rows(cache: KeyValue, head: Array, width: int) -> tuple[list[Array], list[Array]]:
    """Loads all keys and values of a head in pieces [size, rows or the next power of 2]; the values' padding is 1."""
    rows = iota(pl.next_power_of_2(cache.key.shape[3]))

    def load(ref, other: float) -> list[Array]:
        loaded = []
        for start, size in feature_pieces(width, LEAST_PIECE):
            features = start + iota(size)
            mask = (features < width)[:, None] & (rows < cache.key.shape[3])[None, :]
            loaded.append(masked_load(ref.at[0, head, features[:, None], rows[None, :]], mask, other))
        return loaded

    return load(cache.key, 0.0), load(cache.value, 1.0)


def _read(query, loaded, length, width: int, scale: float, interpret: bool):
    """Reads rows from `_load_rows` for a tile of queries; `length` rows are valid, or all if None.

    Returns:
      each query's sum of weights, float32 [QUERY_TILE], and its weighted values in pieces [QUERY_TILE, size].
    """
    keys, values = loaded
    scores = jnp.zeros((QUERY_TILE, keys[0].shape[1]), jnp.float32)
    for piece, key in zip(query, keys):
        scores += dot(piece, key, 0)
    if length is not None:
        scores = jnp.where((iota(scores.shape[1]) < length)[None, :], scores, -jnp.inf)
    top = jnp.maximum(jnp.max(scores, axis=1), -1e30)
    weights = powers(scores, top * scale, scale, interpret)
    shares = weights.astype(values[0].dtype)
    sums = [dot(shares, value, 1) for value in values]
    start, size = feature_pieces(width, LEAST_PIECE)[-1]
    if start + size == width:
        return jnp.sum(weights, axis=1), sums
    # The first padded feature of every value is 1, so the matrix units have added up the weights.
    return jnp.sum(jnp.where((start + iota(size) == width)[None, :], sums[-1], 0.0), axis=1), sums


def _load_queries(ref, numbers: Array, head: Array, queries: int, width: int) -> list[Array]:
    """Loads the queries `numbers` of one head in pieces [QUERY_TILE, size]; 0 past the last query and the width."""
    loaded = []
    for start, size in feature_pieces(width, LEAST_PIECE):
        features = start + iota(size)
        mask = (numbers < queries)[:, None] & (features < width)[None, :]
        loaded.append(masked_load(ref.at[numbers[:, None], head, features[None, :]], mask))
    return loaded


def _stream(query, cache, leading, length, blocks, width: int, scale: float, interpret: bool):
    """Reads blocks[0] .. blocks[1] - 1 of ROW_TILE rows, of which `length` are valid, for a tile of queries.

    `leading` is (sequence, head), the first indices of the rows in the cache.

    Returns:
      each query's largest score before scaling and its sum of weights, float32 [QUERY_TILE], and its weighted values in
      pieces [QUERY_TILE, size].
    """
    pieces, lanes = feature_pieces(width, LEAST_PIECE), iota(ROW_TILE)
    key_dtype = query[0].dtype
    shared_dtype = key_dtype if cache.value_scale is None else value_dtype(key_dtype)

    def load(ref, start: int, size: int, rows: Array, dtype) -> Array:
        features = start + iota(size)
        # Rows up to the cache's end can be read without a mask: the weight of invalid rows is 0.
        mask = None if start + size <= width else (features < width)[:, None]
        return masked_load(ref.at[(*leading, features[:, None], rows[None, :])], mask).astype(dtype)

    def scaled(numbers: Array, ref, rows: Array) -> Array:
        return numbers if ref is None else numbers * masked_load(ref.at[(*leading, rows)]).astype(jnp.float32)[None, :]

    def block(index, carry, masked):
        top, total, sums = carry
        rows = index * ROW_TILE + lanes
        scores = jnp.zeros((QUERY_TILE, ROW_TILE), jnp.float32)
        for piece, values in zip(pieces, query):
            scores += dot(values, load(cache.key, *piece, rows, key_dtype), 0)
        scores = scaled(scores, cache.key_scale, rows)
        if masked:
            scores = jnp.where((rows < length)[None, :], scores, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        factor = jnp.exp2((top - new_top) * scale)
        weights = powers(scores, new_top * scale, scale, interpret)
        new_sums, shares = [], scaled(weights, cache.value_scale, rows).astype(shared_dtype)
        for piece, old in zip(pieces, sums):
            value = load(cache.value, *piece, rows, shared_dtype)
            new_sums.append(old * factor[:, None] + dot(shares, value, 1))
        return new_top, total * factor + jnp.sum(weights, axis=1), tuple(new_sums)

    carry = (
        # Finite, so that a part without valid rows adds 0 when parts are merged.
        jnp.full((QUERY_TILE,), -1e30, jnp.float32),
        jnp.zeros((QUERY_TILE,), jnp.float32),
        tuple(jnp.zeros((QUERY_TILE, size), jnp.float32) for _, size in pieces),
    )
    first, last = blocks
    full = jnp.clip(length // ROW_TILE, first, last)
    carry = jax.lax.fori_loop(first, full, functools.partial(block, masked=False), carry)
    end = jnp.clip(pl.cdiv(length, ROW_TILE), first, last)
    return jax.lax.fori_loop(full, end, functools.partial(block, masked=True), carry)
