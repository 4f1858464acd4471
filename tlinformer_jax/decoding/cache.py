"""KV caches of the decoder, as typed pytrees that are passed in and returned, and their capacities.

Keys are rotated when they are written. Keys and values are [batch, heads, d_h, rows]. Keys and values that grow with a
sequence may be int8 (`kernels.key_value`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.sampling import INT8
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.kernels.key_value import SCALE_DTYPE, KeyValue
from tlinformer_jax.models.cached_attention import write_row
from tlinformer_jax.models.cached_rows import CachedRows
from tlinformer_jax.models.delta import DeltaState
from tlinformer_jax.models.key_rows import NO_TOKEN
from tlinformer_jax.parallel.mesh import platform
from tlinformer_jax.parallel.sharding import SplitRows

Carry = TypeVar("Carry")

# Capacities are rounded up to a length class, at most 1.3 times the rows needed. There are three classes per octave.
CLASS_STEPS = (16, 20, 26)
SMALLEST_CLASS = 1024
# Rows of history that `prefill` and `slide` process at once.
CHUNK_ROWS = 32768
# A loop of unknown length waits for the host once per round. This is about the number of rounds.
ROUNDS = 4


@flax.struct.dataclass
class WindowedCache:
    """State of TLinFormer or TConstFormer between tokens.

    Attributes:
      tokens: ids of history and generation window. A slide reads those of the history again, because the history of
        every block but the first depends on the window; with `config.causal_history` only those of z and the window.
      history: for each block, keys and values of all history rows in its `compress` layer; empty for TConstFormer,
        whose window does not read the history.
      context: keys and values of the compressed context in each block's hidden and `restore` layers,
        [num_blocks * (hidden_depth + 1), batch, heads, d_h, observed capacity]. None with `config.causal_history`.
      window: keys and values of the generation window in every layer, [num_layers, batch, heads, d_h, o + W_og]. Except
        in the first window, the first o rows overlap the window before. With `config.causal_history` the rows of z come
        first, also in `compress`: a token reads both in one softmax, and of `history` only the rows before z.
      history_length: n of each sequence.
      observed_length: valid rows of the compressed context.
      window_length: rows of the generation window so far.
      capacity: largest number of history rows (static).
      split: how the rows of `history` are split over devices, inside `jax.shard_map` (static); None for one device.
        Each device has all other arrays whole.
    """

    tokens: Int[Array, "batch ids"]
    history: tuple[KeyValue, ...]
    context: KeyValue | None
    window: KeyValue
    history_length: Int[Array, " batch"]
    observed_length: Int[Array, " batch"]
    window_length: Int[Array, " batch"]
    capacity: int = flax.struct.field(pytree_node=False)
    split: SplitRows | None = flax.struct.field(pytree_node=False, default=None)

    @property
    def cache_dtype(self) -> str:
        """'int8' or 'auto', see `sampling.GenerationConfig`."""
        return self.history[0].cache_dtype if self.history else "auto"

    @property
    def room(self) -> int:
        """Largest number of history rows on one device."""
        return self.capacity if self.split is None else self.capacity // self.split.parts

    @property
    def position(self) -> Int[Array, " batch"]:
        """Number of tokens so far, which is the next token's position."""
        return self.history_length + self.window_length

    @property
    def rows_in_window(self) -> Int[Array, " batch"]:
        """Number of valid rows of `window`."""
        return self.window_length if self.context is not None else self.observed_length + self.window_length

    def tokens_before(
        self, row: Int[Array, "..."], positions: Int[Array, " count"], back: int = 1
    ) -> Int[Array, " count"]:
        """Returns the ids `back` positions before these positions of sequence `row`, or of sequences `row`.

        NO_TOKEN where that is before position 0.
        """
        return jnp.where(positions < back, NO_TOKEN, self.tokens[row, positions - back])

    def last_token(self) -> Int[Array, " batch"]:
        """Returns each sequence's last token; NO_TOKEN if it has none."""
        return self.tokens_before(jnp.arange(self.tokens.shape[0]), self.position)

    def read_by(self, config: ModelConfig, layer: int) -> tuple[CachedRows, CachedRows | None]:
        """Returns the rows that a token reads: its window, and the history (`compress`) or the compressed context."""
        window = CachedRows(self.window, self.rows_in_window, layer)
        block, depth = divmod(layer, config.layers_per_block)
        if depth > 0 and self.context is not None:
            index = block * (config.hidden_depth + 1) + depth - 1
            return window, CachedRows(self.context, self.observed_length, index)
        if depth > 0 or not self.history:
            return window, None
        length, split = self.history_length, self.split
        if self.context is None:
            length = length - self.observed_length
        length = length if split is None else split.count(length)
        return window, CachedRows(self.history[block], length, split=split)

    def with_token(self, tokens: Int[Array, " batch"], own: KeyValue, active: Bool[Array, " batch"]) -> "WindowedCache":
        """Adds a new token to every active sequence; `own` contains its keys and values in each layer."""
        rows = jnp.arange(tokens.shape[0])
        return dataclasses.replace(
            self,
            tokens=self.tokens.at[rows, self.position].set(tokens),
            window=write_row(self.window, own, self.rows_in_window, active),
            window_length=self.window_length + active,
        )


