"""A running generation, which calls the device and yields the new tokens and text after each call.

Sequences have different lengths, so their windows are full at different times. On the device all sequences advance
together until one window is full. The host, which knows all lengths, then slides this window alone and continues.
"""

import codecs
import collections
import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.decoding.cache import Cache, WindowedCache, stored_rows
from tlinformer_jax.decoding.decoder import Decoder, Sequences, jit_sample_next
from tlinformer_jax.decoding.memory import CacheBytes, cache_bytes
from tlinformer_jax.decoding.sampling import MAX_STEPS, GenerationConfig, seen_tokens, sequence_keys
from tlinformer_jax.errors import UserError

LENGTH, STOP_TOKEN, STOP_STRING, INTERRUPTED = "length", "stop_token", "stop_string", "interrupted"
# Number of earlier tokens to decode with new ones, because some tokenizers treat a text's first token specially.
CONTEXT = 8


@dataclasses.dataclass(frozen=True)
class Piece:
    """New tokens and text of a sequence from one device call.

    Attributes:
      index: index of the prompt.
      tokens: new tokens, including the stop token.
      logprobs: log-probabilities of the tokens, in nats; None if not requested.
      text: new text; "" without a tokenizer. The texts of all pieces join to `Generation.text`.
      finish_reason: see `Generation`.
    """

    index: int
    tokens: list[int]
    logprobs: list[float] | None
    text: str
    finish_reason: str | None


@dataclasses.dataclass
class Generation:
    """The continuation of a prompt so far, which may be ahead of the pieces that were yielded.

    Attributes:
      tokens: all new tokens, including the stop token and those of the stop string.
      logprobs: log-probabilities of the tokens; None if not requested; see `GenerationConfig`.
      finish_reason: 'length', 'stop_token', 'stop_string' or 'interrupted'; None while the sequence continues.
      hits: number of tokens fed to the cache; after a stop string the device may have fed a few too many.
      slides: how often the window slid; each slide processes the whole history, as the prefill does, but with
        `config.causal_history` only reads it.
    """

    tokens: list[int]
    logprobs: list[float] | None
    finish_reason: str | None
    hits: int = 0
    slides: int = 0
    _texts: list[str] = dataclasses.field(default_factory=list, repr=False)

    @property
    def text(self) -> str:
        """The text before the stop token or stop string; "" without a tokenizer.

        An incomplete last character is left out; bytes that are not UTF-8 become U+FFFD.
        """
        return "".join(self._texts)


@dataclasses.dataclass(frozen=True)
class DeviceCall:
    """One device call: its duration and its number of new tokens, without ids that the tokenizer does not have."""

    seconds: float
    tokens: int


