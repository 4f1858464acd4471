"""KV caches of the decoder: pytrees that are passed in and returned, and how many rows they have room for.

Keys are rotated when they are written. Keys and values have the shape [batch, heads, d_h, rows], see
`models.cached_attention`.
"""

from collections.abc import Callable
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.cached_attention import KeyValue
from tlinformer_jax.parallel.batch_split import SplitRows
from tlinformer_jax.parallel.mesh import platform

Carry = TypeVar("Carry")

# Capacities are rounded up to a length class: at most 1.3 times the rows needed, three classes per octave.
CLASS_STEPS = (16, 20, 26)
SMALLEST_CLASS = 1024
# Rows of history that `prefill` and `slide` process at once.
CHUNK_ROWS = 32768
# A loop whose length is known only at run time waits for the host once per round. It takes about this many rounds.
ROUNDS = 4


@flax.struct.dataclass
class WindowedCache:
    """State of TLinFormer or TConstFormer between tokens.

    Attributes:
      tokens: ids of history and generation window, [batch, capacity + room]. A slide needs the history's ids, because
        every block but the first sees a history that depends on the window.
      history: per block, keys and values of all history rows under `compress`, each [batch, heads, d_h, capacity];
        empty for TConstFormer, whose window does not read them.
      context: of the compressed context, under each block's hidden and `restore` layers,
        [num_blocks * (hidden_depth + 1), batch, heads, d_h, observed capacity].
      window: of the generation window under every layer, [num_layers, batch, heads, d_h, W_og].
      history_length: n of each sequence.
      observed_length: valid rows of the compressed context.
      window_length: tokens in the generation window.
      capacity: rows of history there is room for (static).
      split: how the rows of `history` are split over the devices of a mesh (static). Inside `jax.shard_map` a device
        has its share of them, and everything else whole. None for one device.
    """

    tokens: Int[Array, "batch ids"]
    history: tuple[KeyValue, ...]
    context: KeyValue
    window: KeyValue
    history_length: Int[Array, " batch"]
    observed_length: Int[Array, " batch"]
    window_length: Int[Array, " batch"]
    capacity: int = flax.struct.field(pytree_node=False)
    split: SplitRows | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def room(self) -> int:
        """Rows of history that one device has room for."""
        return self.capacity if self.split is None else self.capacity // self.split.parts

    @property
    def position(self) -> Int[Array, " batch"]:
        """Tokens so far, which is the next token's position."""
        return self.history_length + self.window_length


@flax.struct.dataclass
class LayeredCache:
    """State of a baseline between tokens.

    Attributes:
      layers: keys and values under every layer, [num_layers, batch, heads, d_h, capacity]. The capacity of a sliding
        window is the window minus one; row `position % capacity` holds a position.
      length: tokens so far.
      capacity: rows there is room for (static).
    """

    layers: KeyValue
    length: Int[Array, " batch"]
    capacity: int = flax.struct.field(pytree_node=False)

    @property
    def position(self) -> Int[Array, " batch"]:
        """The next token's position."""
        return self.length


Cache = WindowedCache | LayeredCache


def length_class(rows: int) -> int:
    """The smallest length class that holds `rows`."""
    scale = SMALLEST_CLASS // CLASS_STEPS[0]
    while scale * CLASS_STEPS[-1] < rows:
        scale *= 2
    return next(steps * scale for steps in CLASS_STEPS if steps * scale >= rows)


def capacity_for(config: ModelConfig, tokens: int, final: int | None = None, parts: int = 1) -> int:
    """Rows that a cache for sequences of `tokens` tokens gets: history rows, or for a baseline rows of all tokens.

    Args:
      config: of the model.
      tokens: length of the longest sequence.
      final: its length in the end, if known. A cache at most one class short of that gets what it needs in the end,
        without the class's slack.
      parts: devices that the rows are split over.
    """
    if config.architecture == "sliding_window":
        return int(config.history_window) + config.generation_window - 1
    rows, last = (-(-stored_rows(config, length) // parts) for length in (tokens, final or tokens))
    if last * 10 <= rows * 13 and last > CHUNK_ROWS:
        granule = min(4 * CHUNK_ROWS, 1 << (last.bit_length() - 4))  # an eighth of it at most
        return -(-last // granule) * granule * parts
    return length_class(rows) * parts


def stored_rows(config: ModelConfig, tokens: int) -> int:
    """Rows that grow with a sequence of `tokens` tokens: history rows, or for a baseline all."""
    return history_of(config, tokens) if config.windowed else tokens


def history_of(config: ModelConfig, tokens: int) -> int:
    """History length n of a sequence of `tokens` tokens; its last token is always in the generation window."""
    size = config.generation_window
    return (max(tokens, 1) - 1) // size * size


def chunk_rows(capacity: int, most: int | None = None) -> int:
    """Rows processed at once, at most `most` (None: CHUNK_ROWS): all of a small capacity, else a power of two that
    divides it."""
    most = CHUNK_ROWS if most is None else most
    return capacity if capacity <= most else min(most, capacity & -capacity)


def for_chunks(
    length: Int[Array, ""],
    capacity: int,
    body: Callable[[Int[Array, ""], Carry], Carry],
    carry: Carry,
    most: int | None = None,
) -> Carry:
    """Runs `carry = body(first row, carry)` over the chunks of `chunk_rows(capacity, most)` that hold `length` rows.

    It continues to the end of a round, at most a quarter of the capacity further.
    """
    size = chunk_rows(capacity, most)
    chunks = capacity // size
    per_round = min(chunks & -chunks, 1 << (max(1, chunks // ROUNDS).bit_length() - 1))

    def one_round(number: Int[Array, ""], carry: Carry) -> Carry:
        first = number * per_round
        return jax.lax.fori_loop(0, per_round, lambda chunk, carry: body((first + chunk) * size, carry), carry)

    return jax.lax.fori_loop(0, -(-length // (per_round * size)), one_round, carry)


def init_cache(config: ModelConfig, batch: int, capacity: int, split: SplitRows | None = None) -> Cache:
    """An empty cache for `batch` sequences with room for `capacity` rows each, a multiple of the split's parts."""

    def rows(count: int, *leading: int, parts: int = 1) -> KeyValue:
        # Zeros, because a masked value still gets weight 0. Two arrays, because they are donated.
        width = parts * padded_rows(count // parts)
        shape = (*leading, batch, config.num_heads, config.head_dim, width)
        return KeyValue(jnp.zeros(shape, config.compute_dtype), jnp.zeros(shape, config.compute_dtype))

    def lengths() -> Int[Array, " batch"]:
        return jnp.zeros((batch,), jnp.int32)

    if not config.windowed:
        return LayeredCache(rows(capacity, config.num_layers), lengths(), capacity)
    observed = max(config.observed_rows(capacity), 1)
    parts = 1 if split is None else split.parts
    kept = config.num_blocks if config.architecture == "tlinformer" else 0
    return WindowedCache(
        # The slice of an observation window may reach past its valid rows.
        tokens=jnp.zeros((batch, capacity + max(config.generation_window, observed)), jnp.int32),
        history=tuple(rows(capacity, parts=parts) for _ in range(kept)),
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
