"""Rotary position embedding whose angles are exact at every int32 position.

Feature pair i of a head (features 2i and 2i + 1) turns by position * 10000^(-2i / d_h) radians. A float32 product is
off by 0.05 rad at a million positions. Here the frequency is a 64-bit fraction of a turn, and its product with the
position is taken modulo one turn by wrapping integers: right to 2^-32 turns.

With `longest_wavelength` (p-RoPE, arXiv 2410.06205) pairs that take more positions for one turn stand still. Of the
others training sees all angles, however far apart two positions are later.
"""

import math
from fractions import Fraction
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

ROPE_BASE = 10000.0


@flax.struct.dataclass
class Rope:
    """Rotations of consecutive positions, float32 [length, d_h / 2], or with a batch before it.

    Also [g, length, d_h / 2] where g windows run together: for rows [batch * g, length, ...].
    """

    cos: jax.Array
    sin: jax.Array

    def rows(self, start: Any, length: int) -> "Rope":
        """Rows start .. start + length - 1 of a table [rows, d_h / 2]; with starts [g], the rows of each."""
        if np.ndim(start):
            return jax.vmap(lambda one: self.rows(one, length))(jnp.asarray(start))
        return jax.tree.map(lambda table: jax.lax.dynamic_slice_in_dim(table, start, length, axis=-2), self)


def frequency_words(head_dim: int, longest_wavelength: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Frequencies of the d_h / 2 pairs in turns per position, as 64-bit fractions: uint32 (high, low) words."""
    pairs = np.arange(head_dim // 2)
    turns = ROPE_BASE ** (-2.0 * pairs / head_dim) / (2 * math.pi)
    if longest_wavelength:
        turns[turns * longest_wavelength < 1] = 0.0
    fractions = [int(Fraction(float(turn)) * 2**64) for turn in turns]
    high = np.array([fraction >> 32 for fraction in fractions], np.uint32)
    low = np.array([fraction & 0xFFFFFFFF for fraction in fractions], np.uint32)
    return high, low


def rotary_angles(positions: jax.Array, head_dim: int, longest_wavelength: int = 0) -> jax.Array:
    """Angles of `positions` (int32, any shape), reduced to [-pi, pi): float32 [..., head_dim / 2]."""
    high, low = frequency_words(head_dim, longest_wavelength)
    position = positions.astype(jnp.uint32)[..., None]
    turn = position * high + _high_word(position, low)  # modulo 2^32, that is modulo one turn
    return jax.lax.bitcast_convert_type(turn, jnp.int32).astype(jnp.float32) * np.float32(2 * math.pi / 2**32)


def rope_table(positions: jax.Array, head_dim: int, longest_wavelength: int = 0) -> Rope:
    """Rotations of `positions` (int32, any shape); positions must not be negative."""
    angles = rotary_angles(positions, head_dim, longest_wavelength)
    # Asks XLA to compute the table once, not inside every layer that reads it.
    return Rope(*jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles))))


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotates the feature pairs of x [batch, length, heads, width >= d_h] in float32; returns x's dtype.

    The pairs lie as `pairs_apart` puts them. What follows them is padding and stays.
    """
    cos, sin = rope.cos[..., None, :], rope.sin[..., None, :]  # one rotation for all heads
    if cos.ndim == 4 and cos.shape[0] != x.shape[0]:
        cos, sin = (jnp.tile(table, (x.shape[0] // cos.shape[0], 1, 1, 1)) for table in (cos, sin))
    pairs = cos.shape[-1]
    wide = x.astype(jnp.float32)
    first, second = wide[..., :pairs], wide[..., pairs : 2 * pairs]
    rotated = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)
    return rotated if x.shape[-1] == 2 * pairs else jnp.concatenate([rotated, x[..., 2 * pairs :]], axis=-1)


def pairs_apart(x: jax.Array) -> jax.Array:
    """Reorders the last axis from interleaved pairs to all first members, then all second members.

    Done to queries and keys alike it changes no product of the two.
    """
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    return jnp.swapaxes(pairs, -1, -2).reshape(x.shape)


def _high_word(a: jax.Array, b: np.ndarray) -> jax.Array:
    """The high 32 bits of the 64-bit product of two uint32, by 16-bit halves."""
    a_high, a_low = a >> 16, a & 0xFFFF
    b_high, b_low = b >> 16, b & 0xFFFF
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    carry = a_low * b_high + (middle & 0xFFFF)
    return a_high * b_high + (middle >> 16) + (carry >> 16)
