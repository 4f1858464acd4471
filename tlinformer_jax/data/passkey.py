"""Passkey: numbers hidden in running text, which are asked for at the end.

    ... text ... The pass key of 4 1 is 7 0 2 9 5. ... text ... What is the pass key of 4 1? It is 7 0 2 9 5

The text is a stretch of the corpus. Every digit is encoded by itself with a space before it. Names and keys are drawn
anew for every sample; the names are different. An evaluation sample asks for one key, and its depth goes through all
possible ones with the sample's number, so that each is asked for equally often; in short samples the question covers
the last depths. In training keys lie anywhere, and several may be asked for one after the other.
"""

import dataclasses
import functools

import numpy as np

from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tasks import DEPTHS, AnswerPlaces, Samples, below, distinct, random_bits
from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.errors import ConfigError, DataError

NAME_DIGITS, KEY_DIGITS = 2, 5
HIDDEN = (" The pass key of", " is", ".")
ASKED = (" What is the pass key of", "? It is")


@dataclasses.dataclass(frozen=True)
class Phrases:
    """The sentences in tokens: int64 [10, tokens of a digit], and the parts of HIDDEN and of ASKED."""

    digits: np.ndarray
    hidden: tuple[np.ndarray, ...]
    asked: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Phrases":
        """The sentences as a tokenizer writes them; DataError if its digits differ in their number of tokens."""
        digits = [tokenizer.encode(f" {digit}") for digit in range(10)]
        if len({len(digit) for digit in digits}) > 1:
            raise DataError(f"data.tokenizer = {tokenizer.name!r}: must encode all digits in equally many tokens")
        parts = [tuple(tokenizer.encode(text).astype(np.int64) for text in texts) for texts in (HIDDEN, ASKED)]
        return cls(np.stack(digits).astype(np.int64), *parts)

    def sizes(self) -> tuple[int, int, int]:
        """Tokens of a hidden sentence, of a question with its answer, and of the answer."""
        digit = self.digits.shape[1]
        hidden, asked = (
            sum(map(len, parts)) + (NAME_DIGITS + KEY_DIGITS) * digit for parts in (self.hidden, self.asked)
        )
        return hidden, asked, KEY_DIGITS * digit

    def key_offset(self) -> int:
        """Tokens of a hidden sentence before its key."""
        return len(self.hidden[0]) + NAME_DIGITS * self.digits.shape[1] + len(self.hidden[1])

    def places(self, length: int, questions: int) -> AnswerPlaces:
        """Where the answers to at most so many questions stand in samples of `length` tokens."""
        _, asked, answer = self.sizes()
        return AnswerPlaces(max(0, length - (questions - 1) * asked - answer), questions * answer)

    def sentences(self, parts: tuple[np.ndarray, ...], names: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """[samples, n, tokens]: `parts` with the digits of names and of keys, int64 [samples, n, digits], between."""
        spelled = [self.digits[numbers].reshape(*numbers.shape[:-1], -1) for numbers in (names, keys)]
        repeated = [np.broadcast_to(part, (*names.shape[:-1], len(part))) for part in parts]
        pieces = [repeated[0], spelled[0], repeated[1], spelled[1], *repeated[2:]]
        return np.concatenate(pieces, axis=-1)


@dataclasses.dataclass(frozen=True)
class Passkey:
    """The task."""

    key: int  # of the random numbers
    text: TokenStream  # that the keys are hidden in, as `tokenizer` encodes it
    tokenizer: Tokenizer
    keys: int  # hidden in a sample
    questions: int  # how many of them it asks for
    in_turn: bool  # whether the depth of the first asked key follows from the sample's number

    @functools.cached_property
    def phrases(self) -> Phrases:
        return Phrases.of(self.tokenizer)

    def chance(self, length: int) -> float:
        return 1 / self.keys if self.keys > 1 else 10.0**-KEY_DIGITS

    def check(self, length: int) -> None:
        hidden, asked, _ = self.phrases.sizes()
        least = (self.keys + 2) * hidden + self.questions * asked
        if length < least:
            fields = f"data.num_items = {self.keys} and data.questions = {self.questions}"
            raise ConfigError("data.sequence_length", length, f"must be at least {least} for {fields}")
        if len(self.text.tokens) < length:
            allowed = f"the text to hide keys in has only {len(self.text.tokens)} tokens"
            raise DataError(f"data.sequence_length = {length}: {allowed}")

    def make(self, numbers: np.ndarray, length: int) -> Samples:
        phrases, count = self.phrases, self.questions
        hidden_size, asked_size, answer_size = phrases.sizes()
        bits = random_bits(self.key, numbers, 5 * self.keys)
        split = np.cumsum([2 * self.keys, self.keys, 1, 1])
        of_names, of_keys, of_text, of_places, rest = np.split(bits, split, axis=1)
        names = _digits(distinct(of_names, 10**NAME_DIGITS), NAME_DIGITS)
        keys = _digits(below(of_keys, 10**KEY_DIGITS), KEY_DIGITS)
        sentences = phrases.sentences(phrases.hidden, names, keys)
        questions = phrases.sentences(phrases.asked, names[:, :count], keys[:, :count])
        body = length + 1 - count * asked_size
        text = body - self.keys * hidden_size
        begins = below(of_text[:, 0], len(self.text.tokens) - text + 1)
        firsts = self._places(numbers, of_places[:, 0], length, body - hidden_size)
        tokens = np.empty((len(numbers), length + 1), np.int32)
        places = np.empty((len(numbers), self.keys), np.int64)
        for row, place, first, begin, parts, others in zip(tokens, places, firsts, begins, sentences, rest):
            row[:body], place[:] = _hide(self.text.tokens[begin : begin + text], parts, int(first), others)
        tokens[:, body:] = questions.reshape(len(numbers), -1)
        ends = length - 1 - np.arange(count)[::-1] * asked_size  # where an answer's last token is predicted
        ends = np.broadcast_to(ends, (len(numbers), count))
        return Samples.of(tokens, ends, places[:, :count] + phrases.key_offset(), answer_size)

    def _places(self, numbers: np.ndarray, bits: np.ndarray, length: int, last: int) -> np.ndarray:
        """Where the first asked keys' sentences begin, int64 [samples] in 0 .. last."""
        if not self.in_turn:
            return below(bits, last + 1)
        offset = self.phrases.key_offset()
        first = offset * DEPTHS // length
        depths = first + numbers % ((last + offset) * DEPTHS // length + 1 - first)
        lowest, end = (np.clip(-(-part * length // DEPTHS) - offset, 0, last + 1) for part in (depths, depths + 1))
        return lowest + below(bits, end - lowest)


def _digits(values: np.ndarray, count: int) -> np.ndarray:
    """Decimal digits of integers [...], the highest first: [..., count]."""
    return values[..., None] // 10 ** np.arange(count - 1, -1, -1) % 10


def _hide(text: np.ndarray, sentences: np.ndarray, place: int, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inserts sentences [K, tokens] into a text [tokens]: the first begins at `place`, the others anywhere.

    Takes random `bits`, uint64 [2 * (K - 1)]. Returns the result, and where in it each sentence begins, int64 [K].
    """
    others, size = len(sentences) - 1, sentences.shape[1]
    room = len(text) + others * size  # of all that is not the first sentence
    before = int((below(bits[:others], room) < place).sum())
    before = min(max(before, others - (room - place) // size), place // size)
    head = place - before * size  # tokens of the text before the first sentence
    early = np.sort(below(bits[others : others + before], head + 1))
    late = np.sort(head + below(bits[others + before :], len(text) - head + 1))
    cuts = np.concatenate([early, [head], late]).astype(np.int64)
    order = np.array([*range(1, 1 + before), 0, *range(1 + before, len(sentences))])
    places = np.empty(len(sentences), np.int64)
    places[order] = cuts + size * np.arange(len(sentences))
    parts = np.split(text, cuts)
    pieces = [parts[0], *(piece for pair in zip(sentences[order], parts[1:]) for piece in pair)]
    return np.concatenate(pieces), places
