"""The GPU kernel of a generated token's attention: split over the cached rows, reading each byte once.

Written in Pallas for Triton. Rows are contiguous in memory, one lane each: a lane keeps its own running maximum, sum
and weighted values, so that nothing is exchanged between lanes until the last row is read. The parts of a softmax
are merged outside. Reads stop at the valid rows, whatever room the cache has.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LANES = 128
# Programs to aim for: a few for each of the 132 multiprocessors of an H100.
PROGRAMS = 1056
# A part of fewer rows than this costs more to merge than it saves.
MIN_PART_ROWS = 512

Source = tuple[jax.Array, jax.Array, jax.Array, int | None]


@functools.cache
def available() -> bool:
    """Whether the default device is an NVIDIA GPU that Triton compiles for."""
    return jax.default_backend() == "gpu" and "nvidia" in jax.devices()[0].device_kind.lower()


def attend(
    query: jax.Array, own_key: jax.Array, own_value: jax.Array, sources: list[Source], interpret: bool = False
) -> jax.Array:
    """Sum over `sources` of softmax attention; the query's own key belongs to the first.

    Args:
      query: [batch, heads, d_h]; own_key and own_value the same.
      sources: (key, value, valid rows int32 [batch], layer); keys and values [batch, heads, d_h, rows], or with a
        leading axis of layers of which `layer` is read.
      interpret: run on the CPU, for tests.

    Returns:
      [batch, heads, d_h] in query's dtype.
    """
    batch, heads, _ = query.shape
    splits = [num_parts(key.shape[-1], batch * heads) for key, *_ in sources]
    parts = _partial_attention(query, sources, splits, interpret)
    scale = 1.0 / math.sqrt(query.shape[-1])
    wide = own_key.astype(jnp.float32) * query.astype(jnp.float32)
    own_score = jnp.sum(wide, axis=-1, keepdims=True) * scale
    output = jnp.zeros(query.shape, jnp.float32)
    first = 0
    for index, count in enumerate(splits):
        sums, tops, totals = (array[:, :, first : first + count] for array in parts)
        first += count
        top = jnp.max(tops, axis=2, keepdims=True)
        if index == 0:
            top = jnp.maximum(top, own_score[..., None])
        factor = jnp.exp(tops - top)
        total = jnp.sum(totals * factor, axis=2)
        merged = jnp.sum(sums * factor, axis=2)
        if index == 0:
            own_weight = jnp.exp(own_score - top[:, :, 0])
            total, merged = total + own_weight, merged + own_weight * own_value.astype(jnp.float32)
        output = output + merged / jnp.where(total > 0, total, 1.0)
    return output.astype(query.dtype)


def num_parts(rows: int, softmaxes: int) -> int:
    """Parts to split a cache with room for `rows` in, where a batch has `softmaxes` sequences times heads."""
    return max(1, min(PROGRAMS // softmaxes, -(-rows // MIN_PART_ROWS)))


def _partial_attention(
    query: jax.Array, sources: list[Source], splits: list[int], interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unnormalised parts of every source: weighted sums float32 [batch, heads, parts, d_h], then the maxima of the
    scaled scores and the sums of weights, both [batch, heads, parts, 1]."""
    from jax.experimental.pallas import triton as plgpu

    batch, heads, width = query.shape
    parts = sum(splits)
    operands: list[Any] = [query]
    for key, value, length, _ in sources:
        operands += [key, value, length]
    shape = (batch, heads, parts)
    return pl.pallas_call(
        functools.partial(
            _kernel,
            layers=tuple(layer for *_, layer in sources),
            splits=tuple(splits),
            pieces=power_of_two_pieces(width),
            scale=1.0 / math.sqrt(width),
        ),
        grid=(parts, heads, batch),
        out_shape=tuple(jax.ShapeDtypeStruct((*shape, last), jnp.float32) for last in (width, 1, 1)),
        compiler_params=None if interpret else plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="attend_cached",
    )(*operands)


def power_of_two_pieces(width: int) -> tuple[tuple[int, int], ...]:
    """(start, size) of consecutive pieces of `width` features, sizes powers of two: all that Triton loads."""
    pieces, start = [], 0
    while start < width:
        size = 1 << ((width - start).bit_length() - 1)
        pieces.append((start, size))
        start += size
    return tuple(pieces)


def _kernel(*refs: Any, layers, splits, pieces, scale) -> None:
    """One part of one source, for one head of one sequence."""
    query_ref, *source_refs = refs[: 1 + 3 * len(splits)]
    outputs = refs[1 + 3 * len(splits) :]
    part, head, row = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    query = [query_ref[row, head, pl.ds(start, size)].astype(jnp.float32) * scale for start, size in pieces]
    first = 0
    for index, count in enumerate(splits):
        key_ref, value_ref, length_ref = source_refs[3 * index : 3 * index + 3]
        place = (row, head) if layers[index] is None else (layers[index], row, head)

        @pl.when((part >= first) & (part < first + count))
        def _(key_ref=key_ref, value_ref=value_ref, length_ref=length_ref, place=place, first=first, count=count):
            blocks = pl.cdiv(length_ref[row], LANES)
            blocks_per_part = pl.cdiv(blocks, count)
            begin = (part - first) * blocks_per_part
            end = jnp.minimum(begin + blocks_per_part, blocks)
            _stream(query, key_ref, value_ref, place, begin, end, length_ref[row], pieces, (row, head, part), outputs)

        first += count


def _stream(query, key_ref, value_ref, place, begin, end, length, pieces, target, outputs) -> None:
    """Reads blocks begin .. end - 1 of LANES rows and writes the part's sums, maximum and total to `outputs`."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, (LANES,), 0)

    def block(index, carry):
        top, total, sums = carry
        rows = pl.ds(index * LANES, LANES)
        scores = jnp.zeros((LANES,), jnp.float32)
        for (start, size), piece in zip(pieces, query):
            key = key_ref[(*place, pl.ds(start, size), rows)]
            scores += jnp.sum(key.astype(jnp.float32) * piece[:, None], axis=0)
        scores = jnp.where(lanes + index * LANES < length, scores, -jnp.inf)
        new_top = jnp.maximum(top, scores)
        base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
        factor, weight = jnp.exp(top - base), jnp.exp(scores - base)
        new_sums = []
        for (start, size), old in zip(pieces, sums):
            value = value_ref[(*place, pl.ds(start, size), rows)]
            new_sums.append(old * factor[None, :] + value.astype(jnp.float32) * weight[None, :])
        return new_top, total * factor + weight, tuple(new_sums)

    zeros = tuple(jnp.zeros((size, LANES), jnp.float32) for _, size in pieces)
    start = (jnp.full((LANES,), -jnp.inf, jnp.float32), jnp.zeros((LANES,), jnp.float32), zeros)
    top, total, sums = jax.lax.fori_loop(begin, end, block, start)
    # The finite stand-in lets parts without a valid row merge to nothing.
    part_top = jnp.maximum(jnp.max(top), -1e30)
    factor = jnp.exp(top - part_top)
    sums_ref, top_ref, total_ref = outputs
    for (start, size), values in zip(pieces, sums):
        sums_ref[(*target, pl.ds(start, size))] = jnp.sum(values * factor[None, :], axis=1)
    top_ref[(*target, 0)] = part_top
    total_ref[(*target, 0)] = jnp.sum(total * factor)
