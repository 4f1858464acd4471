"""The decoder's caches: typed pytrees, passed in and returned, and the room they are given.

All keys are rotated once, when they are written. Cached keys and values lie as [batch, heads, d_h, rows], see
`models.cached_attention`.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.cached_attention import KeyValue
from tlinformer_jax.parallel.split_rows import SplitRows
from tlinformer_jax.parallel.target import platform

# Lengths are rounded up to a class: at most 1.3 times the rows needed, three classes an octave.
CLASS_STEPS = (16, 20, 26)
SMALLEST_CLASS = 1024
# Rows of history that `prefill` and `slide` work on at once.
CHUNK_ROWS = 32768
# A loop whose length is known at run time only waits for the host once a round; it takes about so many rounds.
ROUNDS = 4


@flax.struct.dataclass
class WindowedCache:
    """State of TLinFormer or TConstFormer between tokens.

    Attributes:
      tokens: ids of history and generation window, int32 [batch, capacity + room]; a slide needs the history's ids,
        because every block but the first sees a history that depends on the window.
      history: per block, keys and values of all history rows under `compress`, each [batch, heads, d_h, capacity];
        empty for TConstFormer, whose window does not read them.
      context: of the compressed context, under each block's hidden and `restore` layers,
        [num_blocks * (hidden_depth + 1), batch, heads, d_h, observed capacity].
      window: of the generation window under every layer, [num_layers, batch, heads, d_h, W_og].
      history_length: n of each sequence, int32 [batch].
      observed_length: valid rows of the compressed context, int32 [batch].
      window_length: tokens in the generation window, int32 [batch].
      capacity: rows of history there is room for (static).
      split: how the rows of `history` are split over the devices of a mesh (static); inside `jax.shard_map` a
        device has its share of them, and everything else whole. None where one device has them all.
    """

    tokens: jax.Array
    history: tuple[KeyValue, ...]
    context: KeyValue
    window: KeyValue
    history_length: jax.Array
    observed_length: jax.Array
    window_length: jax.Array
    capacity: int = flax.struct.field(pytree_node=False)
    split: SplitRows | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def room(self) -> int:
        """Rows of history that a device has room for."""
        return self.capacity if self.split is None else self.capacity // self.split.parts

    @property
    def position(self) -> jax.Array:
        """Tokens so far, that is the next token's position, int32 [batch]."""
        return self.history_length + self.window_length


@flax.struct.dataclass
class LayeredCache:
    """State of a baseline between tokens.

    Attributes:
      layers: keys and values under every layer, [num_layers, batch, heads, d_h, capacity]. The sliding window's
        capacity is its window less one: row `position % capacity` holds a position.
      length: tokens so far, int32 [batch].
      capacity: rows there is room for (static).
    """

    layers: KeyValue
    length: jax.Array
    capacity: int = flax.struct.field(pytree_node=False)

    @property
    def position(self) -> jax.Array:
        """The next token's position, int32 [batch]."""
        return self.length


Cache = WindowedCache | LayeredCache


def length_class(rows: int) -> int:
    """The smallest length class that holds `rows`: at most 1.3 times as many, from 1,024 on."""
    scale = SMALLEST_CLASS // CLASS_STEPS[0]
    while True:
        for steps in CLASS_STEPS:
            if steps * scale >= rows:
                return steps * scale
        scale *= 2


def capacity_for(config: ModelConfig, tokens: int, final: int | None = None, parts: int = 1) -> int:
    """Rows a cache needs for sequences of `tokens` tokens, in the unit that the architecture stores.

    Args:
      config: of the model.
      tokens: tokens of the longest sequence.
      final: tokens it will have in the end, where that is known: a cache that is at most one class short of it is
        made for it at once, without the class's slack.
      parts: devices that the rows are split over; each gets the room that its share needs.
    """
    if config.architecture == "sliding_window":
        return int(config.history_window) + config.generation_window - 1
    rows, last = (-(-stored_rows(config, length) // parts) for length in (tokens, final or tokens))
    if last * 10 <= rows * 13 and last > CHUNK_ROWS:
        granule = min(4 * CHUNK_ROWS, 1 << (last.bit_length() - 4))  # an eighth of it at most
        return -(-last // granule) * granule * parts
    return length_class(rows) * parts


def stored_rows(config: ModelConfig, tokens: int) -> int:
    """Rows that grow with the sequence, for one of `tokens` tokens: history rows, or for a baseline all."""
    if not config.windowed:
        return tokens
    return history_of(config, tokens)


def history_of(config: ModelConfig, tokens: int) -> int:
    """History length n of a sequence of `tokens` tokens; its last token is always in the generation window."""
    size = config.generation_window
    return (max(tokens, 1) - 1) // size * size


def observed_capacity(config: ModelConfig, capacity: int) -> int:
    """Rows the compressed context may have while the history is at most `capacity` rows."""
    return max(config.observed_rows(capacity), 1)


def chunk_rows(capacity: int, most: int | None = None) -> int:
    """Rows worked on at once, at most `most` (None: CHUNK_ROWS): all of a small capacity, else a power of two that
    divides it."""
    most = CHUNK_ROWS if most is None else most
    return capacity if capacity <= most else min(most, capacity & -capacity)


def for_chunks(
    length: jax.Array, capacity: int, body: Callable[[jax.Array, Any], Any], carry: Any, most: int | None = None
) -> Any:
    """Runs `carry = body(first row, carry)` over the chunks of `chunk_rows(capacity, most)` that hold `length` rows.

    It goes on to the end of a round, at most a quarter of the capacity further.
    """
    size = chunk_rows(capacity, most)
    chunks = capacity // size
    most = max(1, chunks // ROUNDS)
    each = min(chunks & -chunks, 1 << (most.bit_length() - 1))

    def one_round(number: jax.Array, carry: Any) -> Any:
        return jax.lax.fori_loop(0, each, lambda chunk, carry: body((number * each + chunk) * size, carry), carry)

    return jax.lax.fori_loop(0, -(-length // (each * size)), one_round, carry)


def init_cache(config: ModelConfig, batch: int, capacity: int, split: SplitRows | None = None) -> Cache:
    """An empty cache for `batch` sequences with room for `capacity` rows each, a multiple of the split's parts."""
    heads, width, dtype = config.num_heads, config.head_dim, config.compute_dtype

    def rows(count: int, *leading: int, parts: int = 1) -> KeyValue:
        # Zeros, not memory as it comes: a value times a weight of 0 must be 0. Twice, because they are donated.
        shape = (*leading, batch, heads, width, parts * padded_rows(count // parts))
        return KeyValue(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def lengths() -> jax.Array:
        return jnp.zeros((batch,), jnp.int32)

    if not config.windowed:
        return LayeredCache(rows(capacity, config.num_layers), lengths(), capacity)
    observed = observed_capacity(config, capacity)
    kept = config.num_blocks if config.architecture == "tlinformer" else 0
    return WindowedCache(
        # The slice of an observation window may reach past its valid rows.
        tokens=jnp.zeros((batch, capacity + max(config.generation_window, observed)), jnp.int32),
        history=tuple(rows(capacity, parts=1 if split is None else split.parts) for _ in range(kept)),
        context=rows(observed, config.num_blocks * (config.hidden_depth + 1)),
        window=rows(config.generation_window, config.num_layers),
        history_length=lengths(),
        observed_length=lengths(),
        window_length=lengths(),
        capacity=capacity,
        split=split,
    )


def padded_rows(rows: int) -> int:
    """`rows` rounded up to whole vectors of 128 lanes, on accelerators."""
    return rows if platform() == "cpu" else -(-rows // 128) * 128
