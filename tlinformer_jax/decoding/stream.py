"""A generation under way: an iterator of what each call to the device brought, and what there is so far."""

import collections
import dataclasses
import time
from collections.abc import Iterator, Sequence

from tlinformer_jax.decoding.accounting import CacheBytes
from tlinformer_jax.decoding.batch import Batch, Drawn
from tlinformer_jax.decoding.settings import GenerationConfig
from tlinformer_jax.decoding.text import TextStream

LENGTH, STOP_TOKEN, STOP_STRING, INTERRUPTED = "length", "stop_token", "stop_string", "interrupted"


@dataclasses.dataclass(frozen=True)
class Piece:
    """What a sequence got from one call to the device.

    Attributes:
      index: which prompt's.
      tokens: the new ones, the stop token included.
      logprobs: theirs, in nats, or None.
      text: that may be shown after the pieces before; "" without a tokenizer. Pieces join to Generation.text.
      finish_reason: as Generation has it; None while the sequence goes on.
    """

    index: int
    tokens: list[int]
    logprobs: list[float] | None
    text: str
    finish_reason: str | None


@dataclasses.dataclass(frozen=True)
class Generation:
    """What a sequence has got.

    Attributes:
      tokens: all that were drawn, the stop token and those of the stop string included.
      logprobs: of each token, in nats, under the model's own distribution; None unless asked for.
      text: of the tokens before the stop token or stop string; "" without a tokenizer. An incomplete last
        character is left out; bytes that are no UTF-8 are U+FFFD.
      finish_reason: 'length', 'stop_token', 'stop_string', 'interrupted', or None while it goes on.
      hits: tokens fed while the history stood still. The device may have drawn a few after a stop string in vain.
      misses: times the history was worked through: the prefill, and each slide of the window.
    """

    tokens: list[int]
    logprobs: list[float] | None
    text: str
    finish_reason: str | None
    hits: int
    misses: int


