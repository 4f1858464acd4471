"""From tokens to text that can be shown at once: whole characters, and no beginnings of stop strings."""

import codecs
from collections.abc import Iterable, Sequence

from tlinformer_jax.data.tokenizers import Tokenizer

# Earlier tokens that are decoded with new ones: some tokenizers treat a text's first token specially.
CONTEXT = 8


class TextStream:
    """The text of one sequence as its tokens come.

    Bytes that may still become a character are held back, and so is a suffix that may still become a stop string. Bytes
    that are not UTF-8 become U+FFFD. A sequence stops at the first token that completes a stop string. Its text ends
    before that string; if there are several, before the one complete first (of these, the longest).

    Attributes:
      stopped: whether a stop string has been found; then `push` must not be called again.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], stop_strings: Sequence[str] = ()) -> None:
        """Of what follows the prompt; without a tokenizer there is no text."""
        self.stopped = False
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop_strings)
        self._context = self._known(prompt[-4 * CONTEXT :])[-CONTEXT:]
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Takes new tokens, up to one that completes a stop string; text that may be shown, and how many it took."""
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
        """Text that was held back; an incomplete last character is left out."""
        text, self._held = self._held, ""
        return text

    def _known(self, tokens: Iterable[int]) -> list[int]:
        """The tokens that have a text: a model's vocabulary may be padded beyond the tokenizer's."""
        if self._tokenizer is None:
            return []
        size, end = self._tokenizer.vocab_size, self._tokenizer.end_of_text
        return [int(token) for token in tokens if token < size and token != end]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a beginning of `stop`, but not all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
