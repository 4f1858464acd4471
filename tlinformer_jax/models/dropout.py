"""Dropout, and which values it drops: a function of a key and of a value's place, cheap enough for a GPU kernel.

A row of values, such as a query's attention weights, has a state of 64 bits: Threefry-2x32 of its matrix's and its
own number under the key. A value's number and that state give 32 bits by a few integer operations (`kernels.common`).
The value is dropped if they are below rate * 2^32.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.kernels.common import STEP, kept, mixed, threefry


@flax.struct.dataclass
class Dropout:
    """Dropout to apply: `rate` of the values. None stands for no dropout.

    Attributes:
      words: the key's two words, and the number of this device's part of the batch, uint32 [3]: masks do not
        depend on how many devices a batch is split over.
      rate: in [0, 1).
    """

    words: jax.Array
    rate: float = flax.struct.field(pytree_node=False)

    @classmethod
    def by_key(cls, key: jax.Array, rate: float, shard: jax.Array | int = 0) -> "Dropout":
        """The dropout that a key of `jax.random` draws, which is then for nothing else; `shard` of the batch."""
        return cls(jnp.append(jax.random.bits(key, (2,), jnp.uint32), jnp.asarray(shard).astype(jnp.uint32)), rate)

    def fold_in(self, number: jax.Array | int) -> "Dropout":
        """An independent dropout for part `number`."""
        # Few operations: a program has hundreds of parts, and Threefry for each would take long to compile.
        number = jnp.asarray(number).astype(jnp.uint32)
        first = mixed(self.words[0] + (number + np.uint32(1)) * np.uint32(STEP), self.words[1])
        return Dropout(jnp.stack([first, mixed(self.words[1] + first, number), self.words[2]]), self.rate)

    def __call__(self, x: jax.Array, first_row: jax.Array | int = 0) -> jax.Array:
        """Zeroes values of x [..., rows, features], the rows from `first_row` on, and scales the others up."""
        return _drop(x, self.words, first_row, self.rate)


def part_of(dropout: Dropout | None, number: jax.Array | int) -> Dropout | None:
    """An independent dropout for part `number`, or None."""
    return None if dropout is None else dropout.fold_in(number)


@functools.partial(jax.checkpoint, static_argnums=3, prevent_cse=False)
def _drop(x: jax.Array, words: jax.Array, first_row: jax.Array | int, rate: float) -> jax.Array:
    # Computed again in the backward pass: a mask is as many bytes as half of x.
    *leading, rows, width = (1,) * max(0, 2 - x.ndim) + x.shape
    mask = dropout_mask(words, math.prod(leading), 1, rows, width, rate, first_row).reshape(x.shape)
    return jnp.where(mask, x / (1.0 - rate), jnp.zeros_like(x))


def dropout_mask(
    words: jax.Array, batch: int, heads: int, queries: int, keys: int, rate: float, first_row: jax.Array | int = 0
) -> jax.Array:
    """Which attention weights are kept, bool [batch, heads, queries, keys]."""
    softmax = jnp.arange(batch * heads, dtype=jnp.uint32).reshape(batch, heads, 1, 1)
    softmax += words[2] * np.uint32(batch * heads)
    row = jnp.arange(queries, dtype=jnp.uint32)[:, None] + jnp.asarray(first_row).astype(jnp.uint32)
    state = threefry(words[0], words[1], *jnp.broadcast_arrays(softmax, row))
    return kept(*state, jnp.arange(keys), rate)
