"""Batches: which samples of a token stream make update `step`, as plain index arithmetic.

Sample i of a stream is tokens[i·N : i·N + N + 1]: N inputs and, shifted by one, N labels; the remainder is
dropped. Every epoch visits every sample once, in an order drawn from (seed, epoch). A batch is a pure function
of the update's number, so the iterator's whole state is that number, and any split of the batch over
processes reads the same global stream.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.errors import DataError

Batch = dict[str, np.ndarray]


def num_samples(stream: TokenStream, sequence_length: int) -> int:
    """Number of samples of `sequence_length` + 1 tokens that overlap by one."""
    return max(0, (len(stream.tokens) - 1) // sequence_length)


def take_samples(stream: TokenStream, sequence_length: int, indices: np.ndarray) -> Batch:
    """Returns {inputs, labels: int32 [batch, N], weights: float32 [batch, N]} of the samples `indices`.

    A negative index makes a row of padding: token 0 with weight 0.
    """
    rows = np.zeros((len(indices), sequence_length + 1), np.int32)
    for row, index in zip(rows, indices, strict=True):
        if index >= 0:
            row[:] = stream.tokens[index * sequence_length : (index + 1) * sequence_length + 1]
    weights = np.repeat((indices >= 0)[:, None], sequence_length, axis=1).astype(np.float32)
    return {"inputs": rows[:, :-1], "labels": rows[:, 1:], "weights": weights}


@functools.lru_cache(maxsize=2)
def epoch_permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which epoch `epoch` visits `count` samples; the same on every host and platform."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch]))).permutation(count)


@dataclasses.dataclass(frozen=True)
class TrainingBatches:
    """The endless stream of training batches; epochs follow each other without a gap.

    Attributes:
      stream: tokens of the split.
      sequence_length: N.
      batch_size: sequences an update, all processes together.
      seed: of the order.
    """

    stream: TokenStream
    sequence_length: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.samples_per_epoch < 1:
            raise DataError(
                f"data.sequence_length = {self.sequence_length}: the training split has only "
                f"{len(self.stream.tokens)} tokens; it must hold at least one sample of sequence_length + 1"
            )

    @property
    def samples_per_epoch(self) -> int:
        return num_samples(self.stream, self.sequence_length)

    def indices(self, step: int) -> np.ndarray:
        """Sample numbers of update `step` (from 0), int64 [batch_size]."""
        count = self.samples_per_epoch
        positions = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)
        epochs, offsets = np.divmod(positions, count)
        chosen = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = epoch_permutation(count, self.seed, int(epoch))[offsets[here]]
        return chosen

    def batch(self, step: int, process: int = 0, num_processes: int = 1) -> Batch:
        """The rows of update `step` that process `process` of `num_processes` holds, in global order."""
        share = self.batch_size // num_processes
        mine = self.indices(step)[process * share : (process + 1) * share]
        return take_samples(self.stream, self.sequence_length, mine)


def evaluation_batches(
    stream: TokenStream, sequence_length: int, batch_size: int, process: int = 0, num_processes: int = 1
) -> Iterator[Batch]:
    """Yields every sample of a split once, in order; the last batch is filled with rows of weight 0.

    Raises:
      DataError: if the split is shorter than one sample.
    """
    count = num_samples(stream, sequence_length)
    if count < 1:
        raise DataError(
            f"data.sequence_length = {sequence_length}: the split has only {len(stream.tokens)} tokens; "
            "it must hold at least one sample of sequence_length + 1"
        )
    share = batch_size // num_processes
    for start in range(0, count, batch_size):
        indices = np.arange(start, start + batch_size)
        indices[indices >= count] = -1
        yield take_samples(stream, sequence_length, indices[process * share : (process + 1) * share])