@flax.struct.dataclass
class LayeredCache:
    """State of a baseline between tokens.

    Attributes:
      layers: keys and values in every attention layer, [layers, batch, heads, d_h, capacity]. For a sliding window the
        capacity is the window minus one, and row `position % capacity` contains a position.
      length: number of tokens so far.
      capacity: largest number of rows (static).
      last: each sequence's last token, NO_TOKEN before the first; None without `config.token_shift`.
      state: states of the Gated DeltaNet layers, [layers, batch, ...], which do not grow; None without such layers.
    """

    layers: KeyValue
    length: Int[Array, " batch"]
    capacity: int = flax.struct.field(pytree_node=False)
    last: Int[Array, " batch"] | None = None
    state: DeltaState | None = None

    @property
    def cache_dtype(self) -> str:
        """'int8' or 'auto', see `sampling.GenerationConfig`."""
        return self.layers.cache_dtype

    @property
    def position(self) -> Int[Array, " batch"]:
        """The next token's position."""
        return self.length

    def read_by(self, config: ModelConfig, layer: int) -> tuple[CachedRows, None]:
        """Returns the rows that a token reads; `layer` counts attention layers only."""
        return CachedRows(self.layers, jnp.minimum(self.length, self.capacity), layer), None

    def last_token(self) -> Int[Array, " batch"] | None:
        """Returns each sequence's last token, NO_TOKEN if it has none; None without `config.token_shift`."""
        return self.last

    def with_token(
        self, tokens: Int[Array, " batch"], own: KeyValue | None, active: Bool[Array, " batch"]
    ) -> "LayeredCache":
        """Adds a row to every active sequence; a sliding window overwrites its oldest row."""
        layers = self.layers if own is None else write_row(self.layers, own, self.length % self.capacity, active)
        last = None if self.last is None else jnp.where(active, tokens, self.last)
        return dataclasses.replace(self, layers=layers, length=self.length + active, last=last)

    def state_of(self, layer: int) -> DeltaState:
        """Returns the state of a Gated DeltaNet layer; `layer` counts Gated DeltaNet layers only."""
        assert self.state is not None
        return jax.tree.map(lambda array: array[layer], self.state)

    def with_states(self, states: Sequence[DeltaState], active: Bool[Array, " batch"]) -> "LayeredCache":
        """Replaces the states of active sequences by `states`, one for each Gated DeltaNet layer."""
        if not states:
            return self

        def of_active(old: Array, *new: Array) -> Array:
            return jnp.where(active.reshape(1, -1, *(1,) * (old.ndim - 2)), jnp.stack(new), old)

        return dataclasses.replace(self, state=jax.tree.map(of_active, self.state, *states))


Cache = WindowedCache | LayeredCache


def length_class(rows: int) -> int:
    """Returns the smallest length class of at least `rows` rows."""
    scale = SMALLEST_CLASS // CLASS_STEPS[0]
    while scale * CLASS_STEPS[-1] < rows:
        scale *= 2
    return next(steps * scale for steps in CLASS_STEPS if steps * scale >= rows)


