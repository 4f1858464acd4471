"""Key taps, an experiment: learned multiples of the rows before are added to the input of a block's first keys."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from tlinformer_jax.models.layers import LayerParams

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



def tap_sum(params: LayerParams, embedded: Float[Array, "batch length D"]) -> Float[Array, "batch length D"]:
    """Returns sum_k s_k * e_(t-k), which a later block adds to the input of the keys of C'."""
    total = jnp.zeros(embedded.shape, jnp.float32)
    for back, tap in enumerate(params.taps, 1):
        total += SHIFT_SCALE * tap.astype(jnp.float32) * rows_before(embedded, back).astype(jnp.float32)
    return total.astype(embedded.dtype)


def with_sum(rows: Array, sums: Sequence[Array]) -> Array | None:
    """Returns the input of the keys of C', given its rows; None without taps."""
    return None if not sums else (rows.astype(jnp.float32) + sums[0].astype(jnp.float32)).astype(rows.dtype)