class GenerationStream(Iterator[Piece]):
    """An iterator that yields each piece as soon as the device has drawn its tokens.

    Ctrl-C during `next` does not lose drawn tokens: call `stop` and read `generations`.

    Attributes:
      generations: the continuation of each prompt so far.
      calls: device calls. The first call prefills the prompts and draws one token of each sequence; the others include
        slides. The time of a call includes compilation.
    """

    def __init__(
        self, decoder: Decoder, prompts: Sequence[np.ndarray], config: GenerationConfig, tokenizer: Tokenizer | None
    ) -> None:
        """Prepares a generation, which the first `next` starts; config.stop_tokens and config.chunk must be set."""
        assert config.stop_tokens is not None
        assert config.chunk is not None
        self._decoder, self._prompts, self._config, self._chunk = decoder, prompts, config, config.chunk
        self._texts = [TextStream(tokenizer, prompt.tolist(), config.stop_strings) for prompt in prompts]
        self._keys, self._sampler = sequence_keys(config.seed, len(prompts)), config.sampler()
        self._stops = sorted(set(config.stop_tokens))
        # Pad to a power of two, so that few lengths need a compilation.
        padding = (1 << max(len(self._stops) - 1, 0).bit_length()) - len(self._stops)
        self._stop_array = np.array([*self._stops, *[-1] * padding], np.int32)
        done = LENGTH if config.max_new_tokens == 0 else None
        self.generations = [Generation([], [] if config.logprobs else None, done) for _ in prompts]
        self.calls: list[DeviceCall] = []
        self._known = decoder.config.vocab_size if tokenizer is None else tokenizer.vocab_size
        self._final = max(map(len, prompts), default=0) + config.max_new_tokens
        self._device: tuple[Cache, Sequences] | None = None  # None before the first call and after the last one
        self._shapes: Cache | None = None  # of the latest cache
        self._pieces: collections.deque[Piece] = collections.deque()

    def __next__(self) -> Piece:
        while not self._pieces:
            if not self._active:
                raise StopIteration
            self._call()
        return self._pieces.popleft()

    def stop(self) -> list[Piece]:
        """Ends all sequences and frees the cache; returns the pieces that were not yielded yet and text held back."""
        self._device = None
        held = {row: self._finish(row, INTERRUPTED) for row in self._active}
        left, scores = list(self), self._config.logprobs
        return left + [Piece(row, [], [] if scores else None, text, INTERRUPTED) for row, text in held.items()]

    @property
    def cache_bytes(self) -> CacheBytes:
        """Bytes of the cache now, or before it was freed; no parts if nothing was generated."""
        if self._shapes is None:
            return CacheBytes({}, None)
        return cache_bytes(self._decoder.config, self._shapes, self._lengths)

    @property
    def _lengths(self) -> list[int]:
        """Number of tokens of each sequence in the cache."""
        return [len(prompt) + generation.hits for prompt, generation in zip(self._prompts, self.generations)]

    @property
    def _active(self) -> list[int]:
        """The sequences that continue."""
        return [row for row, generation in enumerate(self.generations) if generation.finish_reason is None]

    def _call(self) -> None:
        """Makes one device call and queues its pieces; frees the cache if no sequence continues."""
        start = time.perf_counter()
        cache, state, tokens, logprobs = self._prefill() if self._device is None else self._advance(*self._device)
        self._device, self._shapes = (cache, state), _shapes_of(cache)
        counts = (tokens >= 0).sum(0).tolist()
        known = int(((tokens >= 0) & (tokens < self._known)).sum())
        self.calls.append(DeviceCall(time.perf_counter() - start, known))
        new = {row: tokens[: counts[row], row].tolist() for row in self._active}
        for row, of_row in new.items():
            self._check_finite(row, of_row, len(tokens))
        for row, of_row in new.items():
            scores = None if logprobs is None else logprobs[: counts[row], row].tolist()
            self._pieces.append(self._take(row, of_row, scores))
        if not self._active:
            self._device = None

    def _prefill(self) -> tuple[Cache, Sequences, np.ndarray, np.ndarray | None]:
        """Prefills the prompts and draws each sequence's first token.

        Returns the cache; the sequences; and tokens, int [steps, batch], -1 if none was drawn, with log-probabilities.
        """
        decoder, prompts = self._decoder, self._prompts
        cache, logits = decoder.init_cache(len(prompts), self._room(), self._config.cache_dtype), []
        for row, prompt in enumerate(prompts):
            cache, of_row = decoder.prefill(cache, row, prompt)
            logits.append(of_row)
        seen = None
        if self._sampler.repetition_penalty is not None:
            seen = jnp.asarray(seen_tokens(prompts, decoder.config.vocab_size))
        everyone, positions = np.ones(len(prompts), bool), np.array(self._lengths, np.int32)
        state = Sequences(jnp.zeros(len(prompts), jnp.int32), self._keys, jnp.asarray(everyone), seen)
        state, tokens, logprobs = jit_sample_next(
            self._sampler, self._stop_array, state, everyone, positions, jnp.stack(logits)
        )
        return cache, state, np.asarray(tokens)[None], None if logprobs is None else np.asarray(logprobs)[None]

    def _advance(self, cache: Cache, state: Sequences) -> tuple[Cache, Sequences, np.ndarray, np.ndarray | None]:
        """Feeds the last tokens and draws more, until a window is full or the chunk is done; see `_prefill`."""
        cache, room = self._make_room(cache)
        drawn = len(self.generations[self._active[0]].tokens)
        steps = min(self._chunk, self._config.max_new_tokens - drawn, room)
        # Only the host knows which sequences a stop string has ended.
        active = np.isin(np.arange(len(self._prompts)), self._active)
        state = dataclasses.replace(state, active=jnp.asarray(active))
        cache, state, tokens, logprobs = self._decoder.run_steps(
            cache, state, self._sampler, self._stop_array, np.int32(steps)
        )
        new = np.asarray(tokens)[:steps]
        for generation, count in zip(self.generations, (new >= 0).sum(0).tolist()):
            generation.hits += count
        return cache, state, new, None if logprobs is None else np.asarray(logprobs)[:steps]

    def _room(self) -> int:
        """Returns how many tokens a cache gets room for: some more than there are, so that it seldom grows."""
        longest = max(self._lengths)
        return min(longest + longest // 5 + 1, self._final)

    def _make_room(self, cache: Cache) -> tuple[Cache, int]:
        """Slides full windows and grows the cache; returns the cache and how many tokens can be fed next."""
        config, everyone = self._decoder.config, self._lengths
        lengths = {row: everyone[row] for row in self._active}
        size, longest = config.generation_window, max(lengths.values())
        if config.grows and stored_rows(config, longest + 1) > cache.capacity:
            cache = self._decoder.grow(cache, self._room())
        if not isinstance(cache, WindowedCache):
            return cache, cache.capacity - longest if config.grows else MAX_STEPS
        for row, length in lengths.items():
            if length % size == 0:
                cache = self._decoder.slide(cache, row, length)
                self.generations[row].slides += 1
        return cache, min(size - length % size for length in lengths.values())

    def _check_finite(self, row: int, tokens: list[int], steps: int) -> None:
        """Raises a UserError if a sequence drew fewer tokens than `steps` without a stop token."""
        if len(tokens) == steps or (tokens and tokens[-1] in self._stops):
            return
        position = len(self._prompts[row]) + len(self.generations[row].tokens) + len(tokens)
        raise UserError(
            f"sequence {row}: the model's logits are not finite at position {position}, so no token can be chosen; its "
            f"parameters may be damaged, or too large for model.dtype = {self._decoder.config.compute_dtype}"
        )

    def _take(self, row: int, tokens: list[int], logprobs: list[float] | None) -> Piece:
        """Adds drawn tokens, up to a stop, to a sequence; returns the piece."""
        generation, stream, reason = self.generations[row], self._texts[row], None
        at_stop_token = tokens[-1] in self._stops
        text, count = stream.push(tokens[:-1] if at_stop_token else tokens)
        if stream.stopped:
            reason, tokens = STOP_STRING, tokens[:count]
        elif at_stop_token:
            reason = STOP_TOKEN
        elif len(generation.tokens) + len(tokens) == self._config.max_new_tokens:
            reason = LENGTH
        generation.tokens += tokens
        if logprobs is not None and generation.logprobs is not None:
            logprobs = logprobs[: len(tokens)]
            generation.logprobs += logprobs
        generation._texts.append(text)
        if reason is not None:
            text += self._finish(row, reason)
        return Piece(row, tokens, logprobs, text, reason)

    def _finish(self, row: int, reason: str) -> str:
        """Ends a sequence; returns the text that was held back."""
        generation, rest = self.generations[row], self._texts[row].finish()
        generation._texts.append(rest)
        generation.finish_reason = reason
        return rest


def _shapes_of(cache: Cache) -> Cache:
    """Returns the cache with abstract arrays, which keep no memory."""
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), cache)


