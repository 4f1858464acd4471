"""Synthetic tasks: splits whose samples are generated, and whose loss counts at the answers only.

Sample i of a split is a pure function of the configuration, the split's name and i, so tasks are batched as text is
(`data.batches`).

An answer is one or more tokens after a question. It also stands at an earlier place, its source. The region of an
answer is where its source lies, seen from the generation window in which its first token is predicted:

    own       in the same generation window,
    observed  in the last W_oh rows before that window, which the observation window holds,
    history   before those: TConstFormer finds it in the compressed history only; TLinFormer's window and full attention
              read it themselves; a sliding window needs layers that relay it.

For models without windows the regions are those of the configuration's window fields.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from tlinformer_jax.data.draws import below, random_bits
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.errors import ConfigError

REGIONS = ("own", "observed", "history")
DEPTHS = 20  # equal parts of a sample by which answers are counted: depth 0 is the sample's start

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples of a task.

    Attributes:
      tokens: int32 [samples, N + 1].
      answers: bool [samples, N]: whether the token after position t belongs to an answer.
      starts: int32 [samples, N]: if the token after position t is an answer's last, the position before its first;
        else -1.
      sources: int32 [samples, N]: at the same positions, that of the first token of the answer's source; else -1.
    """

    tokens: np.ndarray
    answers: np.ndarray
    starts: np.ndarray
    sources: np.ndarray


@dataclasses.dataclass(frozen=True)
class AnswerPlaces:
    """Where the labels of every sample count: none before position `first`, and at most `most`."""

    first: int
    most: int


class Task(Protocol):
    """Generates samples."""

    def chance(self, length: int) -> float:
        """The accuracy of guessing among the answers of a sample that were not asked for before."""

    def check(self, length: int) -> None:
        """Refuses a `length` at which a sample cannot hold the task.

        Raises:
          ConfigError, DataError: naming the field.
        """

    def make(self, numbers: np.ndarray, length: int) -> Samples:
        """The samples with these numbers, int64 [samples] >= 0, of `length` + 1 tokens."""


@dataclasses.dataclass(frozen=True)
class Copying:
    """Segment copy: random symbols, a mark, then the same symbols once more. The second half are the answers.

        a1 a2 ... aS 0 a1 a2 ... aS        S = N // 2

    Each answer stood S + 1 tokens before: where S exceeds both windows, none can be read from them.

    Attributes:
      key: of the random numbers.
      vocabulary: number of ids: 0 is the mark, the others are symbols.
    """

    key: int
    vocabulary: int

    def chance(self, length: int) -> float:
        return 1 / (self.vocabulary - 1)

    def check(self, length: int) -> None:
        if length < 2 or length % 2:
            raise ConfigError("data.sequence_length", length, "must be even, two halves, for data.dataset = 'copy'")

    def make(self, numbers: np.ndarray, length: int) -> Samples:
        size = length // 2
        symbols = 1 + below(random_bits(self.key, numbers, size), self.vocabulary - 1)
        tokens = np.concatenate([symbols, np.zeros((len(numbers), 1), np.int64), symbols], axis=1)
        answers = np.zeros((len(numbers), length), bool)
        answers[:, size:] = True
        position = np.broadcast_to(np.arange(length, dtype=np.int32), answers.shape)
        return Samples(
            tokens.astype(np.int32), answers, np.where(answers, position, -1), np.where(answers, position - size, -1)
        )


@dataclasses.dataclass(frozen=True)
class TaskSplit:
    """A split of `count` samples of a task."""

    task: Task
    count: int


Split = TokenStream | TaskSplit


def take_task_samples(split: TaskSplit, length: int, indices: np.ndarray) -> tuple[Arrays, Samples]:
    """{inputs, labels: int32 [samples, N], weights: float32 [samples, N]} of the samples `indices`, and the samples.

    A negative index makes a row of padding: token 0 with weight 0.
    """
    real = indices >= 0
    samples = split.task.make(np.where(real, indices, 0), length)
    tokens = np.where(real[:, None], samples.tokens, 0).astype(np.int32)
    weights = (samples.answers & real[:, None]).astype(np.float32)
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": weights}, samples


def answer_batches(
    split: TaskSplit,
    length: int,
    batch_size: int,
    rows: np.ndarray | slice,
    window: int,
    observed: Callable[[int], int],
) -> Iterator[Arrays]:
    """Yields every sample of a split once, in order, as `evaluation_batches` does, with regions and depths of answers.

    Args:
      split: of a task.
      length: N.
      batch_size: sequences a batch; the last is padded.
      rows: of each batch, that are wanted.
      window: W_og.
      observed: length of a history -> rows of its observation window.

    Yields:
      inputs, labels, weights; int32 [rows, N] starts, as in `Samples`, and cells, at the same positions the answer's
      region times DEPTHS plus the depth of its source. Both are -1 elsewhere.
    """
    split.task.check(length)
    for start in range(0, split.count, batch_size):
        indices = np.arange(start, start + batch_size)
        indices[indices >= split.count] = -1
        indices = indices[rows]
        batch, samples = take_task_samples(split, length, indices)
        real = (indices >= 0)[:, None]
        batch["starts"] = np.where(real, samples.starts, -1)
        cells = regions(samples, window, observed) * DEPTHS + samples.sources * DEPTHS // length
        batch["cells"] = np.where(batch["starts"] >= 0, cells, -1).astype(np.int32)
        yield batch


def regions(samples: Samples, window: int, observed: Callable[[int], int]) -> np.ndarray:
    """The region of every answer, an index of REGIONS, at the positions that `starts` marks; undefined elsewhere."""
    begin = np.maximum(samples.starts, 0) // window * window
    firsts = np.arange(0, samples.starts.shape[1], window)
    seen = np.array([first - observed(int(first)) for first in firsts])[begin // window]
    return np.where(samples.sources >= begin, 0, np.where(samples.sources >= seen, 1, 2))