def capacity_for(config: ModelConfig, tokens: int, parts: int = 1) -> int:
    """Returns the rows of a cache, split over `parts` devices, for sequences of up to `tokens` tokens.

    Rows are rounded up so that few lengths need a compilation: to a length class, or by at most an eighth if many.
    """
    if config.architecture == "sliding_window":
        return int(config.history_window) + config.generation_window - 1
    if not config.grows:
        return 1  # no layer has rows
    rows = -(-stored_rows(config, tokens) // parts)
    if rows <= CHUNK_ROWS:
        return length_class(rows) * parts
    granule = min(4 * CHUNK_ROWS, 1 << (rows.bit_length() - 4))
    return -(-rows // granule) * granule * parts


def stored_rows(config: ModelConfig, tokens: int) -> int:
    """Returns the rows that a cache stores for `tokens` tokens: those of the history, or for a baseline all."""
    return history_of(config, tokens) if config.windowed else tokens


def history_of(config: ModelConfig, tokens: int) -> int:
    """Returns n of a sequence of `tokens` tokens; the last token is always in the generation window."""
    size = config.generation_window
    return max((max(tokens, 1) - 1) // size * size - config.window_overlap, 0)


def chunk_rows(capacity: int, most: int | None = None) -> int:
    """Returns the rows processed at once: a divisor of `capacity`, at most `most` (None: CHUNK_ROWS)."""
    most = CHUNK_ROWS if most is None else most
    return capacity if capacity <= most else min(most, capacity & -capacity)


def for_chunks(
    length: Int[Array, ""],
    capacity: int,
    body: Callable[[Int[Array, ""], Carry], Carry],
    carry: Carry,
    most: int | None = None,
) -> Carry:
    """Runs `carry = body(first row, carry)` over the chunks that contain the first `length` rows.

    The loop continues to the end of a round, which is at most a quarter of the capacity, or one chunk.
    """
    size = chunk_rows(capacity, most)
    chunks = capacity // size
    per_round = min(chunks & -chunks, 1 << (max(1, chunks // ROUNDS).bit_length() - 1))

    def one_round(number: Int[Array, ""], carry: Carry) -> Carry:
        first = number * per_round
        return jax.lax.fori_loop(0, per_round, lambda chunk, carry: body((first + chunk) * size, carry), carry)

    return jax.lax.fori_loop(0, -(-length // (per_round * size)), one_round, carry)


def check_cache_dtype(config: ModelConfig, cache_dtype: str) -> None:
    """Raises a ConfigError for an int8 cache if no keys and values grow with a sequence."""
    if cache_dtype == INT8 and not has_growing_rows(config):
        allowed = f"needs a cache that grows; model.architecture = {config.architecture!r} has none"
        raise ConfigError("generation.cache_dtype", cache_dtype, allowed)


def has_growing_rows(config: ModelConfig) -> bool:
    """Returns whether cached keys and values grow with a sequence; in TConstFormer only the tokens grow."""
    return config.grows and config.architecture != "tconstformer"


def init_cache(
    config: ModelConfig, batch: int, capacity: int, split: SplitRows | None = None, cache_dtype: str = "auto"
) -> Cache:
    """Returns an empty cache for `batch` sequences of up to `capacity` rows, a multiple of the split's parts."""
    check_cache_dtype(config, cache_dtype)

    def rows(count: int, *leading: int, parts: int = 1, dtype: str = "auto") -> KeyValue:
        # Zeros, since masked values are multiplied by 0 and must be finite. Separate arrays, since they are donated.
        width = parts * padded_rows(count // parts)
        shape = (*leading, batch, config.num_heads, config.head_dim, width)
        if dtype != INT8:
            return KeyValue(*(jnp.zeros(shape, config.compute_dtype) for _ in range(2)))
        scales = (*shape[:-2], width)
        return KeyValue(
            *(jnp.zeros(shape, jnp.int8) for _ in range(2)), *(jnp.zeros(scales, SCALE_DTYPE) for _ in range(2))
        )

    def lengths() -> Int[Array, " batch"]:
        return jnp.zeros((batch,), jnp.int32)

    if not config.windowed:
        last = jnp.full((batch,), NO_TOKEN, jnp.int32) if config.token_shift else None
        attention = config.attention_layers
        recurrent = config.num_layers - attention
        state = DeltaState.zeros(config, recurrent, batch) if recurrent else None
        return LayeredCache(rows(capacity, attention, dtype=cache_dtype), lengths(), capacity, last, state)
    observed, own = max(config.observed_rows(capacity), 1), config.window_overlap + config.generation_window
    if config.causal_history:
        own += observed
    parts = 1 if split is None else split.parts
    kept = config.num_blocks if config.architecture == "tlinformer" else 0
    return WindowedCache(
        # Slices of an observation window may reach past its valid rows.
        tokens=jnp.zeros((batch, capacity + max(own, observed)), jnp.int32),
        history=tuple(rows(capacity, parts=parts, dtype=cache_dtype) for _ in range(kept)),
        context=None if config.causal_history else rows(observed, config.num_blocks * (config.hidden_depth + 1)),
        window=rows(own, config.num_layers),
        history_length=lengths(),
        observed_length=lengths(),
        window_length=lengths(),
        capacity=capacity,
        split=split,
    )


def padded_rows(rows: int) -> int:
    """Rounds `rows` up to whole vectors of 128 lanes, on accelerators."""
    return rows if platform() == "cpu" else -(-rows // 128) * 128
