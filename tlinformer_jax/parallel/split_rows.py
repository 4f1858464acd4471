"""Rows of a sequence split over an axis of the mesh, as functions that run inside `jax.shard_map`.

Row r lies on device r mod c, at place r div c: whatever length a history has, all devices hold equally much of it, and
what is appended lies at the end everywhere. Attention does not ask for the order of keys, so each device attends to its
own rows and the results are merged by their log-sum-exps. What devices tell each other grows with the rows that read,
never with those that are read.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class SplitRows:
    """How rows are split.

    Attributes:
      axis: of the mesh, manual where this is used.
      parts: c, its size.
    """

    axis: str
    parts: int

    def count(self, length: jax.Array | int) -> jax.Array:
        """Rows 0 .. length - 1 that lie on this device, int32, of the shape of `length`."""
        return jnp.maximum(length - self.index() + self.parts - 1, 0) // self.parts

    def positions(self, start: jax.Array | int, count: int) -> jax.Array:
        """Positions in the sequence of this device's rows start .. start + count - 1, int32 [count]."""
        return (start + jnp.arange(count, dtype=jnp.int32)) * self.parts + self.index()

    def take(self, rows: jax.Array, axis: int = 1) -> jax.Array:
        """This device's rows of an array that every device holds whole.

        Args:
          rows: [batch, length, ...], or with the rows along `axis`; their number is a multiple of c.
          axis: of the rows.

        Returns:
          [batch, length / c, ...].
        """
        shape = rows.shape[:axis], rows.shape[axis + 1 :]
        parted = rows.reshape(*shape[0], rows.shape[axis] // self.parts, self.parts, *shape[1])
        return jax.lax.dynamic_index_in_dim(parted, self.index(), axis + 1, keepdims=False)

    def gather(self, rows: jax.Array, start: jax.Array | int, length: int) -> jax.Array:
        """Rows start .. start + length - 1 of the sequence, on every device.

        Args:
          rows: this device's, [batch, rows, ...].
          start: position in the sequence; start + length is at most rows * c.
          length: static.

        Returns:
          [batch, length, ...].
        """
        # The first row may lie anywhere in its round of c.
        rounds = min(-(-(length + self.parts - 1) // self.parts), rows.shape[1])
        first = jnp.minimum(jnp.asarray(start, jnp.int32) // self.parts, rows.shape[1] - rounds)
        part = jax.lax.dynamic_slice_in_dim(rows, first, rounds, axis=1)
        whole = jax.lax.all_gather(part, self.axis, axis=2).reshape(rows.shape[0], -1, *rows.shape[2:])
        return jax.lax.dynamic_slice_in_dim(whole, start - first * self.parts, length, axis=1)

    def index(self) -> jax.Array:
        """Of this device on the axis, int32 []."""
        return jax.lax.axis_index(self.axis)
