"""From tokens to text that can be shown at once: no broken characters, no beginnings of stop strings."""

import codecs
import itertools
from collections.abc import Iterable, Iterator, Sequence

from tlinformer_jax.data.tokenizers import Tokenizer

# Tokens before the new ones that are decoded with them: some tokenizers treat a text's first token in its own way.
CONTEXT = 8


class TextStream:
    """The text of one sequence as its tokens come.

    Bytes that may still become a character are held back, and so is a suffix that may still become a stop string.
    Bytes that are no UTF-8 become U+FFFD. A sequence stops at the first token that completes a stop string; its text
    ends before that string, of several before the one that was complete first (of these, the longest).

    Attributes:
      stopped: whether a stop string has been found; `push` then must not be called any more.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop_strings: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop_strings)
        self._context = list(itertools.islice(self._known(reversed(prompt)), CONTEXT))[::-1]
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, tokens: Sequence[int]) -> str:
        """Takes new tokens; returns text that may be shown. With stop strings, push tokens one by one."""
        known = list(self._known(tokens))
        before = len(self._tokenizer.decode(self._context))
        new = self._tokenizer.decode(self._context + known)[before:]
        self._context = (self._context + known)[-CONTEXT:]
        return self._show(self._characters.decode(new))

    def finish(self) -> str:
        """What was held back; an incomplete last character is left out."""
        text, self._held = self._held, ""
        return text

    def _known(self, tokens: Iterable[int]) -> Iterator[int]:
        """The tokens that have a text: a model's vocabulary may be padded to more than the tokenizer's."""
        size, end = self._tokenizer.vocab_size, self._tokenizer.end_of_text
        return (int(token) for token in tokens if token < size and token != end)

    def _show(self, text: str) -> str:
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a beginning of `stop`, but not all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
