"""Passkey: numbers hidden in running text, which are asked for at the end.

    ... text ... The pass key of 4 1 is 7 0 2 9 5. ... text ... What is the pass key of 4 1? It is 7 0 2 9 5

The text is a stretch of the corpus as it stands, so within a sample no word of it repeats that the corpus does not
repeat. Every digit is encoded by itself with a space before it; names and keys are drawn anew for every sample, names
being different. A sample of the evaluation asks for one key, whose depth follows from the sample's number, in turn, so
that all depths at which a key can lie are asked for equally often; in short samples the question takes up the last
ones. In training keys lie anywhere, and several may be asked for one after the other, since an answer is all that such
a sample teaches.
"""

import dataclasses
import functools

import numpy as np

from tlinformer_jax.data.draws import below, distinct, draw
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tasks import DEPTHS, AnswerPlaces, Samples
from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.errors import ConfigError, DataError

NAME_DIGITS, KEY_DIGITS = 2, 5
HIDDEN = (" The pass key of", " is", ".")
ASKED = (" What is the pass key of", "? It is")


@dataclasses.dataclass(frozen=True)
class Phrases:
    """The sentences in tokens.

    Attributes:
      digits: int64 [10, tokens of a digit].
      hidden: the parts of HIDDEN; asked: the parts of ASKED.
    """

    digits: np.ndarray
    hidden: tuple[np.ndarray, ...]
    asked: tuple[np.ndarray, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Phrases":
        """The sentences as a tokenizer writes them.

        Raises:
          DataError: if its digits differ in their number of tokens.
        """
        digits = [tokenizer.encode(f" {digit}") for digit in range(10)]
        if len({len(digit) for digit in digits}) > 1:
            raise DataError(f"data.tokenizer = {tokenizer.name!r}: must encode all digits in equally many tokens")
        parts = [tuple(tokenizer.encode(text).astype(np.int64) for text in texts) for texts in (HIDDEN, ASKED)]
        return cls(np.stack(digits).astype(np.int64), *parts)

    def spelled(self, digits: np.ndarray) -> np.ndarray:
        """Tokens of digits [..., n], [..., n * tokens of a digit]."""
        return self.digits[digits].reshape(*digits.shape[:-1], -1)

    def joined(self, parts: tuple[np.ndarray, ...], *numbers: np.ndarray) -> np.ndarray:
        """Parts with numbers in between, all as tokens: [..., tokens]."""
        shape = numbers[0].shape[:-1]
        pieces = [np.broadcast_to(parts[0], (*shape, len(parts[0])))]
        for part, number in zip(parts[1:], numbers):
            pieces += [self.spelled(number), np.broadcast_to(part, (*shape, len(part)))]
        return np.concatenate([*pieces, *map(self.spelled, numbers[len(parts) - 1 :])], axis=-1)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tokens of a hidden sentence, of a question with its answer, and of the answer."""

    hidden: int
    asked: int
    answer: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "Sizes":
        """The sizes as a tokenizer has them; raises as `Phrases.of`."""
        phrases = Phrases.of(tokenizer)
        name, number = np.zeros(NAME_DIGITS, np.int64), np.zeros(KEY_DIGITS, np.int64)
        hidden, asked = (len(phrases.joined(parts, name, number)) for parts in (phrases.hidden, phrases.asked))
        return cls(hidden, asked, KEY_DIGITS * phrases.digits.shape[1])

    def places(self, length: int, questions: int) -> AnswerPlaces:
        """Where the answers to so many questions, or to fewer, at the end of samples of `length` tokens stand.

        Evaluations ask for one, so that their samples may be shorter than so many questions.
        """
        return AnswerPlaces(max(0, length - (questions - 1) * self.asked - self.answer), questions * self.answer)


@dataclasses.dataclass(frozen=True)
class Passkey:
    """The task.

    Attributes:
      key: of the random numbers.
      text: that the keys are hidden in.
      tokenizer: of the text.
      keys: K, numbers hidden in a sample.
      questions: of them, those that a sample asks for.
      in_turn: whether the asked key's depth goes by the sample's number.
    """

    key: int
    text: TokenStream
    tokenizer: Tokenizer
    keys: int
    questions: int
    in_turn: bool

    @functools.cached_property
    def phrases(self) -> Phrases:
        """The sentences in tokens."""
        return Phrases.of(self.tokenizer)

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Of the sentences."""
        return Sizes.of(self.tokenizer)

    def chance(self, length: int) -> float:
        return 1 / self.keys if self.keys > 1 else 10.0**-KEY_DIGITS

    def check(self, length: int) -> None:
        least = (self.keys + 2) * self.sizes.hidden + self.questions * self.sizes.asked
        if length < least:
            fields = f"data.items = {self.keys} and data.questions = {self.questions}"
            raise ConfigError("data.sequence_length", length, f"must be at least {least} for {fields}")
        if len(self.text.tokens) < length:
            raise DataError(
                f"data.sequence_length = {length}: the text to hide keys in has only {len(self.text.tokens)} tokens"
            )

    def make(self, numbers: np.ndarray, length: int) -> Samples:
        sizes, count = self.sizes, self.questions
        words = draw(self.key, numbers, 5 * self.keys)
        split = np.cumsum([2 * self.keys, self.keys, 1, 1])
        name_words, key_words, text_words, place_words, rest = np.split(words, split, axis=1)
        names = _digits(distinct(name_words, 10**NAME_DIGITS), NAME_DIGITS)
        keys = _digits(below(key_words, 10**KEY_DIGITS), KEY_DIGITS)
        sentences = self.phrases.joined(self.phrases.hidden, names, keys)
        questions = self.phrases.joined(self.phrases.asked, names[:, :count], keys[:, :count])
        body = length + 1 - count * sizes.asked
        text = body - self.keys * sizes.hidden
        begins = below(text_words[:, 0], len(self.text.tokens) - text + 1)
        offset = len(self.phrases.hidden[0]) + NAME_DIGITS * self.phrases.digits.shape[1] + len(self.phrases.hidden[1])
        firsts = self._places(numbers, place_words[:, 0], length, body - sizes.hidden, offset)
        tokens, places = np.empty((len(numbers), length + 1), np.int32), np.empty((len(numbers), self.keys), np.int64)
        for row, place, first, begin, parts, others in zip(tokens, places, firsts, begins, sentences, rest):
            row[:body], place[:] = _hide(self.text.tokens[begin : begin + text], parts, int(first), others)
        tokens[:, body:] = questions.reshape(len(numbers), -1)
        ends = length - 1 - np.arange(count)[::-1] * sizes.asked  # where an answer's last token is predicted
        answers = np.zeros((len(numbers), length), bool)
        answers[:, (ends[:, None] - np.arange(sizes.answer)).ravel()] = True
        starts, sources = (np.full((len(numbers), length), -1, np.int32) for _ in range(2))
        starts[:, ends] = ends + 1 - sizes.answer
        sources[:, ends] = places[:, :count] + offset
        return Samples(tokens, answers, starts, sources)

    def _places(self, numbers: np.ndarray, words: np.ndarray, length: int, last: int, offset: int) -> np.ndarray:
        """Where the first asked keys' sentences begin, int64 [samples] in 0 .. last; the key stands `offset` later."""
        if not self.in_turn:
            return below(words, last + 1)
        first = offset * DEPTHS // length
        depths = first + numbers % ((last + offset) * DEPTHS // length + 1 - first)
        lowest, end = (np.clip(-(-part * length // DEPTHS) - offset, 0, last + 1) for part in (depths, depths + 1))
        return lowest + below(words, end - lowest)


def _digits(values: np.ndarray, count: int) -> np.ndarray:
    """Decimal digits of integers [...], the highest first: [..., count]."""
    return values[..., None] // 10 ** np.arange(count - 1, -1, -1) % 10


def _hide(text: np.ndarray, sentences: np.ndarray, place: int, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The text with sentences in between: the first begins at `place` of the result, the others anywhere.

    Args:
      text: [tokens].
      sentences: [K, tokens].
      place: at most what leaves room for the first sentence.
      words: random, uint64 [2 * (K - 1)].

    Returns:
      the result, [tokens + K * tokens of a sentence], and where in it each sentence begins, int64 [K].
    """
    others, size = len(sentences) - 1, sentences.shape[1]
    room = len(text) + others * size  # of all that is not the first sentence
    before = int((below(words[:others], room) < place).sum())
    before = min(max(before, others - (room - place) // size), place // size)
    head = place - before * size  # tokens of the text before the first sentence
    cuts = np.concatenate(
        [
            np.sort(below(words[others : others + before], head + 1)),
            [head],
            np.sort(head + below(words[others + before :], len(text) - head + 1)),
        ]
    ).astype(np.int64)
    order = np.array([*range(1, 1 + before), 0, *range(1 + before, len(sentences))])
    places = np.empty(len(sentences), np.int64)
    places[order] = cuts + size * np.arange(len(sentences))
    parts = np.split(text, cuts)
    pieces = [parts[0], *(piece for pair in zip(sentences[order], parts[1:]) for piece in pair)]
    return np.concatenate(pieces), places
