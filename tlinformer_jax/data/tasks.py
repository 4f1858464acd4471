"""Synthetic tasks: splits with generated samples, in which only answers count in the loss.

Sample i of a split is a pure function of the configuration, the split's name and i, so tasks are batched like text
(`data.batches`). This module has recall, copying and state tracking; `data.needles` has facts hidden in text.

An answer is one or more tokens after a question. Its tokens also occur earlier in the sample, at its source. The region
of an answer says where its source is, relative to the generation window that predicts its first token:

    own       in the same generation window, or in the tokens before it that are computed with it (window_overlap),
    observed  in the last W_oh rows before that window, which are in the observation window,
    history   before those: TConstFormer finds it only in the compressed history; TLinFormer's window and a Transformer
              read it directly; a sliding window needs layers that pass it on.

For models without windows, the regions follow from the configuration's window fields.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from tlinformer_jax.data.streams import TokenStream, in_order
from tlinformer_jax.errors import ConfigError

REGIONS = ("own", "observed", "history")
DEPTHS = 20  # equal parts of a sample, by which answers are counted; depth 0 is the sample's start
GAP_POWER = 0.01  # exponent of recall's power law
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # constant of SplitMix64

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples of a task; `starts` and `sources` are -1 unless a position predicts the last token of an answer."""

    tokens: np.ndarray  # int32 [samples, N + 1]
    answers: np.ndarray  # bool [samples, N]: whether the token after position t belongs to an answer
    starts: np.ndarray  # int32 [samples, N]: the position before the answer's first token
    sources: np.ndarray  # int32 [samples, N]: the position of the first token of the answer's source
    labels: np.ndarray | None = None  # int32 [samples, N]; None if labels are the next tokens

    @classmethod
    def of(cls, tokens: np.ndarray, ends: np.ndarray, sources: np.ndarray, size: int = 1) -> "Samples":
        """Makes samples with answers of `size` tokens, whose last tokens follow positions `ends` [samples, answers]."""
        shape, rows = (len(tokens), tokens.shape[1] - 1), np.arange(len(tokens))[:, None]
        answers, of_starts, of_sources = np.zeros(shape, bool), *(np.full(shape, -1, np.int32) for _ in range(2))
        of_starts[rows, ends], of_sources[rows, ends] = ends + 1 - size, sources
        for back in range(size):
            answers[rows, ends - back] = True
        return cls(tokens.astype(np.int32), answers, of_starts, of_sources)


@dataclasses.dataclass(frozen=True)
class AnswerPositions:
    """The positions of the labels that count in a sample: none before `first`, and at most `most`."""

    first: int
    most: int


class Task(Protocol):
    """A generator of samples."""

    def chance(self, length: int) -> float:
        """Returns the accuracy of guessing among those answers of a sample that were not asked for before."""

    def check(self, length: int) -> None:
        """Checks that samples of `length` tokens can hold the task; if not, raises a UserError that names the field."""

    def make(self, numbers: np.ndarray, length: int) -> Samples:
        """Makes the samples with these numbers, int64 [samples] >= 0, of `length` + 1 tokens."""


@dataclasses.dataclass(frozen=True)
class TaskSplit:
    """A split of `count` samples of a task."""

    task: Task
    count: int


Split = TokenStream | TaskSplit


# ---- Samples of any task


def take_task_samples(split: TaskSplit, length: int, indices: np.ndarray) -> tuple[Arrays, Samples]:
    """Returns {inputs, labels: int32 [samples, N], weights: float32 [samples, N]} of `indices`, and the samples.

    A negative index gives a row of padding: token 0 with weight 0.
    """
    real = indices >= 0
    samples = split.task.make(np.where(real, indices, 0), length)
    tokens = np.where(real[:, None], samples.tokens, 0).astype(np.int32)
    weights = (samples.answers & real[:, None]).astype(np.float32)
    labels = tokens[:, 1:] if samples.labels is None else np.where(real[:, None], samples.labels, 0).astype(np.int32)
    return {"inputs": tokens[:, :-1], "labels": labels, "weights": weights}, samples


def answer_batches(
    split: TaskSplit,
    length: int,
    batch_size: int,
    rows: np.ndarray | slice,
    window: int,
    observed: Callable[[int], int],
    overlap: int = 0,
) -> Iterator[Arrays]:
    """Yields every sample of a split once, in order, like `evaluation_batches`, with regions and depths of answers.

    `window` is W_og; `observed` returns the rows of the observation window for a history's length. A batch has inputs,
    labels, weights, and int32 [rows, N] starts, as in `Samples`, and cells: at the same positions, the answer's region
    times DEPTHS plus the depth of its source. Both are -1 elsewhere.
    """
    split.task.check(length)
    for indices in in_order(split.count, batch_size, rows):
        batch, samples = take_task_samples(split, length, indices)
        batch["starts"] = np.where((indices >= 0)[:, None], samples.starts, -1)
        cells = regions(samples, window, observed, overlap) * DEPTHS + samples.sources * DEPTHS // length
        batch["cells"] = np.where(batch["starts"] >= 0, cells, -1).astype(np.int32)
        yield batch


