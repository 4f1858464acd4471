"""GPU kernels of exact attention with dropout of the weights, for training, in Pallas for Triton.

Plain version: `models.attention._attend_in_chunks`. Gain: without the kernels a step takes 85% longer at N = 512. They
also compute attention without dropout, at rate 0: with model.attention = 'deterministic', and for `attend_with_lse`.

No array of size queries x keys is stored: every kernel computes the mask again, a hash of the weights' indices.
Scores and softmax are float32, to base 2; products take operands of the inputs' dtype and sum in float32.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, UInt32

from tlinformer_jax.kernels.common import (
    LEAST_PIECE,
    LOG2_E,
    Scores,
    call_kernel,
    dot,
    iota,
    kept,
    masked_load,
    masked_store,
    threefry,
    usable,
)

# Wider heads would not fit into a program's registers.
MOST_WIDTH = 128


class Tile(NamedTuple):
    """Queries and keys that a program multiplies at once, its warps, and its pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Tiles of the forward kernel, of the queries' gradient, and of the keys' and values' gradients."""

    forward: Tile = Tile(128, 64, 8, 2)
    query: Tile = Tile(64, 64, 4, 3)
    key: Tile = Tile(64, 64, 4, 2)


TILES = Tiles()


class Options(NamedTuple):
    """Values known when a kernel is compiled."""

    scores: Scores
    rate: float
    tiles: Tiles
    interpret: bool


def use_kernel(dtype: Any, width: int) -> bool:
    """Returns whether the kernels can run here for heads of this dtype and width."""
    return width <= MOST_WIDTH and usable("dropout", dtype)


def attend_with_dropout(
    query: Float[Array, "batch queries heads d_h"],
    key: Float[Array, "shared keys heads d_h"],
    value: Float[Array, "shared keys heads d_h"],
    scores: Scores,
    key_length: Int[Array, " batch"] | None,
    words: UInt32[Array, " 3"],
    rate: float,
    interpret: bool = False,
    tiles: Tiles = TILES,
) -> tuple[Float[Array, "batch queries heads d_h"], Float[Array, "batch queries heads"]]:
    """Computes softmax attention with weights zeroed with probability `rate` and otherwise divided by 1 - rate.

    `key_length` is the number of valid keys (None for all). Keys may be of a divisor of the queries' number of
    sequences; then consecutive sequences of queries share them, each with its own length. Also returns the log-sum-exp
    of the scaled scores. A query that sees no key has output 0 and log-sum-exp -inf. For `words` see `layers.Dropout`.
    """
    return _attend(Options(scores, rate, tiles, interpret), query, key, value, key_length, words)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options: Options, query, key, value, key_length, words) -> tuple[Array, Array]:
    return _attend_forward(options, query, key, value, key_length, words)[0]


def _attend_forward(options: Options, query, key, value, key_length, words):
    output, lse = _forward(options, query, key, value, key_length, words)
    natural = jnp.where(lse < jnp.inf, lse / LOG2_E, -jnp.inf)
    return (output, jnp.swapaxes(natural, 1, 2)), (query, key, value, key_length, words, output, lse)


def _attend_backward(options: Options, saved, gradients):
    gradient, lse_gradient = gradients
    lse_gradient = jnp.where(saved[-1] < jnp.inf, jnp.swapaxes(lse_gradient, 1, 2), 0.0)
    return *_backward(options, saved, gradient, lse_gradient), None, None


_attend.defvjp(_attend_forward, _attend_backward)


# A separate jit, since XLA compiles a kernel only once for calls that are equal in every byte, line numbers included.
@functools.partial(jax.jit, static_argnums=0)
def _forward(options: Options, query, key, value, key_length, words) -> tuple[Array, Array]:
    """Returns the output, and the log-sum-exp to base 2, [batch, heads, queries]: +inf for queries without keys."""
    batch, queries, heads, _ = query.shape
    outputs = [
        jax.ShapeDtypeStruct(query.shape, query.dtype),
        jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    ]
    operands = [query, key, value, words, *(() if key_length is None else (key_length,))]
    return _call(_forward_kernel, options, options.tiles.forward, queries, outputs, operands, "dropout_attention")


