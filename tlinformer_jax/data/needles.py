"""Needles: sentences hidden in running text, and questions about them at the end.

    ... text ... The pass key of 4 1 is 7 0 2 9 5. ... text ... What is the pass key of 4 1? It is 7 0 2 9 5

This is "passkey". The other tasks are RULER's needles in a haystack, in which a name is a word:

    niah-1    the text repeats a few short sentences; the value is a number of seven digits
    niah-2    the text comes from a corpus; the value is a number of seven digits
    niah-3    the text comes from a corpus; the value is the 32 hexadecimal digits of a UUID

With one needle in a sample they are RULER's S-NIAH-1, 2 and 3, with more needles (`data.num_items`) MK-NIAH.

The text is a random section of the corpus. Each digit is encoded separately, with a space before it. Every sample draws
its own names and values; its names are different. An evaluation sample asks for one needle, whose depth cycles through
all possible depths with the sample's number, so that each depth is asked for equally often; in short samples the
question occupies the last depths. In training, needles are at random positions, and all are asked for, one by one.
"""

import collections
import dataclasses
import functools

import numpy as np

from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tasks import DEPTHS, AnswerPositions, Samples, below, distinct, random_bits
from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.errors import ConfigError, DataError

# Five letters each, so that all have equal length in bytes, and one token in most tokenizers for English.
WORDS = """
    apple beach bread brick brush chair chalk chest child cloud clock coach coast cream crown dance dream drink
    earth fence field flame floor flour fruit ghost giant glass globe glove grass group guard guest heart honey
    horse hotel house image judge juice knife label lemon level light limit lunch march match medal metal model
    money month motor mouse mouth music night noise north novel nurse ocean onion order organ paint panel paper
    peace pearl phone photo piano pilot plane plant plate point power price pride print prize queen radio range
    river robot salad scale scene sense shade shape sheep shelf shell shirt shore skill smile smoke snake sound
    south space spark spoon sport stage stamp state steam steel stone store storm story sugar sword table tiger
    title tooth
"""
NOISE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NOISE_TOKENS = 1 << 21  # length of the haystack of niah-1, which repeats NOISE
DECIMAL, HEXADECIMAL = "0123456789", "0123456789abcdef"


@dataclasses.dataclass(frozen=True)
class Form:
    """The sentences of a task: what is hidden, and how it is asked for."""

    hidden: tuple[str, str, str]  # the sentence: its parts before, between and after name and value
    asked: tuple[str, str]  # the question: its parts before and after the name; the value follows
    names: tuple[str, ...]  # each a sequence of parts separated by spaces
    symbols: str  # possible symbols of a value
    size: int  # symbols per value
    draws: int = 1  # random numbers drawn per value, for size / draws symbols each


MAGIC = (" The special magic number for", " is", "."), (" What is the special magic number for", "? It is")
FORMS = {
    "passkey": Form(
        (" The pass key of", " is", "."),
        (" What is the pass key of", "? It is"),
        tuple(f"{first} {second}" for first in DECIMAL for second in DECIMAL),
        DECIMAL,
        size=5,
    ),
    "niah-1": Form(*MAGIC, tuple(WORDS.split()), DECIMAL, size=7),
    "niah-2": Form(*MAGIC, tuple(WORDS.split()), DECIMAL, size=7),
    "niah-3": Form(*MAGIC, tuple(WORDS.split()), HEXADECIMAL, size=32, draws=8),
}


