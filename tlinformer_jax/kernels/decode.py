"""GPU kernels of a generated token, in Pallas for Triton.

Plain versions: `models.cached_rows.attend_cached`, `models.layers.project` and `update`. Gain: 1.4 to 1.9 times the
tokens per second of a step. With an int8 history of a million tokens, `_stream_int8` takes 0.758 ms for a token on an
H200 and `_stream` 1.332 (docs/performance.md).

`attend` is split over the cached rows and reads each byte once, up to the last valid row. Rows are contiguous in
memory, and each lane reads one row of a block: it keeps its own running maximum, sum and weighted values until the last
block. `dense` multiplies a few rows with a matrix, with a LayerNorm before and an activation or residual after: at this
size the time depends on the number of kernels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from tlinformer_jax.kernels.common import call_kernel, feature_pieces, iota, masked_load, merge_softmaxes
from tlinformer_jax.kernels.key_value import KeyValue

LANES = 128
# Target number of programs: eight for each of the 132 multiprocessors of an H100.
PROGRAMS = 1056
# Target with an int8 source, whose programs have one warp: enough of them use the multiprocessors evenly.
INT8_PROGRAMS = 3168
# Threads of a warp, and the most features of a head for which whole rows fit into its registers.
THREADS = 32
MOST_FEATURES = 48
# A part with fewer rows costs more to merge than it saves.
MIN_PART_ROWS = 128
# PTX: four int8 in a word $4 become float32 $0 .. $3. The instruction that converts one byte is several times slower.
# A byte x + 128 in the mantissa of 2^23 makes 2^23 + 128 + x, from which 2^23 + 128 is subtracted; this is exact.
FOUR_FLOATS = """
{
  .reg .b32 word, a, b, c, d;
  xor.b32 word, $4, 0x80808080;
  prmt.b32 a, word, 0x4B000000, 0x7440;
  prmt.b32 b, word, 0x4B000000, 0x7441;
  prmt.b32 c, word, 0x4B000000, 0x7442;
  prmt.b32 d, word, 0x4B000000, 0x7443;
  sub.f32 $0, a, 0f4B000080;
  sub.f32 $1, b, 0f4B000080;
  sub.f32 $2, c, 0f4B000080;
  sub.f32 $3, d, 0f4B000080;
}
"""
# Columns of the result that one program of `dense` computes.
TILE = 4

# (keys and values, [batch, heads, d_h, rows] or with layers first; valid rows, int32 [batch]; index of the layer)
Source = tuple[KeyValue, jax.Array, int | None]


def num_parts(rows: int, softmaxes: int, programs: int) -> int:
    """Returns the number of parts for a cache of `rows` rows; `softmaxes` is batch * heads."""
    return max(1, min(programs // softmaxes, -(-rows // MIN_PART_ROWS)))


def attend(
    projected: Float[Array, "batch 3 heads d_h"],
    tables: Sequence[Float[Array, "batch half"]],
    sources: Sequence[Source],
    scale: float,
    interpret: bool = False,
) -> tuple[
    Float[Array, "sources batch heads d_h"], Float[Array, "sources batch heads"], Float[Array, "batch heads d_h"]
]:
    """Computes softmax attention of one new row per sequence to each source; the first includes the row's own key.

    Args:
      projected: query, key and value of the new row, not rotated.
      tables: cosines and sines of the new row's rotations.
      sources: the cached rows of each softmax, with the number of valid rows; see `Source`.

    Returns:
      each source's output, float32, to be added up; its log-sum-exp, -inf if no row is valid; and the new row's rotated
      key.
    """
    batch, _, heads, width = projected.shape
    caches, lengths, layers = zip(*sources)
    int8 = width <= MOST_FEATURES and any(cache.key_scale is not None for cache in caches)
    programs = INT8_PROGRAMS if int8 else PROGRAMS
    splits = tuple(num_parts(cache.rows, batch * heads, programs) for cache in caches)
    stream = functools.partial(_stream_int8, interpret=interpret) if int8 else _stream
    shape = (sum(splits), batch, heads)
    outputs = [jax.ShapeDtypeStruct((*shape, last), jnp.float32) for last in (width, 1, 1)]
    sums, tops, totals, own_key = call_kernel(
        functools.partial(_attend_kernel, layers=layers, splits=splits, width=width, scale=scale, stream=stream),
        (sum(splits), heads, batch),
        [*outputs, jax.ShapeDtypeStruct((batch, heads, width), projected.dtype)],
        [projected, *tables, caches, lengths],
        "attend_cached",
        interpret,
        num_warps=1 if int8 else 4,
        num_stages=1 if int8 else 3,
    )
    tops, totals = tops[..., 0], totals[..., 0]
    if max(splits) == 1:  # the kernel has already divided by the totals
        lse = jnp.where(totals > 0, tops + jnp.log(jnp.where(totals > 0, totals, 1.0)), -jnp.inf)
        return sums, lse, own_key
    ends = np.cumsum(splits)
    parts = [slice(end - count, end) for end, count in zip(ends, splits)]
    merged = [merge_softmaxes(sums[part], tops[part], 0, totals[part]) for part in parts]
    output, lse = (jnp.stack(arrays) for arrays in zip(*merged))
    return output, lse, own_key


def _attend_kernel(
    projected_ref,
    cos_ref,
    sin_ref,
    caches: tuple[KeyValue, ...],
    length_refs: tuple,
    sums_ref,
    top_ref,
    total_ref,
    own_key_ref,
    *,
    layers: tuple,
    splits: tuple[int, ...],
    width: int,
    scale: float,
    stream: Callable[..., Any],
) -> None:
    """Computes one part of a source for one head of a sequence; divides by the total if each source has one part."""
    part, head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    pieces = feature_pieces(width)

    def rotated(which: int) -> list[jax.Array]:
        return [_rotated_piece(projected_ref, cos_ref, sin_ref, (row, which, head), piece, width) for piece in pieces]

    query = [piece * scale for piece in rotated(0)]
    first = 0
    for index, count in enumerate(splits):
        leading = (row, head) if layers[index] is None else (layers[index], row, head)

        @pl.when((part >= first) & (part < first + count))
        def _(index=index, length=length_refs[index][row], leading=leading, first=first, count=count):
            blocks = pl.cdiv(length, LANES)
            each = pl.cdiv(blocks, count)
            begin = (part - first) * each
            end = jnp.minimum(begin + each, blocks)
            state = stream(query, caches[index], leading, begin, end, length, pieces)
            if index == 0:
                own_key, own_value = rotated(1), [projected_ref[row, 2, head, pl.ds(*piece)] for piece in pieces]
                state = _with_own(state, query, own_key, own_value, part == first)

                @pl.when(part == first)
                def _():
                    for (start, size), piece in zip(pieces, own_key):
                        own_key_ref[row, head, pl.ds(start, size)] = piece.astype(own_key_ref.dtype)

            _write_part(state, (sums_ref, top_ref, total_ref), (part, row, head), pieces, divide=max(splits) == 1)

        first += count


def _rotated_piece(ref, cos_ref, sin_ref, leading, piece: tuple[int, int], width: int) -> jax.Array:
    """Returns a piece of a rotated query or key, float32; features of a pair are half a head apart (`rope.rotate`)."""
    start, size = piece
    half = width // 2
    feature = start + iota(size)
    is_first = feature < half
    pair = jnp.where(is_first, feature, feature - half)
    own = ref[(*leading, feature)].astype(jnp.float32)
    partner = ref[(*leading, jnp.where(is_first, feature + half, feature - half))].astype(jnp.float32)
    turned = own * cos_ref[leading[0], pair] + jnp.where(is_first, -partner, partner) * sin_ref[leading[0], pair]
    return turned.astype(ref.dtype).astype(jnp.float32)  # rounded like cached keys


def _stream(query, cache, leading, begin, end, length, pieces):
    """Reads blocks begin .. end - 1 of LANES rows; returns maximum, sum of weights, and weighted values in pieces."""
    lanes = iota(LANES)

    def block(index, carry):
        top, total, sums = carry
        rows = pl.ds(index * LANES, LANES)
        # All loads start before the first value is used.
        keys, values = ([ref[(*leading, pl.ds(*piece), rows)] for piece in pieces] for ref in (cache.key, cache.value))
        key_scale, value_scale = (
            1.0 if ref is None else ref[(*leading, rows)].astype(jnp.float32)
            for ref in (cache.key_scale, cache.value_scale)
        )
        scores = jnp.zeros((LANES,), jnp.float32)
        for key, part in zip(keys, query):
            scores += jnp.sum(key.astype(jnp.float32) * part[:, None], axis=0)
        scores = jnp.where(lanes + index * LANES < length, scores * key_scale, -jnp.inf)
        new_top = jnp.maximum(top, scores)
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        factor, weight = jnp.exp(top - base), jnp.exp(scores - base)
        share, new_sums = (weight * value_scale)[None, :], []
        for value, old in zip(values, sums):
            new_sums.append(old * factor[None, :] + value.astype(jnp.float32) * share)
        return new_top, total * factor + weight, tuple(new_sums)

    return _merge_lanes(*jax.lax.fori_loop(begin, end, block, _no_rows(pieces, LANES)))


def _stream_int8(query, cache, leading, begin, end, length, pieces, *, interpret: bool):
    """Computes `_stream` for programs of one warp, in which each thread reads four whole rows of a block.

    Arrays of a block are [features, threads, rows of a thread]. Triton gives each thread neighbouring elements of the
    last axis, so a load of int8 is a word, and nothing is exchanged between threads before the last block. In `_stream`
    a thread loads 16 bytes, of which only a few belong to its own row, so integers would go through shared memory.
    """
    each = LANES // THREADS
    lanes = each * iota(THREADS)[:, None] + iota(each)[None, :]
    features = [(start + iota(size))[:, None, None] for start, size in pieces]

    def block(index, carry):
        top, total, sums = carry
        rows = index * LANES + lanes
        keys, values = (
            [masked_load(ref.at[(*leading, piece, rows[None])]) for piece in features]
            for ref in (cache.key, cache.value)
        )
        key_scale, value_scale = (
            1.0 if ref is None else masked_load(ref.at[(*leading, rows)]).astype(jnp.float32)
            for ref in (cache.key_scale, cache.value_scale)
        )
        scores = jnp.zeros((THREADS, each), jnp.float32)
        for key, part in zip(keys, query):
            scores += jnp.sum(_floats(key, interpret) * part[:, None, None], axis=0)
        scores = jnp.where(rows < length, scores * key_scale, -jnp.inf)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        factor, weight = jnp.exp(top - base), jnp.exp(scores - base[:, None])
        share, new_sums = (weight * value_scale)[None], []
        for value, old in zip(values, sums):
            new_sums.append(old * factor[None] + jnp.sum(_floats(value, interpret) * share, axis=2))
        return new_top, total * factor + jnp.sum(weight, axis=1), tuple(new_sums)

    return _merge_lanes(*jax.lax.fori_loop(begin, end, block, _no_rows(pieces, THREADS)))


def _floats(numbers: jax.Array, interpret: bool) -> jax.Array:
    """Converts to float32; int8 by FOUR_FLOATS, which the interpreter of the tests cannot run."""
    if numbers.dtype != jnp.int8 or interpret:
        return numbers.astype(jnp.float32)
    from jax.experimental.pallas import triton

    wide = jax.ShapeDtypeStruct(numbers.shape, jnp.float32)
    return triton.elementwise_inline_asm(
        FOUR_FLOATS, args=[numbers], constraints="=f,=f,=f,=f,r", pack=4, result_shape_dtypes=[wide]
    )[0]


def _no_rows(pieces, lanes: int):
    """Returns the maximum, sum of weights, and weighted values of each lane before the first block."""
    zeros = tuple(jnp.zeros((size, lanes), jnp.float32) for _, size in pieces)
    return jnp.full((lanes,), -jnp.inf, jnp.float32), jnp.zeros((lanes,), jnp.float32), zeros


def _merge_lanes(top, total, sums):
    """Merges the lanes. The maximum is finite, so that a part without valid rows adds 0 when parts are merged."""
    part_top = jnp.maximum(jnp.max(top), -1e30)
    factor = jnp.exp(top - part_top)
    return part_top, jnp.sum(total * factor), [jnp.sum(values * factor[None, :], axis=1) for values in sums]


def _with_own(state, query, own_key, own_value, wanted):
    """Adds the new row's own key and value to the state, if `wanted`."""
    top, total, sums = state
    score = sum(jnp.sum(key * values) for key, values in zip(own_key, query))
    new_top = jnp.where(wanted, jnp.maximum(top, score), top)
    factor, weight = jnp.exp(top - new_top), jnp.where(wanted, jnp.exp(score - new_top), 0.0)
    sums = [old * factor + value.astype(jnp.float32) * weight for old, value in zip(sums, own_value)]
    return new_top, total * factor + weight, sums