def regions(samples: Samples, window: int, observed: Callable[[int], int], overlap: int = 0) -> np.ndarray:
    """Returns each answer's region, an index of REGIONS, at the positions that `starts` marks; undefined elsewhere."""
    number = np.maximum(samples.starts, 0) // window
    firsts = np.maximum(np.arange(0, samples.starts.shape[1], window) - overlap, 0)
    seen = np.array([first - observed(int(first)) for first in firsts])
    return np.where(samples.sources >= firsts[number], 0, np.where(samples.sources >= seen[number], 1, 2))


# ---- Copying and recall


@dataclasses.dataclass(frozen=True)
class Copying:
    """Segment copy: random symbols, a mark, then the same symbols again. The second half are the answers.

        a1 a2 ... aS 0 a1 a2 ... aS        S = N // 2

    Each answer occurred S + 1 tokens before: if S exceeds both windows, they contain no answer. `key` is for the random
    numbers; of the `vocabulary` ids, 0 is the mark.
    """

    key: int
    vocabulary: int

    def chance(self, length: int) -> float:
        return 1 / (self.vocabulary - 1)

    def check(self, length: int) -> None:
        if length < 2 or length % 2:
            raise ConfigError("data.sequence_length", length, "must be even for data.dataset = 'copy'")

    def make(self, numbers: np.ndarray, length: int) -> Samples:
        size = length // 2
        symbols = 1 + below(random_bits(self.key, numbers, size), self.vocabulary - 1)
        tokens = np.concatenate([symbols, np.zeros((len(numbers), 1), np.int64), symbols], axis=1)
        ends = np.broadcast_to(np.arange(size, length), (len(numbers), length - size))
        return Samples.of(tokens, ends, ends - size)


