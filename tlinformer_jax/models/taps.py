"""Key taps, an experiment: learned multiples of the rows before are added to the input of a block's first keys."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from tlinformer_jax.models.layers import LayerParams, project
from tlinformer_jax.models.recompute import map_steps
from tlinformer_jax.models.rope import Rope
from tlinformer_jax.models.windows import joined

# Factor from the parameters of token shift and key taps to s. An update of Adam changes a parameter by about the
# learning rate: at 3e-4 and without this factor, s would hardly leave 0 in a run, but must reach the order of 1.
SHIFT_SCALE = 10.0


def rows_before(rows: Float[Array, "batch length D"], back: int) -> Float[Array, "batch length D"]:
    """Returns the row `back` places before each row of a sequence; zeros before its first row."""
    return jnp.pad(rows, ((0, 0), (back, 0), (0, 0)))[:, : rows.shape[1]]


def tapped(
    params: LayerParams,
    rows: Float[Array, "batch length D"],
    before: Callable[[Array, int], Array] = rows_before,
) -> Float[Array, "batch length D"] | None:
    """Applies `config.key_taps`: the input of the keys is rows_t + sum_k s_k * rows_(t-k); None without taps.

    A query of block 1 can then find a row of C' by the tokens before it, although rows of C do not read each other. x's
    own keys need this only in block 0: later, rows of x have read the rows before them.

    Args:
      rows: from position 0 on, unless `before` knows better.
      before: returns the row k places before each row, zeros before position 0.
    """
    if not params.taps:
        return None
    total = rows.astype(jnp.float32)
    for back, tap in enumerate(params.taps, 1):
        total += SHIFT_SCALE * tap.astype(jnp.float32) * before(rows, back).astype(jnp.float32)
    return total.astype(rows.dtype)


def project_chunks(
    layer: LayerParams, chunks: Float[Array, "chunks b chunk D"], rope: Rope, filled: Array, parts: str
) -> tuple[Array, ...]:
    """Projects the first `filled` chunks of C' with their `tapped` keys, which read rows of the chunk before."""
    size, most = chunks.shape[2], len(layer.taps)
    places = jnp.arange(len(chunks))[:, None] * size - jnp.arange(most, 0, -1)
    ends = jnp.take(joined(chunks), jnp.maximum(places, 0), axis=1)
    ends = jnp.moveaxis(jnp.where((places < 0)[None, ..., None], 0, ends), 1, 0)

    def project_chunk(layer: LayerParams, rope: Rope, item: tuple[Any, Array]) -> tuple[Array, ...]:
        (rows, end), number = item
        longer = jnp.concatenate([end, rows], axis=1)
        key_rows = tapped(layer, rows, lambda _, back: longer[:, most - back : most - back + size])
        return project(layer, rows, rope.rows(number * size, size), parts, key_rows)

    return map_steps(project_chunk, layer, (chunks, ends), rope, filled)