@dataclasses.dataclass(frozen=True)
class Phrases:
    """A form in tokens: int64 [names, tokens of a name], [symbols, tokens of a symbol], and parts of sentences."""

    names: np.ndarray
    symbols: np.ndarray
    hidden: tuple[np.ndarray, ...]
    asked: tuple[np.ndarray, ...]
    size: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, form: Form) -> "Phrases":
        """Encodes a form. Keeps the names of the most common token count, so that all sentences have equal length."""
        symbols = [tokenizer.encode(f" {symbol}") for symbol in form.symbols]
        if len({len(symbol) for symbol in symbols}) > 1:
            raise DataError(f"data.tokenizer = {tokenizer.name!r}: must encode all digits in equally many tokens")
        names = [np.concatenate([tokenizer.encode(f" {part}") for part in name.split()]) for name in form.names]
        ((usual, _),) = collections.Counter(map(len, names)).most_common(1)
        alike = np.stack([name for name in names if len(name) == usual]).astype(np.int64)
        hidden, asked = (
            tuple(tokenizer.encode(text).astype(np.int64) for text in texts) for texts in (form.hidden, form.asked)
        )
        return cls(alike, np.stack(symbols).astype(np.int64), hidden, asked, form.size)

    def sizes(self) -> tuple[int, int, int]:
        """Returns the tokens of a hidden sentence, of a question with its answer, and of the answer."""
        answer = self.size * self.symbols.shape[1]
        hidden, asked = (sum(map(len, parts)) + self.names.shape[1] + answer for parts in (self.hidden, self.asked))
        return hidden, asked, answer

    def value_offset(self) -> int:
        """Returns the number of tokens of a hidden sentence before its value."""
        return len(self.hidden[0]) + self.names.shape[1] + len(self.hidden[1])

    def answer_positions(self, length: int, questions: int) -> AnswerPositions:
        """Returns the positions of the answers to at most `questions` questions in samples of `length` tokens."""
        _, asked, answer = self.sizes()
        return AnswerPositions(max(0, length - (questions - 1) * asked - answer), questions * answer)

    def sentences(self, parts: tuple[np.ndarray, ...], names: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Joins `parts`, names int64 [samples, n] and values [samples, n, size] to sentences [samples, n, tokens]."""
        spelled = self.symbols[values].reshape(*names.shape, -1)
        repeated = [np.broadcast_to(part, (*names.shape, len(part))) for part in parts]
        return np.concatenate([repeated[0], self.names[names], repeated[1], spelled, *repeated[2:]], axis=-1)


@dataclasses.dataclass(frozen=True)
class Needles:
    """The task of finding needles in a text."""

    key: int  # for the random numbers
    form: Form
    text: TokenStream  # the haystack, as `tokenizer` encodes it
    tokenizer: Tokenizer
    needles: int  # per sample
    questions: int  # per sample
    in_turn: bool  # whether the depth of the needle asked for first follows from the sample's number

    @functools.cached_property
    def phrases(self) -> Phrases:
        return Phrases.of(self.tokenizer, self.form)

    def chance(self, length: int) -> float:
        return 1 / self.needles if self.needles > 1 else float(len(self.form.symbols)) ** -self.form.size

    def check(self, length: int) -> None:
        hidden, asked, _ = self.phrases.sizes()
        least = (self.needles + 2) * hidden + self.questions * asked
        if self.needles > len(self.phrases.names):
            allowed = f"must be at most {len(self.phrases.names)}: only so many names have equally many tokens"
            raise ConfigError("data.num_items", self.needles, allowed)
        if length < least:
            allowed = f"must be at least {least} for data.num_items = {self.needles}"
            raise ConfigError("data.sequence_length", length, allowed)
        if len(self.text.tokens) < length:
            allowed = f"the text to hide needles in has only {len(self.text.tokens)} tokens"
            raise DataError(f"data.sequence_length = {length}: {allowed}")

    def make(self, numbers: np.ndarray, length: int) -> Samples:
        phrases, needles, count = self.phrases, self.needles, self.questions
        hidden_size, asked_size, answer_size = phrases.sizes()
        bits = random_bits(self.key, numbers, (4 + self.form.draws) * needles)
        split = np.cumsum([2 * needles, self.form.draws * needles, 1, 1])
        of_names, of_values, of_text, of_position, rest = np.split(bits, split, axis=1)
        names, values = distinct(of_names, len(phrases.names)), self._values(of_values)
        sentences = phrases.sentences(phrases.hidden, names, values)
        questions = phrases.sentences(phrases.asked, names[:, :count], values[:, :count])
        body = length + 1 - count * asked_size
        text = body - needles * hidden_size
        begins = below(of_text[:, 0], len(self.text.tokens) - text + 1)
        firsts = self._first_positions(numbers, of_position[:, 0], length, body - hidden_size)
        tokens = np.empty((len(numbers), length + 1), np.int32)
        positions = np.empty((len(numbers), needles), np.int64)
        for row, position, first, begin, parts, others in zip(tokens, positions, firsts, begins, sentences, rest):
            row[:body], position[:] = _hide(self.text.tokens[begin : begin + text], parts, int(first), others)
        tokens[:, body:] = questions.reshape(len(numbers), -1)
        ends = length - 1 - np.arange(count)[::-1] * asked_size  # positions that predict an answer's last token
        ends = np.broadcast_to(ends, (len(numbers), count))
        return Samples.of(tokens, ends, positions[:, :count] + phrases.value_offset(), answer_size)

    def _values(self, bits: np.ndarray) -> np.ndarray:
        """Returns the symbols of each needle's value, int64 [samples, needles, size], highest digit first."""
        base, size = len(self.form.symbols), self.form.size // self.form.draws
        symbols = below(bits, base**size)[..., None] // base ** np.arange(size - 1, -1, -1) % base
        return symbols.reshape(len(bits), self.needles, self.form.size)

    def _first_positions(self, numbers: np.ndarray, bits: np.ndarray, length: int, last: int) -> np.ndarray:
        """Returns where the first asked-for sentence of each sample begins, int64 [samples] in 0 .. last."""
        if not self.in_turn:
            return below(bits, last + 1)
        offset = self.phrases.value_offset()
        first = offset * DEPTHS // length
        depths = first + numbers % ((last + offset) * DEPTHS // length + 1 - first)
        lowest, end = (np.clip(-(-part * length // DEPTHS) - offset, 0, last + 1) for part in (depths, depths + 1))
        return lowest + below(bits, end - lowest)


def _hide(text: np.ndarray, sentences: np.ndarray, position: int, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inserts sentences [K, tokens] into a text [tokens]: the first begins at `position`, the others at random.

    Uses random `bits`, uint64 [2 * (K - 1)]. Returns the result, and where each sentence begins in it, int64 [K].
    """
    others, size = len(sentences) - 1, sentences.shape[1]
    room = len(text) + others * size  # tokens outside the first sentence
    before = int((below(bits[:others], room) < position).sum())
    before = min(max(before, others - (room - position) // size), position // size)
    head = position - before * size  # tokens of the text before the first sentence
    early = np.sort(below(bits[others : others + before], head + 1))
    late = np.sort(head + below(bits[others + before :], len(text) - head + 1))
    cuts = np.concatenate([early, [head], late]).astype(np.int64)
    order = np.array([*range(1, 1 + before), 0, *range(1 + before, len(sentences))])
    positions = np.empty(len(sentences), np.int64)
    positions[order] = cuts + size * np.arange(len(sentences))
    parts = np.split(text, cuts)
    pieces = [parts[0], *(piece for pair in zip(sentences[order], parts[1:]) for piece in pair)]
    return np.concatenate(pieces), positions
