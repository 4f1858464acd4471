"""GPU kernels with which prefill and slide write keys and values into the cache, in Pallas for Triton.

Each adds the bias, rotates the keys, and writes many rows of a sequence; separate operations would each read and write
all rows again. Plain versions: `models.cached_attention.write_rows` and `write_tokens` without kernels.

- `store_products` takes products whose rows are last, the order of the cache. An H200 writes 32,768 rows in 38 us, by
  XLA in 70 us; a slide of a million tokens takes 3.7% less.
- `store_tokens` looks tokens up, in a table that `pair_table` sorts: 43 us, `store` 72 us. With both kernels a prefill
  takes 4.7% less.
- `store` is for int8, which needs a scale for each row and head. Without it a prefill took 35% longer.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from tlinformer_jax.kernels.common import call_kernel, iota, masked_load, masked_store
from tlinformer_jax.kernels.key_value import KeyValue, row_scale, to_integers

# Rows that a program of `store` writes, and one of `store_products`.
STORE_TILE = 64
PRODUCT_TILE = 1024
# Rows and pairs that a program of `store_tokens` writes: long pieces of a table's row are read faster than short ones.
TOKEN_TILE = 32
PAIR_TILE = 128

# Cosines and sines of the rows' rotations, from `models.rope.Rotations.columns`.
Columns = Sequence[Float[Array, "half rows"]]


def store_products(
    cache: KeyValue,
    products: Float[Array, "2 heads d_h rows"],
    bias: Float[Array, "2 heads d_h"],
    columns: Columns,
    row: Array,
    start: Array,
    interpret: bool = False,
) -> KeyValue:
    """Writes products of keys and values to sequence `row` from row `start` on; the cache is not int8.

    The number of rows is a multiple of PRODUCT_TILE, and so is `start`; the cache is changed in place.

    Args:
      cache: [batch, heads, d_h, room].
      products: of keys and values, without bias and rotation.
    """
    _, heads, width, rows = products.shape
    kernel = functools.partial(_store_products_kernel, half=width // 2)
    grid = (heads, width // 2, rows // PRODUCT_TILE)
    position = (row, start // PRODUCT_TILE)
    return _write(kernel, grid, cache, [products, bias, columns], position, "store_products", interpret)


def _write(
    kernel: Any,
    grid: tuple[int, ...],
    cache: KeyValue,
    operands: list[Any],
    position: tuple[Array, Array],
    name: str,
    interpret: bool,
) -> KeyValue:
    """Runs a kernel that changes the cache in place; its last operand is `position`: sequence, first tile (or row)."""
    return call_kernel(
        kernel,
        grid,
        jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), cache),
        [cache, *operands, jnp.stack(position).astype(jnp.int32)],
        name,
        interpret,
        aliases={number: number for number, _ in enumerate(jax.tree.leaves(cache))},
        num_warps=4,
        num_stages=1,
    )


def _store_products_kernel(_, products_ref, bias_ref, column_refs, position_ref, cache, *, half: int) -> None:
    """Stores a tile of rows of one pair of features of a head."""
    head, pair, tile = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    numbers, features = tile * PRODUCT_TILE + iota(PRODUCT_TILE), (pair, half + pair)
    to = _aligned(position_ref, tile, PRODUCT_TILE)

    # All loads start before the first value is used.
    loaded = [[masked_load(products_ref.at[part, head, feature, numbers]) for feature in features] for part in (0, 1)]
    cos, sin = (masked_load(ref.at[pair, numbers]) for ref in column_refs)

    def biased(part: int) -> list[Array]:
        bias = [bias_ref[part, head, feature].astype(jnp.float32) for feature in features]
        # Round here like the plain version, so that both cache the same keys.
        return [(rows.astype(jnp.float32) + one).astype(rows.dtype) for rows, one in zip(loaded[part], bias)]

    def write(ref, rows: list[Array]) -> None:
        for feature, values in zip(features, rows):
            masked_store(ref.at[position_ref[0], head, feature, to], values.astype(ref.dtype))

    one, other = (values.astype(jnp.float32) for values in biased(0))
    write(cache.key, [one * cos - other * sin, one * sin + other * cos])
    write(cache.value, biased(1))


def _aligned(position_ref, tile: Array, size: int) -> Array:
    """Returns a tile's rows in the cache; a multiple of a constant tells Triton that it can write several at once."""
    return (position_ref[1] + tile) * size + iota(size)