@dataclasses.dataclass(frozen=True)
class Call:
    """One call to the device: when it began (time.perf_counter, s), how long it took (s), the tokens it brought."""

    start: float
    seconds: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What a generation took.

    Attributes:
      prefill: the call that filled the cache and drew the first token of each sequence; None if there was none.
      decode: the other calls, with the slides between them. Compilation, where a call needed it, is in its time.
      hits: of all sequences. misses: likewise.
      cache: its bytes in the end; no parts where nothing was generated.
    """

    prefill: Call | None
    decode: tuple[Call, ...]
    hits: int
    misses: int
    cache: CacheBytes


class _Sequence:
    """Host-side state of one sequence."""

    def __init__(self, text: TextStream | None) -> None:
        self.text = text
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.shown: list[str] = []
        self.finish_reason: str | None = None


class Stream(Iterator[Piece]):
    """Yields pieces as they come, until all sequences have ended.

    A `KeyboardInterrupt` passes through: call `stop` and read `generations` for what there was until then.
    """

    def __init__(self, batch: Batch, config: GenerationConfig, chunk: int, texts: Sequence[TextStream | None]) -> None:
        """Prepares it.

        Args:
          batch: not started.
          config: of the generation, its stop_tokens not None.
          chunk: most tokens of a call.
          texts: one for each sequence; None where no text is wanted.
        """
        self._batch, self._config, self._chunk = batch, config, chunk
        self._sequences = [_Sequence(text) for text in texts]
        self._pieces: collections.deque[Piece] = collections.deque()
        self._calls: list[Call] = []
        self._drawn = 0  # tokens of every sequence that goes on
        if config.max_new_tokens == 0:
            for sequence in self._sequences:
                sequence.finish_reason = LENGTH

    def __next__(self) -> Piece:
        while not self._pieces:
            if all(sequence.finish_reason for sequence in self._sequences):
                raise StopIteration
            self._call()
            if all(sequence.finish_reason for sequence in self._sequences):
                self._batch.release()
        return self._pieces.popleft()

    def stop(self) -> list[Piece]:
        """Ends all sequences; returns the pieces not yet yielded and, as pieces, text that was held back."""
        pieces = list(self._pieces)
        self._pieces.clear()
        for index, sequence in enumerate(self._sequences):
            if sequence.finish_reason is None:
                rest = self._finish(sequence, INTERRUPTED)
                pieces.append(Piece(index, [], [] if self._config.logprobs else None, rest, INTERRUPTED))
        self._batch.release()
        return pieces

    @property
    def new_tokens(self) -> list[list[int]]:
        """The tokens of each sequence; the lists grow while it goes on."""
        return [sequence.tokens for sequence in self._sequences]

    @property
    def generations(self) -> list[Generation]:
        """What each sequence has got so far; it may be ahead of the pieces yielded."""
        ledger, logprobs = self._batch.ledger, self._config.logprobs
        return [
            Generation(
                tokens=list(sequence.tokens),
                logprobs=list(sequence.logprobs) if logprobs else None,
                text="".join(sequence.shown),
                finish_reason=sequence.finish_reason,
                hits=int(ledger.hits[index]),
                misses=int(ledger.misses[index]),
            )
            for index, sequence in enumerate(self._sequences)
        ]

    @property
    def statistics(self) -> Statistics:
        """What it has taken so far."""
        ledger = self._batch.ledger
        prefill = self._calls[0] if self._calls else None
        hits, misses = int(ledger.hits.sum()), int(ledger.misses.sum())
        return Statistics(prefill, tuple(self._calls[1:]), hits, misses, self._batch.bytes())

    def _call(self) -> None:
        """One call to the device; its pieces join the queue."""
        start = time.perf_counter()
        if self._drawn == 0:
            drawn = self._batch.start()
        else:
            drawn = self._batch.advance(min(self._chunk, self._config.max_new_tokens - self._drawn))
        self._drawn += max(len(tokens) for tokens in drawn.tokens)
        seconds, count = time.perf_counter() - start, sum(len(tokens) for tokens in drawn.tokens)
        self._calls.append(Call(start, seconds, count))
        for index, sequence in enumerate(self._sequences):
            if sequence.finish_reason is None:
                self._pieces.append(self._take(index, sequence, drawn))

    def _take(self, index: int, sequence: _Sequence, drawn: Drawn) -> Piece:
        """Adds to a sequence what it has drawn, up to where it stops."""
        assert self._config.stop_tokens is not None
        tokens = drawn.tokens[index]
        at_stop_token = tokens[-1] in self._config.stop_tokens
        text, count = self._read(sequence, tokens[:-1] if at_stop_token else tokens)
        reason = None
        if sequence.text is not None and sequence.text.stopped:
            reason, tokens = STOP_STRING, tokens[:count]
            self._batch.halt(index)
        elif at_stop_token:
            reason = STOP_TOKEN
        elif self._drawn >= self._config.max_new_tokens:
            reason = LENGTH
            self._batch.halt(index)
        logprobs = drawn.logprobs[index][: len(tokens)] if drawn.logprobs is not None else None
        sequence.tokens += tokens
        sequence.logprobs += logprobs or []
        sequence.shown.append(text)
        if reason is not None:
            text += self._finish(sequence, reason)
        return Piece(index, tokens, logprobs, text, reason)

    def _read(self, sequence: _Sequence, tokens: list[int]) -> tuple[str, int]:
        """Text of new tokens up to a stop string, and how many tokens that took."""
        if sequence.text is None:
            return "", len(tokens)
        if not self._config.stop_strings:
            return sequence.text.push(tokens), len(tokens)
        text = ""
        for count, token in enumerate(tokens, 1):
            text += sequence.text.push([token])
            if sequence.text.stopped:
                return text, count
        return text, len(tokens)

    def _finish(self, sequence: _Sequence, reason: str) -> str:
        """Ends a sequence; returns the text that was held back."""
        rest = sequence.text.finish() if sequence.text is not None and not sequence.text.stopped else ""
        sequence.shown.append(rest)
        sequence.finish_reason = reason
        return rest
