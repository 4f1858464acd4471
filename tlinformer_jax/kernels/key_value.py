"""Cached keys and values, in the compute dtype or in int8.

In int8 each row of each head has one scale, its largest number over 127: a number x is kept as x / scale, rounded to
the nearest integer. So none moves by more than half a scale. Who reads never multiplies a whole cache by its scales: a
score is (q . k) * key_scale, and value_scale joins the weight that the row gets.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, Num

LARGEST = 127
SCALE_DTYPE = jnp.bfloat16


@flax.struct.dataclass
class KeyValue:
    """Cached keys, as a rule rotated, and values, each [..., batch, heads, d_h, rows]; leading axes count layers.

    In int8 they have scales, [..., batch, heads, rows]; else these are None.
    """

    key: Array
    value: Array
    key_scale: Array | None = None
    value_scale: Array | None = None

    @property
    def rows(self) -> int:
        """Rows there is room for."""
        return self.key.shape[-1]

    @property
    def cache_dtype(self) -> str:
        """'int8', or 'auto' for the compute dtype."""
        return "auto" if self.key_scale is None else "int8"

    def as_kept(self, rows: "KeyValue") -> "KeyValue":
        """Keys and values of other rows as this cache keeps its own."""
        if self.key_scale is None:
            return rows
        (key, key_scale), (value, value_scale) = quantised(rows.key), quantised(rows.value)
        return KeyValue(key, value, key_scale, value_scale)

    def widened(self, dtype: jnp.dtype) -> "KeyValue":
        """Without scales, in `dtype`: for a few rows only."""
        if self.key_scale is None or self.value_scale is None:
            return self
        pairs = (self.key, self.key_scale), (self.value, self.value_scale)
        return KeyValue(*((whole * scale.astype(jnp.float32)[..., None, :]).astype(dtype) for whole, scale in pairs))


def value_dtype(query_dtype: jnp.dtype) -> jnp.dtype:
    """In which weights times scales and int8 values are multiplied: their products may be too small for float16."""
    return jnp.dtype(jnp.bfloat16) if query_dtype == jnp.float16 else jnp.dtype(query_dtype)


def quantised(
    numbers: Float[Array, "*any d_h rows"],
) -> tuple[Int8[Array, "*any d_h rows"], Num[Array, "*any rows"]]:
    """Rows as integers, and the scale of each."""
    wide = numbers.astype(jnp.float32)
    scale = row_scale(jnp.max(jnp.abs(wide), axis=-2))
    return to_integers(wide, scale[..., None, :]), scale.astype(SCALE_DTYPE)


def row_scale(largest: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """What rows whose largest absolute number is `largest` are divided by: float32, rounded up to a bfloat16.

    It is rounded by its bits, since XLA may leave out a conversion to bfloat16 and back.
    """
    bits = jax.lax.bitcast_convert_type(largest / LARGEST, jnp.uint32)
    return jax.lax.bitcast_convert_type((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000), jnp.float32)


def to_integers(numbers: Float[Array, "*any"], scale: Float[Array, "*scales"]) -> Int8[Array, "*any"]:
    """Multiples of `scale`, to the nearest; 0 where that is 0."""
    multiples = numbers / jnp.where(scale > 0, scale, 1.0)
    return (multiples + jnp.where(multiples < 0, -0.5, 0.5)).astype(jnp.int8)  # the conversion cuts off