def pair_table(
    products: Float[Array, "V 2 heads width"], bias: Float[Array, "2 heads width"], head_dim: int
) -> Float[Array, "V 2 2 pairs"]:
    """Returns the vocabulary's keys and values, not rotated, as `store_tokens` reads them: in halves of all heads.

    First are those of keys, and of these the first features of all pairs.
    """
    both = (products.astype(jnp.float32) + bias.astype(jnp.float32)).astype(products.dtype)[..., :head_dim]
    vocab_size, parts, heads, width = both.shape
    halves = jnp.swapaxes(both.reshape(vocab_size, parts, heads, 2, width // 2), 2, 3)
    return halves.reshape(vocab_size, parts, 2, heads * width // 2)


def store_tokens(
    cache: KeyValue,
    table: Float[Array, "V 2 2 pairs"],
    columns: Columns,
    row: Array,
    start: Array,
    tokens: Int[Array, " rows"],
    interpret: bool = False,
) -> KeyValue:
    """Writes keys and values of tokens to sequence `row` from row `start` on; the cache is not int8.

    The number of rows is a multiple of TOKEN_TILE, and so is `start`; the cache is changed in place.

    Args:
      table: from `pair_table`.
      tokens: each row's token, clipped to the vocabulary.
    """
    vocab_size, _, _, pairs = table.shape
    kernel = functools.partial(_store_tokens_kernel, half=cache.key.shape[2] // 2, vocab_size=vocab_size)
    grid = (pl.cdiv(pairs, PAIR_TILE), tokens.size // TOKEN_TILE)
    position = (row, start // TOKEN_TILE)
    return _write(kernel, grid, cache, [table, columns, tokens], position, "store_tokens", interpret)


def _store_tokens_kernel(
    _, table_ref, column_refs, tokens_ref, position_ref, cache, *, half: int, vocab_size: int
) -> None:
    """Stores a tile of rows of some pairs of features."""
    tile = pl.program_id(1)
    pairs, numbers = pl.program_id(0) * PAIR_TILE + iota(PAIR_TILE), tile * TOKEN_TILE + iota(TOKEN_TILE)
    there, to = pairs < table_ref.shape[3], _aligned(position_ref, tile, TOKEN_TILE)
    head, pair = pairs // half, pairs % half
    # Ids past the history are arbitrary, so clip them.
    tokens = jnp.clip(masked_load(tokens_ref.at[numbers]), 0, vocab_size - 1)

    # All loads start before the first value is used.
    loaded = [
        [masked_load(table_ref.at[tokens[:, None], part, side, pairs[None, :]], there[None, :]) for side in (0, 1)]
        for part in (0, 1)
    ]

    def write(ref, side: int, values: Array) -> None:
        target = ref.at[position_ref[0], head[:, None], (side * half + pair)[:, None], to[None, :]]
        masked_store(target, values.astype(ref.dtype), jnp.broadcast_to(there[:, None], values.shape))

    one, other = (jnp.transpose(rows).astype(jnp.float32) for rows in loaded[0])
    cos, sin = (masked_load(ref.at[pair[:, None], numbers[None, :]], there[:, None]) for ref in column_refs)
    write(cache.key, 0, one * cos - other * sin)
    write(cache.key, 1, one * sin + other * cos)
    for side in (0, 1):
        write(cache.value, side, jnp.transpose(loaded[1][side]))


def store(
    cache: KeyValue,
    projected: Float[Array, "sources 2 heads width"],
    bias: Float[Array, "2 heads width"],
    tables: Sequence[Float[Array, "rows half"]],
    row: Array,
    start: Array,
    tokens: Int[Array, " rows"] | None = None,
    interpret: bool = False,
) -> KeyValue:
    """Writes products of keys and values, whose rows are not last, to sequence `row` from row `start` on.

    The number of rows is a multiple of STORE_TILE; the cache is changed in place.

    Args:
      cache: [batch, heads, d_h, room].
      projected: products of keys and values, without bias and rotation; those of the rows, or with `tokens` those of
        the whole vocabulary. Features past d_h are padding.
      bias: bias of keys and values.
      tables: cosines and sines of the rows' rotations.
      tokens: index into `projected` for each row, clipped to the vocabulary; None if `projected` contains the rows.
    """
    rows = projected.shape[0] if tokens is None else tokens.size
    kernel = functools.partial(_store_kernel, half=cache.key.shape[2] // 2, vocab_size=projected.shape[0])
    grid = (rows // STORE_TILE, projected.shape[2])
    return _write(kernel, grid, cache, [projected, bias, tables, tokens], (row, start), "store_history", interpret)


def _store_kernel(
    _, projected_ref, bias_ref, table_refs, tokens_ref, position_ref, cache, *, half: int, vocab_size: int
) -> None:
    """Stores a tile of rows of one head, in halves: the two features of a rotated pair are in different halves."""
    tile, head = pl.program_id(0), pl.program_id(1)
    pairs = iota(pl.next_power_of_2(half))
    numbers = tile * STORE_TILE + iota(STORE_TILE)
    to = position_ref[1] + numbers
    there = (pairs < half)[None, :]
    # Ids past the history are arbitrary, so clip them.
    sources = numbers if tokens_ref is None else jnp.clip(masked_load(tokens_ref.at[numbers]), 0, vocab_size - 1)

    def load(part: int) -> list[Array]:
        halves = []
        for first in (0, half):
            rows = masked_load(projected_ref.at[sources[:, None], part, head, first + pairs[None, :]], there)
            bias = masked_load(bias_ref.at[part, head, first + pairs], pairs < half)
            # Round here like the plain version, so that both cache the same keys.
            halves.append((rows.astype(jnp.float32) + bias.astype(jnp.float32)).astype(rows.dtype))
        return halves

    def write(ref, scale_ref, halves: list[Array]) -> None:
        if scale_ref is not None:
            wide = [block.astype(projected_ref.dtype).astype(jnp.float32) for block in halves]
            scale = row_scale(jnp.maximum(*(jnp.max(jnp.abs(block), axis=1) for block in wide)))
            halves = [to_integers(block, scale[:, None]) for block in wide]
            masked_store(scale_ref.at[position_ref[0], head, to], scale.astype(scale_ref.dtype))
        for first, block in zip((0, half), halves):
            target = ref.at[position_ref[0], head, first + pairs[:, None], to[None, :]]
            mask = jnp.broadcast_to((pairs < half)[:, None], (pairs.shape[0], STORE_TILE))
            masked_store(target, jnp.transpose(block.astype(ref.dtype)), mask)

    cos, sin = (masked_load(ref.at[numbers[:, None], pairs[None, :]], there) for ref in table_refs)
    one, other = (block.astype(jnp.float32) for block in load(0))
    write(cache.key, cache.key_scale, [one * cos - other * sin, one * sin + other * cos])
    write(cache.value, cache.value_scale, load(1))
