"""GPU kernel that projects a chunk of rows to keys and values and writes these into the cache, in Pallas for Triton.

The plain version is `models.cached_attention.write_rows`, in which XLA multiplies, writes the products to memory, and
then reads them to add the bias, to rotate the keys and to write the cache. Here the products never leave the program
that computes them. With `tokens` the rows are looked up, as in `models.cached_attention.write_tokens`.

The two features of a rotated pair are in different halves of a head (`rope.rotate`). So a program multiplies its rows
with the weights of some pairs' first features, and with those of their second features, and has both of each pair.
"""

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from tlinformer_jax.kernels.common import call_kernel, dot, iota, masked_load, masked_store
from tlinformer_jax.kernels.key_value import KeyValue

# Pairs and rows of a program, and inner features that it multiplies at once; its warps and pipeline stages.
PAIR_TILE = 64
ROW_TILE = 128
INNER_TILE = 64
WARPS = 8
STAGES = 3


@flax.struct.dataclass
class PairWeights:
    """Weights and bias of keys and values by pairs of features: first the pairs of all keys' heads, then the values'.

    Pairs and inner features are padded with zeros to whole tiles.
    """

    kernel: Float[Array, "2 pairs inner"]  # The first features of all pairs, then the second ones
    bias: Float[Array, "2 pairs"]

    @classmethod
    def of(
        cls, kernel: Float[Array, "D 2 heads width"], bias: Float[Array, "2 heads width"], head_dim: int
    ) -> "PairWeights":
        """Sorts the weights of keys and values; features past `head_dim` are padding."""
        inner, _, heads, _ = kernel.shape
        halves = (2, heads, 2, head_dim // 2)
        kernel = kernel[..., :head_dim].reshape(inner, *halves).transpose(3, 1, 2, 4, 0).reshape(2, -1, inner)
        bias = bias[..., :head_dim].reshape(halves).transpose(2, 0, 1, 3).reshape(2, -1)
        more = (0, -kernel.shape[1] % PAIR_TILE)
        return cls(
            jnp.pad(kernel, ((0, 0), more, (0, -inner % INNER_TILE))), jnp.pad(bias, ((0, 0), more)).astype(jnp.float32)
        )


def project(
    cache: KeyValue,
    source: Float[Array, "sources D"],
    weights: PairWeights,
    tables: Sequence[Float[Array, "half rows"]],
    row: Array,
    start: Array,
    tokens: Int[Array, " rows"] | None = None,
    interpret: bool = False,
) -> KeyValue:
    """Projects rows, rotates the keys, and writes keys and values to sequence `row` from row `start` on.

    The number of rows is a multiple of ROW_TILE, and so is `start`; the cache is changed in place.

    Args:
      cache: [batch, heads, d_h, room], not int8.
      source: normalised rows, or with `tokens` those of the whole vocabulary.
      tables: cosines and sines of the rows' rotations.
      tokens: index into `source` for each row, clipped to the vocabulary; None if `source` contains the rows.
    """
    rows = source.shape[0] if tokens is None else tokens.size
    heads, width = cache.key.shape[1:3]
    # A multiple of a constant: so Triton knows that addresses are aligned, and writes several rows at once.
    place = jnp.stack([row, start // ROW_TILE]).astype(jnp.int32)
    return call_kernel(
        functools.partial(_project_kernel, heads=heads, half=width // 2, shape=source.shape),
        (pl.cdiv(heads * width, PAIR_TILE), rows // ROW_TILE),
        jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), cache),
        [cache, source, weights, tables, place, tokens],
        "project_history",
        interpret,
        aliases={number: number for number, _ in enumerate(jax.tree.leaves(cache))},
        num_warps=WARPS,
        num_stages=STAGES,
    )


def _project_kernel(
    _, source_ref, weights, table_refs, place_ref, tokens_ref, cache, *, heads: int, half: int, shape: tuple[int, int]
) -> None:
    """Projects a tile of rows to a tile of pairs."""
    tile, block = pl.program_id(0), pl.program_id(1)
    pairs, numbers = tile * PAIR_TILE + iota(PAIR_TILE), block * ROW_TILE + iota(ROW_TILE)
    # Ids past the history are arbitrary, so clip them.
    sources = numbers if tokens_ref is None else jnp.clip(masked_load(tokens_ref.at[numbers]), 0, shape[0] - 1)

    def step(index: Array, products: tuple[Array, Array]) -> tuple[Array, ...]:
        inner = index * INNER_TILE + iota(INNER_TILE)
        rows = masked_load(source_ref.at[sources[:, None], inner[None, :]], (inner < shape[1])[None, :])
        each = (masked_load(weights.kernel.at[side, pairs[:, None], inner[None, :]]) for side in (0, 1))
        return tuple(product + dot(kernel, rows, 1) for product, kernel in zip(products, each))

    zero = jnp.zeros((PAIR_TILE, ROW_TILE), jnp.float32)
    products = jax.lax.fori_loop(0, pl.cdiv(shape[1], INNER_TILE), step, (zero, zero))
    dtype = source_ref.dtype

    def biased(side: int) -> Array:
        # Round here like the plain version, so that both cache the same keys.
        bias = masked_load(weights.bias.at[side, pairs])[:, None]
        return (products[side].astype(dtype).astype(jnp.float32) + bias).astype(dtype)

    first, second = biased(0), biased(1)
    pair, to = pairs % half, (place_ref[1] + block) * ROW_TILE + iota(ROW_TILE)

    def write(ref, head: Array, one: Array, other: Array) -> None:
        """Writes pairs whose head exists."""
        mask = jnp.broadcast_to(((head >= 0) & (head < heads))[:, None], one.shape)
        for start, values in ((0, one), (half, other)):
            masked_store(
                ref.at[place_ref[0], head[:, None], (start + pair)[:, None], to[None, :]],
                values.astype(ref.dtype),
                mask,
            )

    head = pairs // half
    write(cache.value, jnp.where(head < heads, heads, head - heads), first, second)
    cos, sin = (masked_load(ref.at[pair[:, None], numbers[None, :]], (head < heads)[:, None]) for ref in table_refs)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    write(cache.key, head, first * cos - second * sin, first * sin + second * cos)
