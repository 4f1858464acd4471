"""Sequences generated together: one cache, lengths and window phases of their own."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.decoding.accounting import CacheBytes, CacheLedger, cache_bytes
from tlinformer_jax.decoding.cache import Cache, WindowedCache
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.decoding.loop import MAX_STEPS, Sequences, jit_run_steps, jit_sample_next
from tlinformer_jax.decoding.sampling import seen_tokens
from tlinformer_jax.decoding.settings import GenerationConfig
from tlinformer_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Drawn:
    """New tokens of every sequence.

    Attributes:
      tokens: for each sequence those it got, the stop token included; empty where it had ended before.
      logprobs: their log-probabilities in nats, or None.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]] | None


class Batch:
    """Draws the tokens of several sequences; call `start` once, then `advance` as often as needed.

    On the device, sequences advance together until the window of one is full; the host, which knows all lengths,
    then slides that one alone. So sequences whose windows are out of step cost one call each in generation_window
    tokens, and each slide costs what it costs a sequence alone; nothing is slid that is not full.

    Attributes:
      active: which sequences have not ended, bool [batch].
      ledger: lengths, hits and misses.
    """

    def __init__(
        self, decoder: Decoder, prompts: Sequence[np.ndarray], config: GenerationConfig, keys: jax.Array
    ) -> None:
        """Prepares a batch.

        Args:
          decoder: of the model.
          prompts: ids in the vocabulary, each int [length >= 1].
          config: of the generation, its stop_tokens not None.
          keys: one for each sequence, typed keys [batch].
        """
        self._decoder, self._prompts, self._keys = decoder, prompts, keys
        self._mode, self._values = config.sampling.mode(config.logprobs), config.sampling.values()
        self._stop = sorted(set(config.stop_tokens or ()))
        # Padded to a power of two with an id that no token has, so that few lengths are compiled for.
        room = 1 << max(len(self._stop) - 1, 0).bit_length()
        self._stop_array = np.array([*self._stop, *[-1] * (room - len(self._stop))], np.int32)
        self.ledger = CacheLedger(decoder.config, len(prompts))
        self.active = np.ones(len(prompts), bool)
        self._halted = False  # whether the host has ended sequences that the device does not know of
        self._longest = max((len(prompt) for prompt in prompts), default=0)
        self._final = self._longest + config.max_new_tokens
        self._cache: Cache | None = None
        self._sequences: Sequences | None = None
        self._bytes = CacheBytes({}, None)

    def start(self) -> Drawn:
        """Fills the cache from the prompts, one after another; draws the first token of each sequence."""
        cache, rows = self._decoder.init_cache(len(self._prompts), self._longest, self._final), []
        for row, prompt in enumerate(self._prompts):
            cache, logits = self._decoder.prefill(cache, row, prompt)
            self.ledger.prefilled(row, len(prompt))
            rows.append(logits)
        self._cache, seen = cache, None
        if self._mode.repetition_penalty:
            seen = jnp.asarray(
                seen_tokens([prompt.tolist() for prompt in self._prompts], self._decoder.config.vocab_size)
            )
        batch = len(rows)
        sequences = Sequences(jnp.zeros(batch, jnp.int32), self._keys, jnp.ones(batch, bool), seen)
        positions = self.ledger.lengths.astype(np.int32)
        self._sequences, tokens, logprobs = jit_sample_next(
            self._mode, self._values, self._stop_array, sequences, positions, jnp.stack(rows)
        )
        return self._collect(np.asarray(tokens)[None], None if logprobs is None else np.asarray(logprobs)[None], 0)

    def advance(self, most: int) -> Drawn:
        """Feeds the tokens drawn last and draws up to `most` (>= 1) more; fewer where a window is full before.

        Raises:
          UserError: if the logits of a sequence are not finite.
        """
        assert self._cache is not None
        assert self._sequences is not None, "start comes first"
        if self._halted:
            self._sequences, self._halted = _halt(self._sequences, self.active), False
        self._cache = self._make_room(self._cache)
        steps = min(most, MAX_STEPS, self._room(self._cache.capacity))
        self._cache, self._sequences, tokens, logprobs = jit_run_steps(
            self._decoder.mesh,
            self._mode,
            self._decoder.params,
            self._decoder.config,
            self._cache,
            self._sequences,
            self._values,
            self._stop_array,
            np.int32(steps),
        )
        drawn = np.asarray(tokens)[:steps]
        self.ledger.fed((drawn >= 0).sum(0))
        return self._collect(drawn, None if logprobs is None else np.asarray(logprobs)[:steps], 1)

    def halt(self, row: int) -> None:
        """Ends a sequence."""
        self._halted |= bool(self.active[row])
        self.active[row] = False

    def bytes(self) -> CacheBytes:
        """What the cache takes, or took before it was released."""
        return cache_bytes(self._decoder.config, self._cache, self.ledger) if self._cache is not None else self._bytes

    def release(self) -> None:
        """Lets go of the cache; nothing can be drawn after that."""
        self._bytes, self._cache, self._sequences = self.bytes(), None, None

    def _make_room(self, cache: Cache) -> Cache:
        """Slides every active sequence whose window is full; gives the cache room for a row more."""
        decoder = self._decoder
        if not decoder.config.windowed:
            longest = int(self.ledger.lengths[self.active].max())
            return decoder.grow(cache, longest + 1, self._final)
        for row in np.flatnonzero(self.active).tolist():
            if self.ledger.full(row):
                length = int(self.ledger.lengths[row])
                # Directly before the slide, which rebuilds what growing drops.
                grown = decoder.grow(cache, length + 1, self._final)
                assert isinstance(grown, WindowedCache)
                cache = decoder.slide(grown, row, length)
                self.ledger.slid(row)
        return cache

    def _room(self, capacity: int) -> int:
        """Tokens that every active sequence can be fed before the host must act."""
        config = self._decoder.config
        if config.windowed:
            return config.generation_window - int(self.ledger.windows[self.active].max())
        if config.architecture == "sliding_window":
            return MAX_STEPS
        return capacity - int(self.ledger.lengths[self.active].max())

    def _collect(self, tokens: np.ndarray, logprobs: np.ndarray | None, unfed: int) -> Drawn:
        """Sorts what came back, [steps, batch] each, by sequence; sequences that drew a stop token end.

        Args:
          tokens: -1 where nothing was drawn.
          logprobs: of the tokens, or None.
          unfed: tokens of a running sequence that the ledger does not count.

        Raises:
          UserError: if a sequence drew nothing without having ended.
        """
        counts = (tokens >= 0).sum(0)
        for row in np.flatnonzero(self.active):
            stopped = counts[row] > 0 and int(tokens[counts[row] - 1, row]) in self._stop
            if counts[row] < len(tokens) and not stopped:
                position = self.ledger.lengths[row] + unfed
                raise UserError(
                    f"sequence {row}: the model's logits are not finite at position {position}, so no token can be "
                    "chosen; its parameters may be damaged, or too large for model.dtype = "
                    f"{self._decoder.config.compute_dtype}"
                )
            self.active[row] = not stopped
        return Drawn(
            [tokens[:count, row].tolist() for row, count in enumerate(counts)],
            None if logprobs is None else [logprobs[:count, row].tolist() for row, count in enumerate(counts)],
        )


@jax.jit
def _halt(sequences: Sequences, active: np.ndarray) -> Sequences:
    return dataclasses.replace(sequences, active=sequences.active & active)