def _write_part(state, outputs, target, pieces, divide: bool) -> None:
    top, total, sums = state
    sums_ref, top_ref, total_ref = outputs
    divisor = jnp.where(total > 0, total, 1.0) if divide else 1.0
    for piece, values in zip(pieces, sums):
        sums_ref[(*target, pl.ds(*piece))] = values / divisor
    top_ref[(*target, 0)] = top
    total_ref[(*target, 0)] = total


def dense(
    x: Float[Array, "parts batch inner"],
    kernel: Float[Array, "*matrices columns inner"],
    *,
    norm: tuple[jax.Array, jax.Array, float] | None = None,
    gated: bool = False,
    bias: Float[Array, " columns"] | None = None,
    residual: Float[Array, "batch columns"] | None = None,
    dtype: Any = None,
    interpret: bool = False,
) -> Float[Array, "batch columns"]:
    """Multiplies a few rows, which are sums of the parts, with a matrix in one kernel; computes in float32.

    Args:
      norm: scale, bias and epsilon of a LayerNorm applied to the rows first.
      gated: whether there are two matrices; the result is silu(product with the first) * product with the second.
      bias, residual: added to the result.
      dtype: dtype of the result; None for x's.
    """
    columns = kernel.shape[-2]
    tile = min(TILE, columns & -columns)
    operands = [x, kernel, *(norm[:2] if norm else ()), *(array for array in (bias, residual) if array is not None)]
    body = functools.partial(
        _dense_kernel,
        tile=tile,
        gated=gated,
        epsilon=norm[2] if norm else None,
        has_bias=bias is not None,
        has_residual=residual is not None,
    )
    output = jax.ShapeDtypeStruct((x.shape[1], columns), dtype or x.dtype)
    return call_kernel(body, (columns // tile,), output, operands, "dense", interpret, num_warps=4, num_stages=1)


def _dense_kernel(*refs: Any, tile: int, gated: bool, epsilon: float | None, has_bias: bool, has_residual: bool):
    """Computes a tile of columns for all rows."""
    x_ref, kernel_ref, *rest = refs[:-1]
    output_ref = refs[-1]
    norm_refs, rest = (rest[:2], rest[2:]) if epsilon is not None else ((), rest)
    columns = pl.ds(pl.program_id(0) * tile, tile)
    parts, batch, inner = x_ref.shape
    pieces = feature_pieces(inner)
    matrices = range(2 if gated else 1)
    # Load the weights first: they do not depend on the statistics of the rows.
    weights = [
        [kernel_ref[(matrix, columns, pl.ds(*piece)) if gated else (columns, pl.ds(*piece))] for piece in pieces]
        for matrix in matrices
    ]
    for row in range(batch):
        values = _input_row(x_ref, row, parts, pieces, norm_refs, epsilon, inner)
        sums: list[Any] = [
            sum(jnp.sum(value[None, :] * part.astype(jnp.float32), axis=1) for value, part in zip(values, weights[m]))
            for m in matrices
        ]
        result: jax.Array = sums[0] * jax.nn.sigmoid(sums[0]) * sums[1] if gated else sums[0]
        if has_bias:
            result += rest[0][columns].astype(jnp.float32)
        if has_residual:
            result += rest[-1][row, columns].astype(jnp.float32)
        output_ref[row, columns] = result.astype(output_ref.dtype)


def _input_row(x_ref, row: int, parts: int, pieces, norm_refs, epsilon: float | None, inner: int) -> list[jax.Array]:
    """Returns one input row, the sum of its parts, in float32 pieces; normalised if there is an epsilon."""
    values = [sum(x_ref[part, row, pl.ds(*piece)].astype(jnp.float32) for part in range(parts)) for piece in pieces]
    if epsilon is None:
        return values
    mean = sum(jnp.sum(piece) for piece in values) / inner
    centred = [piece - mean for piece in values]
    scale = jax.lax.rsqrt(sum(jnp.sum(piece * piece) for piece in centred) / inner + epsilon)
    scale_ref, bias_ref = norm_refs
    return [
        value * scale * scale_ref[pl.ds(*piece)].astype(jnp.float32) + bias_ref[pl.ds(*piece)].astype(jnp.float32)
        for value, piece in zip(centred, pieces)
    ]
