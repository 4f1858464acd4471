"""Rotary position embedding whose angles are exact at every int32 position.

Feature pair i of a head (features 2i and 2i + 1) turns by position * 10000^(-2i / d_h) radians. At position one million
this product in float32 is off by 0.05 rad. Here the frequency is a 64-bit fraction of a turn, and integer overflow
takes its product with the position modulo one turn, exact to 2^-32 turns.

With `longest_wavelength` (p-RoPE, arXiv 2410.06205), pairs that need more positions than this for one turn do not
rotate. Training then sees all angles of the other pairs, so longer distances bring no new angles.
"""

import dataclasses
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
    """Rotations of consecutive positions, float32 [length, d_h / 2], or with a batch axis before.

    If g windows run together, the arrays are [g, length, d_h / 2], for rows [batch * g, length, ...].
    """

    cos: jax.Array
    sin: jax.Array

    def rows(self, start: Any, length: int) -> "Rope":
        """Returns rows start .. start + length - 1 of a table [rows, d_h / 2]; [g, length, d_h / 2] for starts [g]."""
        if np.ndim(start):
            return jax.vmap(lambda one: self.rows(one, length))(jnp.asarray(start))
        return jax.tree.map(lambda table: jax.lax.dynamic_slice_in_dim(table, start, length, axis=-2), self)


def frequency_words(head_dim: int, longest_wavelength: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns the frequencies of the d_h / 2 pairs in turns per position, as uint32 (high, low) words of fractions."""
    pairs = np.arange(head_dim // 2)
    turns = ROPE_BASE ** (-2.0 * pairs / head_dim) / (2 * math.pi)
    if longest_wavelength:
        turns[turns * longest_wavelength < 1] = 0.0
    fractions = [int(Fraction(float(turn)) * 2**64) for turn in turns]
    high = np.array([fraction >> 32 for fraction in fractions], np.uint32)
    low = np.array([fraction & 0xFFFFFFFF for fraction in fractions], np.uint32)
    return high, low


def rotary_angles(positions: jax.Array, head_dim: int, longest_wavelength: int = 0) -> jax.Array:
    """Returns the angles of `positions` (int32, any shape), in [-pi, pi): float32 [..., head_dim / 2]."""
    return _angles(positions[..., None], *frequency_words(head_dim, longest_wavelength))


def _angles(positions: jax.Array, high: np.ndarray, low: np.ndarray) -> jax.Array:
    """Returns the angles of positions at frequencies, broadcast against each other."""
    position = positions.astype(jnp.uint32)
    turn = position * high + _high_word(position, low)  # modulo 2^32, which is one turn
    return jax.lax.bitcast_convert_type(turn, jnp.int32).astype(jnp.float32) * np.float32(2 * math.pi / 2**32)


def rope_table(positions: jax.Array, head_dim: int, longest_wavelength: int = 0) -> Rope:
    """Returns the rotations of `positions` (int32, any shape), which must not be negative."""
    angles = rotary_angles(positions, head_dim, longest_wavelength)
    # The barrier makes XLA compute the table once instead of in every layer.
    return Rope(*jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles))))


@dataclasses.dataclass(frozen=True)
class Rotations:
    """Rotations of positions [length], not computed yet: some readers need rows first, others rows last."""

    positions: jax.Array
    head_dim: int
    longest_wavelength: int = 0

    def rows(self) -> Rope:
        """Returns cosines and sines with rows first, the order of `rotate`."""
        return rope_table(self.positions, self.head_dim, self.longest_wavelength)

    def columns(self) -> tuple[jax.Array, jax.Array]:
        """Returns cosines and sines with rows last, float32 [d_h / 2, length], the order of a cache."""
        # Not the transposed angles: XLA would compute only one of both tables, and transpose it.
        words = frequency_words(self.head_dim, self.longest_wavelength)
        angles = _angles(self.positions, *(word[:, None] for word in words))
        return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Rotates the feature pairs of x [batch, length, heads, width >= d_h] in float32; returns x's dtype.

    The pairs must be ordered by `pairs_apart`. Features after the pairs are padding and are not rotated.
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

    Applied to both queries and keys, this does not change their dot products.
    """
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    return jnp.swapaxes(pairs, -1, -2).reshape(x.shape)


def _high_word(a: jax.Array, b: np.ndarray) -> jax.Array:
    """Returns the high 32 bits of the 64-bit product of two uint32, computed from 16-bit halves."""
    a_high, a_low = a >> 16, a & 0xFFFF
    b_high, b_low = b >> 16, b & 0xFFFF
    middle = a_high * b_low + ((a_low * b_low) >> 16)
    carry = a_low * b_high + (middle & 0xFFFF)
    return a_high * b_high + (middle >> 16) + (carry >> 16)