class TextStream:
    """The text of one sequence, decoded while tokens arrive.

    Bytes that may still become a character are held back, as is text that may become a stop string. Bytes that are not
    UTF-8 become U+FFFD. A sequence stops at the first token that completes a stop string. Its text ends before that
    string; of several, before the one that is complete first (if two end together, before the longest).

    Attributes:
      stopped: whether a stop string has been found; then `push` must not be called again.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], stop_strings: Sequence[str] = ()) -> None:
        """Prepares decoding of the text after the prompt; without a tokenizer there is no text."""
        self.stopped = False
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop_strings)
        self._context = self._known(prompt[-4 * CONTEXT :])[-CONTEXT:]
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Takes tokens up to a stop string; returns text to show and the number of tokens taken."""
        if not self._stop_strings:
            return self._push(tokens), len(tokens)
        text = ""
        for count, token in enumerate(tokens, 1):
            text += self._push([token])
            if self.stopped:
                return text, count
        return text, len(tokens)

    def _push(self, tokens: Sequence[int]) -> str:
        if self._tokenizer is None:
            return ""
        known = self._known(tokens)
        before = len(self._tokenizer.decode(self._context))
        new = self._tokenizer.decode(self._context + known)[before:]
        self._context = (self._context + known)[-CONTEXT:]
        text = self._held + self._characters.decode(new)
        found = [(at + len(stop), at) for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        shown = len(text) - max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[shown:]
        return text[:shown]

    def finish(self) -> str:
        """Returns the text that was held back, without an incomplete last character."""
        text, self._held = self._held, ""
        return text

    def _known(self, tokens: Iterable[int]) -> list[int]:
        """Returns the tokens that have a text, because a model's vocabulary may exceed the tokenizer's."""
        if self._tokenizer is None:
            return []
        size, end = self._tokenizer.vocab_size, self._tokenizer.end_of_text
        return [int(token) for token in tokens if token < size and token != end]


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