@dataclasses.dataclass(frozen=True)
class Recall:
    """Multi-query associative recall: pairs of a key and a value, then every key again; its value is the answer.

        k1 v1 k2 v2 ... kP vP | filler and, in between, each key once more with its value

    Keys are different ids of the vocabulary's lower half, without 0; values and filler are any ids of the upper half.
    The gap before a question follows a power law that favours small gaps, as in Zoology, which defined this protocol. A
    sample of `full_length` tokens has `pairs` pairs; a shorter one, in a curriculum, proportionally fewer. "recall-gap"
    has a filler between key and value (`pair_size` 3), so that reading the previous token cannot join them.
    """

    key: int
    vocabulary: int
    pairs: int
    full_length: int
    pair_size: int = 2

    def __post_init__(self) -> None:
        if self.vocabulary // 2 - 1 < self.pairs:
            allowed = f"must be at most {self.vocabulary // 2 - 1}, the number of keys in the vocabulary"
            raise ConfigError("data.num_items", self.pairs, allowed)

    def chance(self, length: int) -> float:
        return chance_by_elimination(pairs_of(length, self.pairs, self.full_length))

    def check(self, length: int) -> None:
        pairs = pairs_of(length, self.pairs, self.full_length)
        least = self.pair_size + 2
        if length < least * pairs:
            allowed = f"must be at least {least * pairs}, that is {least} for each pair"
            raise ConfigError("data.sequence_length", length, allowed)

    def make(self, numbers: np.ndarray, length: int) -> Samples:
        pairs = pairs_of(length, self.pairs, self.full_length)
        half, rows = self.vocabulary // 2, np.arange(len(numbers))[:, None]
        slots, first = (length - self.pair_size * pairs) // 2, self.pair_size * pairs
        bits = random_bits(self.key, numbers, 3 * pairs + slots + length + 1)
        of_keys, of_values, of_slots, filler = np.split(bits, np.cumsum([2 * pairs, pairs, slots]), axis=1)
        keys = 1 + distinct(of_keys, half - 1)
        values = half + below(of_values, self.vocabulary - half)
        tokens = half + below(filler, self.vocabulary - half)
        tokens[:, 0 : first : self.pair_size], tokens[:, self.pair_size - 1 : first : self.pair_size] = keys, values
        # Questions take slots drawn without replacement, with weights (slot + 1)^(GAP_POWER - 1): the slots with the
        # smallest exponential waiting times.
        uniform = ((of_slots >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        waiting = -np.log(uniform) * np.arange(1, slots + 1) ** (1 - GAP_POWER)
        asked = first + 2 * np.argsort(waiting, axis=1, kind="stable")[:, :pairs]
        tokens[rows, asked], tokens[rows, asked + 1] = keys, values
        return Samples.of(tokens, asked, self.pair_size * np.arange(1, pairs + 1) - 1)


def chance_by_elimination(pairs: int) -> float:
    """Returns the accuracy of guessing among the values not yet used, H_P / P, as each key is asked for once."""
    return sum(1 / left for left in range(1, pairs + 1)) / pairs


def pairs_of(length: int, pairs: int, full_length: int) -> int:
    """Returns the pairs of a sample of `length` tokens, if a sample of `full_length` has `pairs`."""
    return max(1, pairs * min(length, full_length) // full_length)


# ---- State tracking


# Groups of permutations; permutation a moves thing i to position a[i]. "parity": whether the number of ones is odd so
# far. "s5": all permutations of five things; models of constant depth are believed unable to solve its word problem at
# all lengths (TC0 and NC1).
GROUPS = {"parity": ((0, 1), (1, 0)), "s5": tuple(itertools.permutations(range(5)))}


@dataclasses.dataclass(frozen=True)
class StateTracking:
    """State tracking: a sample is a sequence of group elements, and each label is the product of all elements so far.

        g1          g2           g3 ...          random elements of the group
        g1     g2 * g1     g3 * g2 * g1 ...      the labels

    The state after a position depends on all tokens before it; as an answer, its source is the sample's first token.
    The first ids are the group's elements in their order, the next as many ids the states.
    """

    key: int  # for the random numbers
    vocabulary: int
    group: tuple[tuple[int, ...], ...]

    def chance(self, length: int) -> float:
        return 1 / len(self.group)

    def check(self, length: int) -> None:
        if self.vocabulary < 2 * len(self.group):
            allowed = f"must have at least {2 * len(self.group)} ids: the elements of the group, and the states"
            raise ConfigError("data.tokenizer", f"numbers:{self.vocabulary}", allowed)

    def make(self, numbers: np.ndarray, length: int) -> Samples:
        number = {permutation: index for index, permutation in enumerate(self.group)}
        products = np.array([[number[tuple(a[i] for i in b)] for b in self.group] for a in self.group])  # b, then a
        tokens = below(random_bits(self.key, numbers, length + 1), len(self.group))
        states = tokens[:, :-1].copy()
        for position in range(1, length):
            states[:, position] = products[tokens[:, position], states[:, position - 1]]
        ends = np.broadcast_to(np.arange(length), states.shape)
        samples = Samples.of(tokens, ends, np.zeros_like(states))
        return dataclasses.replace(samples, labels=(len(self.group) + states).astype(np.int32))


# ---- Random numbers
# SplitMix64 makes each number from a key, the sample's number and the position in the sample. So a sample is the same
# in every batch, process and thread, on every platform and with every numpy version.


def key_of(*names: object) -> int:
    """Returns a 64-bit key for the names."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "little")


def random_bits(key: int, samples: np.ndarray, count: int) -> np.ndarray:
    """Returns `count` random 64-bit numbers for each sample, uint64 [samples, count]; `samples` int [samples] >= 0."""
    start = mixed(np.asarray(samples).astype(np.uint64)[:, None] * GOLDEN + np.uint64(key))
    return mixed(start + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN)


def mixed(bits: np.ndarray) -> np.ndarray:
    """Applies SplitMix64's mixing function to uint64."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def below(bits: np.ndarray, bound: int | np.ndarray) -> np.ndarray:
    """Maps random bits to integers 0 .. bound - 1, int64; bound < 2^31, a number or a shape that broadcasts."""
    return ((bits >> np.uint64(32)) * np.asarray(bound, np.uint64) >> np.uint64(32)).astype(np.int64)


def distinct(bits: np.ndarray, bound: int) -> np.ndarray:
    """Draws different integers below `bound` in random order, int64 [samples, count], of bits [samples, 2 * count]."""
    # Floyd's algorithm draws number j from 0 .. newest[j], and replaces it by newest[j] if it has been chosen before.
    # All are drawn at once: a loop over them would hold Python's lock longer than a small model's update takes.
    count = bits.shape[1] // 2
    draws, first = np.arange(count), bound - count
    newest = first + draws
    drawn = below(bits[:, :count], newest + 1)
    ordered = np.sort(drawn * count + draws, axis=1)  # by number, then by draw
    again = np.pad(np.diff(ordered // count, axis=1) == 0, ((0, 0), (1, 0)))
    repeated = np.empty(drawn.shape, bool)  # whether an earlier draw gave the same number
    np.put_along_axis(repeated, ordered % count, again, axis=1)
    # A number of at least `first` may also have been chosen as the replacement of an earlier one, its source.
    sources = np.maximum(drawn - first, 0)
    possible = (drawn >= first) & (sources < draws)
    taken = repeated
    for _ in range(count):  # ends early, since replacements of replacements are rare
        found = repeated | (possible & np.take_along_axis(taken, sources, axis=1))
        if np.array_equal(found, taken):
            break
        taken = found
    chosen = np.where(taken, newest, drawn)
    return np.take_along_axis(chosen, np.argsort(bits[:, count:], axis=1, kind="stable"), axis=1)
