"""Synthetic tasks: splits of samples that are made, not read, and whose loss counts at the answers only.

Sample i of a split is a pure function of the data's settings, the split's name and i, so a task goes through the same
batches as text does (`data.batches`): an order drawn from the run's seed, an update a function of its number.

An answer is one or more tokens that follow a question, and stands once before, at its source. Where the source lies,
seen from the generation window in which the answer begins to be predicted, makes its region:

    own       in the same generation window,
    observed  in the last W_oh rows before that window, which the observation window holds,
    history   before those: TConstFormer has only the compressed history to tell it from; TLinFormer's window and full
              attention read it themselves; a sliding window needs layers that relay it.

Models without windows are measured by the same regions, those of the configuration's window fields.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from tlinformer_jax.data.streams import TokenStream

REGIONS = ("own", "observed", "history")
DEPTHS = 20  # equal parts of a sample by which answers are counted: depth 0 is the sample's start

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Samples of a task.

    Attributes:
      tokens: int32 [samples, N + 1].
      answers: bool [samples, N]: whether the token after position t belongs to an answer.
      starts: int32 [samples, N]: where the token after position t is an answer's last, the position after which its
        first stands; else -1.
      sources: int32 [samples, N]: there, the position of the answer's first token in what is to be recalled; else -1.
    """

    tokens: np.ndarray
    answers: np.ndarray
    starts: np.ndarray
    sources: np.ndarray


@dataclasses.dataclass(frozen=True)
class AnswerPlaces:
    """Where the labels of a sample count, whatever its number.

    Attributes:
      first: none before this position.
      most: no more than so many.
    """

    first: int
    most: int


class Task(Protocol):
    """What makes samples."""

    def chance(self, length: int) -> float:
        """The accuracy of a guess by one who knows which answers occur in a sample, and which were asked for before."""

    def check(self, length: int) -> None:
        """Refuses samples of `length` tokens where they cannot hold the task.

        Raises:
          ConfigError, DataError: naming the field.
        """

    def make(self, numbers: np.ndarray, length: int) -> Samples:
        """Samples of the given numbers, int64 [samples] >= 0, of `length` + 1 tokens."""


@dataclasses.dataclass(frozen=True)
class TaskSplit:
    """A split of a task, in the place of a token stream.

    Attributes:
      task: makes the samples.
      count: how many there are.
    """

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
    """Every sample of a split once, in order, as `evaluation_batches` yields them, with what tells answers apart.

    Args:
      split: of a task.
      length: N.
      batch_size: sequences a batch; the last is filled up with padding.
      rows: of each batch, that are wanted.
      window: W_og.
      observed: rows of the observation window of a history of so many tokens.

    Yields:
      inputs, labels, weights, and int32 [rows, N]: starts, as `Samples` has them; cells, there the answer's region
      times DEPTHS plus the depth of its source. Both are -1 elsewhere.
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
    """The region of every answer, an index of REGIONS, where `starts` tells of one; anything elsewhere."""
    begin = np.maximum(samples.starts, 0) // window * window
    firsts = np.arange(0, samples.starts.shape[1], window)
    seen = np.array([first - observed(int(first)) for first in firsts])[begin // window]
    return np.where(samples.sources >= begin, 0, np.where(samples.sources >= seen, 1, 2))
