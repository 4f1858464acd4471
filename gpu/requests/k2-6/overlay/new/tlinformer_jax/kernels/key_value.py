"""Cached keys and values, in the compute dtype or in int8.

In int8 each row of each head has one scale, its largest absolute value over 127. A number x is stored as x / scale,
rounded to the nearest integer, so its error is at most half a scale. Readers never multiply a whole cache by its
scales: a score is (q . k) * key_scale, and a row's attention weight is multiplied by value_scale.
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
    """Cached keys (usually rotated) and values, each [..., batch, heads, d_h, rows]; leading axes count layers.

    The scales are [..., batch, heads, rows] for int8; otherwise None.
    """

    key: Array
    value: Array
    key_scale: Array | None = None
    value_scale: Array | None = None

    @property
    def rows(self) -> int:
        """Number of rows that fit."""
        return self.key.shape[-1]

    @property
    def cache_dtype(self) -> str:
        """'int8', or 'auto' for the compute dtype."""
        return "auto" if self.key_scale is None else "int8"

    def as_kept(self, rows: "KeyValue") -> "KeyValue":
        """Converts new keys and values to int8 with scales if this cache is int8; else returns them unchanged."""
        if self.key_scale is None:
            return rows
        (key, key_scale), (value, value_scale) = quantised(rows.key), quantised(rows.value)
        return KeyValue(key, value, key_scale, value_scale)

    def widened(self, dtype: jnp.dtype) -> "KeyValue":
        """Returns int8 keys and values times their scales, in `dtype`, for a few rows only; other dtypes unchanged."""
        if self.key_scale is None or self.value_scale is None:
            return self
        pairs = (self.key, self.key_scale), (self.value, self.value_scale)
        return KeyValue(*((whole * scale.astype(jnp.float32)[..., None, :]).astype(dtype) for whole, scale in pairs))


def value_dtype(query_dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype of the product of (weights * scales) and int8 values; float16 would underflow."""
    return jnp.dtype(jnp.bfloat16) if query_dtype == jnp.float16 else jnp.dtype(query_dtype)


def quantised(
    numbers: Float[Array, "*any d_h rows"],
) -> tuple[Int8[Array, "*any d_h rows"], Num[Array, "*any rows"]]:
    """Returns rows as integers, and the scale of each row."""
    wide = numbers.astype(jnp.float32)
    scale = row_scale(jnp.max(jnp.abs(wide), axis=-2))
    return to_integers(wide, scale[..., None, :]), scale.astype(SCALE_DTYPE)


def row_scale(largest: Float[Array, "*any"]) -> Float[Array, "*any"]:
    """Returns the scale of rows with largest absolute value `largest`: float32, rounded up to a bfloat16 value.

    Rounding works on the bits, since XLA may remove a conversion to bfloat16 and back.
    """
    bits = jax.lax.bitcast_convert_type(largest / LARGEST, jnp.uint32)
    return jax.lax.bitcast_convert_type((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000), jnp.float32)


def to_integers(numbers: Float[Array, "*any"], scale: Float[Array, "*scales"]) -> Int8[Array, "*any"]:
    """Returns numbers / scale, rounded to the nearest integer; 0 if `scale` is 0."""
    multiples = numbers / jnp.where(scale > 0, scale, 1.0)
    return (multiples + jnp.where(multiples < 0, -0.5, 0.5)).astype(jnp.int8)  # the conversion truncates
