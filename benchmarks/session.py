"""A cache of sequences of equal length and the benchmark's operations on it; the benchmark's only mutable state."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.decoding.cache import Cache, LayeredCache, WindowedCache, history_of
from tlinformer_jax.decoding.context_parallel import replicate
from tlinformer_jax.decoding.decoder import Decoder, Sequences, jit_sample_next
from tlinformer_jax.decoding.memory import tree_bytes
from tlinformer_jax.decoding.sampling import MAX_STEPS, Sampler, sequence_keys
from tlinformer_jax.kernels.key_value import KeyValue

GREEDY = Sampler()


class Session:
    """A batch of sequences of one length, all in the same phase, generated greedily.

    Attributes:
      decoder: decoder with the model's parameters.
      batch: number of sequences.
      length: N, tokens of each prompt.
      cache: the current cache, with room for the prompt and `room` more tokens.
      history: n of every sequence; for a baseline, the tokens so far.
      window: rows in every generation window; 0 for a baseline.
      cache_dtype: dtype of the part that grows, see `sampling.GenerationConfig`.
    """

    def __init__(
        self, decoder: Decoder, batch: int, length: int, room: int, seed: int, cache_dtype: str = "auto"
    ) -> None:
        self.decoder, self.batch, self.length, self.cache_dtype = decoder, batch, length, cache_dtype
        self.config = decoder.config
        self.history = self.window = 0
        self.cache: Cache = decoder.init_cache(batch, length + room, cache_dtype)
        # -1 is no token. An empty array would crash XLA's shardy-xla pass of JAX 0.11.2 on several devices.
        self._stop = jnp.full((1,), -1, jnp.int32)
        self._random = np.random.default_rng(seed)
        tokens = self._random.integers(0, self.config.vocab_size, (batch,), dtype=np.int32)
        active = jnp.ones((batch,), bool)
        sequences = Sequences(jnp.asarray(tokens), sequence_keys(0, batch), active, seen=None)
        self.sequences = replicate(sequences, decoder.mesh)

    def prompts(self) -> np.ndarray:
        """Returns new random prompts, int32 [batch, length]."""
        return self._random.integers(0, self.config.vocab_size, (self.batch, self.length), dtype=np.int32)

    def prefill_row(self, row: int, prompt: np.ndarray) -> jax.Array:
        """Fills one sequence from its prompt [length]; returns logits float32 [V]."""
        self.cache, logits = self.decoder.prefill(self.cache, row, prompt)
        return logits

    def fill(self, prompts: np.ndarray) -> jax.Array:
        """Fills every sequence and samples the next token of each, int32 [batch]."""
        logits = jnp.stack([self.prefill_row(row, prompt) for row, prompt in enumerate(prompts)])
        self._set_phase(self.length)
        return self._sample(logits)  # also replaces every sequence's last token

    def fill_randomly(self, seed: int) -> None:
        """Fills a baseline's cache with random rows instead of a prompt; the cost of a token is the same."""
        assert isinstance(self.cache, LayeredCache)
        self.cache = _random_rows(self.cache, jax.random.key(seed))
        self.rewind(self.length, 0)

    def rewind(self, history: int, window: int) -> None:
        """Sets the valid rows to `history` and `window`; the cached rows stay as they are."""
        self.history, self.window = history, window

        def full(value: int) -> jax.Array:
            # On the same devices as the old array; otherwise the next call would compile again.
            return replicate(jnp.full((self.batch,), value, jnp.int32), self.decoder.mesh)

        if isinstance(self.cache, LayeredCache):
            self.cache = dataclasses.replace(self.cache, length=full(history + window))
        else:
            self.cache = dataclasses.replace(self.cache, history_length=full(history), window_length=full(window))
        jax.block_until_ready(self.cache.position)

    def step(self) -> jax.Array:
        """Feeds the last token of every sequence and samples the next, int32 [batch], in one dispatched step."""
        self.cache, logits = self.decoder.step(self.cache, self.sequences.token, self.sequences.active)
        self._advance(1)
        return self._sample(logits)

    def loop(self, steps: int) -> jax.Array:
        """Runs `steps` steps in the device loop, without a slide; returns the tokens of the last call."""
        left, tokens = steps, self.sequences.token
        while left > 0:
            limit = min(left, MAX_STEPS)
            self.cache, self.sequences, tokens, _ = self.decoder.run_steps(
                self.cache, self.sequences, GREEDY, self._stop, np.int32(limit)
            )
            left -= limit
        self._advance(steps)
        return tokens

    @property
    def devices(self) -> int:
        """Number of devices that the history is split over."""
        return self.decoder.devices

    @property
    def overlap(self) -> int:
        """Rows in a window before the first row that predicts."""
        return self.config.window_overlap if self.history else 0

    @property
    def room(self) -> int:
        """Number of tokens until the generation windows are full."""
        return self.overlap + self.config.generation_window - self.window if self.config.windowed else MAX_STEPS

    @property
    def must_slide(self) -> bool:
        """Whether the generation windows are full."""
        return self.room == 0

    def slide_row(self, row: int) -> None:
        """Slides the full window of one sequence; `slide` does so for all and updates the counts."""
        assert isinstance(self.cache, WindowedCache)
        full = self.history + self.overlap + self.config.generation_window
        self.cache = self.decoder.slide(self.cache, row, full)

    def slide(self) -> None:
        """Slides the full windows of all sequences."""
        for row in range(self.batch):
            self.slide_row(row)
        tokens = self.history + self.window
        self.history = history_of(self.config, tokens + 1)
        self.window = tokens - self.history

    def generate(self, tokens: int) -> jax.Array:
        """Generates `tokens` tokens for every sequence as the generator does: device loops with slides between them.

        Returns:
          the tokens of the last loop.
        """
        left, last = tokens, self.sequences.token
        while left > 0:
            if self.must_slide:
                self.slide()
            steps = min(left, self.room)
            last = self.loop(steps)
            left -= steps
        return last

    def check(self) -> None:
        """Checks that no sequence has ended.

        Raises:
          FloatingPointError: if one has, which only logits that are not finite can cause here.
        """
        if not bool(np.all(np.asarray(self.sequences.active))):
            raise FloatingPointError(f"{self.config.architecture}: logits are not finite at {self.length:,} tokens")

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache's arrays, room included; the share of one device if the history is split."""
        return tree_bytes(self.cache)

    def _advance(self, tokens: int) -> None:
        if self.config.windowed:
            self.window += tokens
        else:
            self.history += tokens

    def _set_phase(self, length: int) -> None:
        self.history = history_of(self.config, length) if self.config.windowed else length
        self.window = length - self.history

    def _sample(self, logits: jax.Array) -> jax.Array:
        self.sequences, token, _ = jit_sample_next(
            GREEDY, self._stop, self.sequences, self.sequences.active, self.cache.position, logits
        )
        return token


@functools.partial(jax.jit, donate_argnums=0)
def _random_rows(cache: LayeredCache, key: jax.Array) -> LayeredCache:
    """Returns the cache with normal random rows, one layer at a time, so that only one layer exists twice."""

    def body(layer: jax.Array, layers: KeyValue) -> KeyValue:
        shape = layers.key.shape[1:]
        keys = jax.random.split(jax.random.fold_in(key, layer))
        rows = layers.as_kept(KeyValue(*(jax.random.normal(one, shape, jnp.float32) for one in keys)))
        return jax.tree.map(
            lambda array, new: jax.lax.dynamic_update_index_in_dim(array, new.astype(array.dtype), layer, 0),
            layers,
            rows,
        )

    return dataclasses.replace(cache, layers=jax.lax.fori_loop(0, cache.layers.key.shape[0], body, cache.layers))
