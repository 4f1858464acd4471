"""Which rows of a history are worked on, on one device or on one of several that they are dealt out to."""

import flax.struct
import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import WindowedCache
from tlinformer_jax.decoding.words import WordProjections
from tlinformer_jax.models.rope import Rope, rope_table
from tlinformer_jax.parallel.split_rows import SplitRows


@flax.struct.dataclass
class Frame:
    """Where the rebuilt sequence stands.

    Attributes:
      row: the sequence's place in the batch, int32 [].
      length: n, rows of history, int32 [].
      start: h, the observation window's first row, int32 [].
      observed: its valid rows, n - h, int32 [].
      words: block 0's projections of every word, where the history is looked up in them.
      width: rows computed for it (static).
      split: how history rows are dealt out over devices (static); None where this device has all of them.
    """

    row: jax.Array
    length: jax.Array
    start: jax.Array
    observed: jax.Array
    words: WordProjections | None
    width: int = flax.struct.field(pytree_node=False)
    split: SplitRows | None = flax.struct.field(pytree_node=False)

    @property
    def held(self) -> jax.Array:
        """Rows of history that this device has, int32 []."""
        return self.length if self.split is None else self.split.count(self.length)

    def rope(self, config: ModelConfig, start: jax.Array, size: int) -> Rope:
        """Rotations of this device's history rows start .. start + size - 1."""
        if self.split is None:
            return rope_of(config, start, size)
        return rope_table(self.split.positions(start, size), config.head_dim)

    def ids(self, tokens: jax.Array, start: jax.Array, size: int) -> jax.Array:
        """Tokens of the same rows, int32 [1, size], out of those of the batch [batch, capacity or more]."""
        if self.split is None:
            return jax.lax.dynamic_slice(tokens, (self.row, start), (1, size))
        parts = self.split.parts
        return self.split.take(jax.lax.dynamic_slice(tokens, (self.row, start * parts), (1, size * parts)))

    def merged(self, output: jax.Array, lse: jax.Array) -> jax.Array:
        """Attention to the history of all devices from that to this one's and its log-sum-exp, float32."""
        return output if self.split is None else self.split.merge(output, lse)


def appended(
    config: ModelConfig, cache: WindowedCache, row: jax.Array, before: jax.Array
) -> tuple[jax.Array, jax.Array, Rope]:
    """The rows that a slide after `before` tokens of history appends: where they begin, tokens [1, rows], rotations."""
    size, split = config.generation_window, cache.split
    if split is None:
        return before, jax.lax.dynamic_slice(cache.tokens, (row, before), (1, size)), rope_of(config, before, size)
    # As many on every device. Some have one less to append: it writes again its last old row, or one more that is not
    # yet valid and is written again by the next slide.
    count = -(-size // split.parts)
    start = jnp.minimum(split.count(before), cache.room - count)
    positions = split.positions(start, count)
    return start, cache.tokens[row, positions][None], rope_table(positions, config.head_dim)


def rope_of(config: ModelConfig, start: jax.Array, length: int) -> Rope:
    """Rotations of rows start .. start + length - 1 of the sequence."""
    return rope_table(start + jnp.arange(length, dtype=jnp.int32), config.head_dim)