@functools.partial(jax.jit, static_argnums=0)
def _backward(options: Options, saved, gradient: Array, lse_gradient: Array) -> tuple[Array, Array, Array]:
    """Returns the gradients of query, key and value."""
    query, key, value, key_length, words, output, lse = saved
    lengths = () if key_length is None else (key_length,)
    rows = [jax.ShapeDtypeStruct(lse.shape, dtype) for dtype in (jnp.float32, jnp.uint32, jnp.uint32)]
    query_gradient, *row_values = _call(
        _query_kernel,
        options,
        options.tiles.query,
        query.shape[1],
        [jax.ShapeDtypeStruct(query.shape, query.dtype), *rows],
        [query, key, value, words, output, gradient, lse, lse_gradient, *lengths],
        "dropout_attention_query_gradient",
    )
    key_gradient, value_gradient = _call(
        _key_kernel,
        options,
        options.tiles.key,
        key.shape[1],
        [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (key, value)],
        [query, key, value, gradient, lse, *row_values, *lengths],
        "dropout_attention_key_gradient",
    )
    return query_gradient, key_gradient, value_gradient


def _call(kernel, options: Options, tile: Tile, rows: int, outputs, operands, name: str) -> Any:
    """Runs a kernel in which each program computes a tile of rows of one head of one sequence."""
    batch, _, heads, _ = operands[1 if kernel is _key_kernel else 0].shape
    size = tile.keys if kernel is _key_kernel else tile.queries
    return call_kernel(
        functools.partial(kernel, options=options, tile=tile),
        (pl.cdiv(rows, size), heads, batch),
        outputs,
        operands,
        name,
        options.interpret,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def _forward_kernel(query_ref, key_ref, value_ref, words_ref, *refs, options: Options, tile: Tile) -> None:
    """Computes output and log-sum-exp of a tile of queries."""
    *length_refs, output_ref, lse_ref = refs
    head, row = pl.program_id(1), pl.program_id(2)
    shared = row // _sharing(query_ref, key_ref), head
    numbers = pl.program_id(0) * tile.queries + iota(tile.queries)
    query = _load(query_ref, (row, head), numbers, query_ref.shape[1])
    first, second = _row_states(words_ref, numbers, query_ref.shape)
    scale = options.scores.scale * LOG2_E

    def block(index, carry, masked: bool):
        top, total, sums = carry
        columns = index * tile.keys + iota(tile.keys)
        limit = length if masked else None
        scores = dot(query, _load(key_ref, shared, columns, limit), 1)
        if masked:
            scores = _masked(scores, numbers[:, None], columns[None, :], length, options)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        factor = jnp.exp2((top - new_top) * scale)
        weights = jnp.exp2(scores * scale - (new_top * scale)[:, None])
        total = total * factor + jnp.sum(weights, axis=1)
        keep = kept(first[:, None], second[:, None], columns[None, :], options.rate)
        dropped = jnp.where(keep, weights, 0.0)
        value = _load(value_ref, shared, columns, limit)
        return new_top, total, sums * factor[:, None] + dot(dropped.astype(value.dtype), value, 0)

    length, blocks = _key_blocks(key_ref, length_refs, options, tile)
    zeros = _zeros(tile.queries, query_ref)
    # The maximum is finite, so that rows that see no key do not become NaN.
    carry = (jnp.full((tile.queries,), -1e30, jnp.float32), jnp.zeros((tile.queries,), jnp.float32), zeros)
    top, total, sums = _loop(blocks, block, carry)
    safe = jnp.where(total > 0, total, 1.0)
    factor = 1.0 / (safe * (1.0 - options.rate))
    _store(output_ref, (row, head), numbers, sums * factor[:, None])
    lse = jnp.where(total > 0, top * scale + jnp.log(safe) * LOG2_E, jnp.inf)
    _store_numbers(lse_ref, (row, head), numbers, lse)


def _query_kernel(
    query_ref,
    key_ref,
    value_ref,
    words_ref,
    output_ref,
    gradient_ref,
    lse_ref,
    lse_gradient_ref,
    *refs,
    options: Options,
    tile: Tile,
) -> None:
    """Computes the gradient of a tile of queries, and the values of their rows that `_key_kernel` needs."""
    *length_refs, result_ref, delta_ref, first_ref, second_ref = refs
    head, row = pl.program_id(1), pl.program_id(2)
    numbers = pl.program_id(0) * tile.queries + iota(tile.queries)
    leading, shared = (row, head), (row // _sharing(query_ref, key_ref), head)
    query, output, gradient = (
        _load(ref, leading, numbers, query_ref.shape[1]) for ref in (query_ref, output_ref, gradient_ref)
    )
    lse = _load_numbers(lse_ref, leading, numbers)
    first, second = _row_states(words_ref, numbers, query_ref.shape)
    delta = jnp.sum(output.astype(jnp.float32) * gradient.astype(jnp.float32), axis=1)
    delta = (delta - _load_numbers(lse_gradient_ref, (row, head), numbers)) * (1.0 - options.rate)

    def block(index, sums, masked: bool):
        columns = index * tile.keys + iota(tile.keys)
        limit = length if masked else None
        key = _load(key_ref, shared, columns, limit)
        scores = dot(query, key, 1) * (options.scores.scale * LOG2_E)
        if masked:
            scores = _masked(scores, numbers[:, None], columns[None, :], length, options)
        weights = jnp.exp2(scores - lse[:, None])
        slope = dot(gradient, _load(value_ref, shared, columns, limit), 1)
        keep = kept(first[:, None], second[:, None], columns[None, :], options.rate)
        slope = jnp.where(keep, slope, 0.0)
        slope = (weights * (slope - delta[:, None])).astype(query_ref.dtype)
        return sums + dot(slope, key, 0)

    length, blocks = _key_blocks(key_ref, length_refs, options, tile)
    sums = _loop(blocks, block, _zeros(tile.queries, query_ref))
    _store(result_ref, leading, numbers, sums * (options.scores.scale / (1.0 - options.rate)))
    for ref, values in zip((delta_ref, first_ref, second_ref), (delta, first, second)):
        _store_numbers(ref, leading, numbers, values)


def _key_kernel(query_ref, key_ref, value_ref, gradient_ref, lse_ref, *refs, options: Options, tile: Tile) -> None:
    """Computes gradients of a tile of keys and values, over all queries that share them; scores are [keys, queries]."""
    row_refs = lse_ref, *refs[:3]
    *length_refs, key_result_ref, value_result_ref = refs[3:]
    head, row, sharing = pl.program_id(1), pl.program_id(2), _sharing(query_ref, key_ref)
    start = pl.program_id(0) * tile.keys
    numbers, count = start + iota(tile.keys), query_ref.shape[1]
    limit = _valid_keys(key_ref, length_refs, row) if sharing == 1 else key_ref.shape[1]
    # Invalid keys are read as 0; their gradients are set to 0 at the end.
    key, value = (_load(ref, (row, head), numbers, limit) for ref in (key_ref, value_ref))

    def sequence(number, carry):
        """Adds the gradients that come from the queries of sequence `number`."""
        leading, length = (number, head), _valid_keys(key_ref, length_refs, number)

        def block(index, carry, masked: bool):
            key_sums, value_sums = carry
            rows = index * tile.queries + iota(tile.queries)
            # The gradient of rows past the last query is read as 0.
            query, gradient = (_load(ref, leading, rows, count) for ref in (query_ref, gradient_ref))
            lse, delta, first, second = (_load_numbers(ref, leading, rows)[None, :] for ref in row_refs)
            scores = dot(key, query, 1) * (options.scores.scale * LOG2_E)
            if masked:
                ends = length if sharing > 1 else None
                scores = _masked(scores, rows[None, :], numbers[:, None], ends, options)
            weights = jnp.exp2(scores - lse)
            dropped = jnp.where(kept(first, second, numbers[:, None], options.rate), weights, 0.0)
            slope = dropped * dot(value, gradient, 1) - weights * delta
            dtype = query_ref.dtype
            return key_sums + dot(slope.astype(dtype), query, 0), value_sums + dot(dropped.astype(dtype), gradient, 0)

        return _loop(_query_blocks(start, count, length, options, tile, sharing > 1), block, carry)

    carry = (_zeros(tile.keys, key_ref),) * 2
    if sharing == 1:
        carry = sequence(row, carry)
    else:
        carry = jax.lax.fori_loop(row * sharing, (row + 1) * sharing, sequence, carry)
    valid = (numbers < limit)[:, None]
    factors = options.scores.scale / (1.0 - options.rate), 1.0 / (1.0 - options.rate)
    for ref, sums, factor in zip((key_result_ref, value_result_ref), carry, factors):
        _store(ref, (row, head), numbers, jnp.where(valid, sums * factor, 0.0))


def _key_blocks(key_ref, length_refs, options: Options, tile: Tile):
    """Returns the number of valid keys, and ranges (first, end, masked) of key blocks that a tile of queries sees."""
    start, length = pl.program_id(0) * tile.queries, _valid_keys(key_ref, length_refs, pl.program_id(2))
    first: Any = 0
    full, last = length // tile.keys, pl.cdiv(length, tile.keys)
    if options.scores.causal:
        full = jnp.minimum(full, (start + 1) // tile.keys)
        last = jnp.minimum(last, pl.cdiv(start + tile.queries, tile.keys))
    if options.scores.window is not None:
        first = jnp.maximum(start - options.scores.window + 1, 0) // tile.keys
        full = first
    return length, ((first, full, False), (full, last, True))


def _query_blocks(start, queries: int, length, options: Options, tile: Tile, shared: bool):
    """Returns ranges (first, end, masked) of query blocks that see the tile of keys from `start` on.

    Blocks that see only some keys of the tile, because the queries' length ends in it, are masked if keys are `shared`.
    """
    end: Any = pl.cdiv(queries, tile.queries)
    # No blocks if no key of the tile is valid.
    if isinstance(length, Array):
        end = jnp.where(start < length, jnp.int32(end), jnp.int32(0))
    if not options.scores.causal:
        full = jnp.where(start + tile.keys <= length, end, 0) if shared else end
        return ((0, full, False), (full, end, True)) if shared else ((0, end, False),)
    first, full = start // tile.queries, pl.cdiv(start + tile.keys - 1, tile.queries)
    if options.scores.window is not None:
        full = jnp.minimum(end, pl.cdiv(start + tile.keys - 1 + options.scores.window, tile.queries))
        return ((first, full, True),)
    if shared:
        return ((first, end, True),)
    return ((first, jnp.minimum(full, end), True), (full, end, False))


def _sharing(query_ref, key_ref) -> int:
    """Returns how many sequences of queries share a sequence of keys."""
    return query_ref.shape[0] // key_ref.shape[0]


def _valid_keys(key_ref, length_refs, row) -> Any:
    """Returns the number of keys that are valid for sequence `row`; a plain number unless lengths are given."""
    keys = key_ref.shape[1]
    return jnp.clip(length_refs[0][row], 0, keys) if length_refs else keys


def _loop(blocks, block, carry):
    """Runs `block` over consecutive ranges of blocks."""
    for first, end, masked in blocks:
        if isinstance(end, Array) or isinstance(first, Array) or first < end:
            carry = jax.lax.fori_loop(first, end, functools.partial(block, masked=masked), carry)
    return carry


def _masked(scores: Array, queries: Array, keys: Array, length, options: Options) -> Array:
    """Sets scores to -inf if the query does not see the key; `queries` and `keys` are indices that broadcast."""
    conditions = [] if length is None else [keys < length]
    if options.scores.causal:
        conditions.append(keys <= queries)
    if options.scores.window is not None:
        conditions.append(queries - keys < options.scores.window)
    return jnp.where(functools.reduce(jnp.logical_and, conditions), scores, -jnp.inf)


def _row_states(words_ref, queries: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Returns the mask states of the program's rows; `shape` is (batch, queries, heads, d_h)."""
    softmax = (pl.program_id(2) * shape[2] + pl.program_id(1)).astype(jnp.uint32)
    softmax += words_ref[2] * np.uint32(shape[0] * shape[2])
    rows = queries.astype(jnp.uint32)
    return threefry(words_ref[0], words_ref[1], jnp.full(rows.shape, softmax), rows)


def _features(ref) -> Array:
    """Returns indices of a head's features, padded to a size that the matrix units support."""
    return iota(max(LEAST_PIECE, pl.next_power_of_2(ref.shape[3])))


def _zeros(rows: int, ref) -> Array:
    return jnp.zeros((rows, _features(ref).size), jnp.float32)


def _load(ref, leading, rows: Array, count) -> Array:
    """Loads rows of one head; 0 past the width, and from row `count` on (None: no limit)."""
    features, (row, head) = _features(ref), leading
    mask = (features < ref.shape[3])[None, :]
    if count is not None:
        mask = mask & (rows < count)[:, None]
    return masked_load(ref.at[row, rows[:, None], head, features[None, :]], mask)


def _store(ref, leading, rows: Array, values: Array) -> None:
    """Stores rows of one head."""
    features, (row, head) = _features(ref), leading
    mask = (rows < ref.shape[1])[:, None] & (features < ref.shape[3])[None, :]
    masked_store(ref.at[row, rows[:, None], head, features[None, :]], values.astype(ref.dtype), mask)


def _load_numbers(ref, leading, rows: Array) -> Array:
    """Loads a number for each row of one head; 0 past the last row."""
    return masked_load(ref.at[(*leading, rows)], rows < ref.shape[2])


def _store_numbers(ref, leading, rows: Array, values: Array) -> None:
    masked_store(ref.at[(*leading, rows)], values, rows < ref.shape[2])
