"""Makes batches: computes which samples of a token stream form update `step`.

Sample i is tokens[i·N : i·N + N + 1]: N inputs and, shifted by one, N labels; the remainder is dropped. Every epoch
visits every sample once, in an order drawn from (seed, epoch). A batch is a pure function of the update's number, so a
resumed run needs only that number. A process that computes only some rows of a batch reads only these rows.

A split may also be a task with generated samples (`data.tasks`), or documents packed into samples (`data.documents`).
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike

from tlinformer_jax.config.data import Stage, stage_at
from tlinformer_jax.data.documents import DocumentStream
from tlinformer_jax.data.streams import RowStream, TokenStream, in_order, in_threads
from tlinformer_jax.data.tasks import Split, TaskSplit, take_task_samples
from tlinformer_jax.errors import DataError

Batch = dict[str, np.ndarray]
Rows = np.ndarray | slice  # rows of a batch that one process reads
Reader = Generator[Batch, None, None]
ALL = slice(None)
AHEAD = 4  # batches that threads keep ready
LAG = 4  # updates between the announcement of a stage's end and the end


def num_samples(stream: Split, sequence_length: int, rest: bool = False) -> int:
    """Returns the number of samples of `sequence_length` + 1 tokens, which overlap by one.

    With `rest`, a shorter last sample counts too. A task has the same number of samples at every length.
    """
    if isinstance(stream, TaskSplit):
        return stream.count
    if isinstance(stream, DocumentStream):
        return stream.packing(sequence_length).count
    labels = max(0, len(stream.tokens) - 1)
    return -(-labels // sequence_length) if rest else labels // sequence_length


def check_holds_a_sample(stream: Split, sequence_length: int, name: str, rest: bool = False) -> None:
    """Checks that a split has at least one sample, or with `rest` two tokens; raises a DataError if not."""
    if not isinstance(stream, TaskSplit) and num_samples(stream, sequence_length, rest) < 1:
        least = "two tokens" if isinstance(stream, DocumentStream) else "one sample of sequence_length + 1"
        held = f"the {name} has only {len(stream.tokens)} tokens; it must hold at least {least}"
        raise DataError(f"data.sequence_length = {sequence_length}: {held}")


def take_samples(stream: Split, sequence_length: int, indices: np.ndarray) -> Batch:
    """Returns {inputs, labels: int32 [batch, N], weights: float32 [batch, N]} of the samples `indices`.

    A negative index gives a row of padding, token 0 with weight 0; positions after the stream's end are padding too. A
    task's weights are 1 at answers, else 0. Packed documents add {documents: int32 [batch, N]}, see `Packing.take`.
    """
    if isinstance(stream, TaskSplit):
        return take_task_samples(stream, sequence_length, indices)[0]
    if isinstance(stream, DocumentStream):
        return stream.packing(sequence_length).take(stream.tokens, indices)
    if isinstance(stream, RowStream):
        real = (indices >= 0)[:, None]
        return {name: np.where(real, array[indices], 0).astype(array.dtype) for name, array in stream.rows.items()}
    rows = np.zeros((len(indices), sequence_length + 1), np.int32)
    weights = np.zeros((len(indices), sequence_length), np.float32)
    for row, weight, index in zip(rows, weights, indices, strict=True):
        if index >= 0:
            tokens = stream.tokens[index * sequence_length : (index + 1) * sequence_length + 1]
            row[: len(tokens)] = tokens
            weight[: len(tokens) - 1] = 1
    return {"inputs": rows[:, :-1], "labels": rows[:, 1:], "weights": weights}


def epoch_permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order in which epoch `epoch` visits `count` samples, int64 [count]; read-only.

    Uses raw bits, which numpy promises to keep between versions, unlike `Generator.permutation`.
    """
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(count)
    order = np.argsort(raw, kind="stable")
    order.flags.writeable = False  # batches share it
    return order


@dataclasses.dataclass(frozen=True)
class TrainingBatches:
    """The endless stream of training batches.

    Attributes:
      stream: the split.
      sequence_length: N.
      batch_size: sequences per update, over all processes.
      seed: of the order.
      equal_updates: if True, epochs follow each other without a gap, so every update is full. If False, as in the
        paper, an epoch's last update has only its remaining samples, and `paper_gradient_weights` weighs its rows.
      micro_batch: rows of a micro-batch, which divides the batch; only used if `equal_updates` is False.
      stages: the first updates, on shorter samples; a row of a batch has as many of these as have N tokens together.
    """

    stream: Split
    sequence_length: int
    batch_size: int
    seed: int
    equal_updates: bool = True
    micro_batch: int = 1
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        check_holds_a_sample(self.stream, self.sequence_length, "training split")

    @property
    def samples_per_epoch(self) -> int:
        return num_samples(self.stream, self.sequence_length)

    def updates_for_epochs(self, epochs: int) -> int:
        """Returns the number of updates after which every sample has been seen `epochs` times."""
        if not self.equal_updates:
            return epochs * -(-self.samples_per_epoch // self.batch_size)
        updates, samples = 0, epochs * self.samples_per_epoch
        for stage in self.stages:
            size = self.batch_size * (self.sequence_length // stage.length)
            here = min(stage.updates, -(-samples // size))
            updates, samples = updates + here, samples - here * size
        return updates + max(0, -(-samples // self.batch_size))

    def stage(self, step: int) -> int:
        """Returns the index of the stage of update `step`; the number of stages after the last."""
        return self._stage(step)[0]

    def length(self, step: int) -> int:
        """Returns the tokens per sample of update `step`."""
        number = self.stage(step)
        return self.stages[number].length if number < len(self.stages) else self.sequence_length

    def _stage(self, step: int) -> tuple[int, int]:
        return stage_at(self.stages, self.sequence_length, self.batch_size, step)

    def indices(self, step: int) -> np.ndarray:
        """Returns sample numbers of update `step` (from 0), int64 [batch_size * samples per row]; -1 for padding."""
        count = self.samples_per_epoch
        # Positions in the concatenation of all epochs; the paper's epochs are padded to whole updates.
        length = count if self.equal_updates else self.updates_for_epochs(1) * self.batch_size
        _, first = self._stage(step)
        rows = self.batch_size * (self.sequence_length // self.length(step))
        positions = first + np.arange(rows, dtype=np.int64)
        epochs, offsets = np.divmod(positions, length)
        chosen = np.full_like(positions, -1)
        for epoch in np.unique(epochs):
            here = (epochs == epoch) & (offsets < count)
            chosen[here] = self._order(int(epoch))[offsets[here]]
        return chosen

    @functools.cached_property
    def _order(self) -> Callable[[int], np.ndarray]:
        """Returns an epoch's order. Every stream of batches keeps its own last two: sorting an epoch takes long."""
        return functools.lru_cache(maxsize=2)(functools.partial(epoch_permutation, self.samples_per_epoch, self.seed))

    def batch(self, step: int, rows: Rows = ALL) -> Batch:
        """Returns the given rows of update `step`, in their order, each with all its samples."""
        indices = self.indices(step)
        chosen = indices.reshape(self.batch_size, -1)[rows].reshape(-1)
        batch = take_samples(self.stream, self.length(step), chosen)
        if not self.equal_updates:
            weights = paper_gradient_weights(int((indices >= 0).sum()), self.batch_size, self.micro_batch)
            batch["weights"] *= weights[rows, None]
        return batch

    def prefetched(self, start_step: int, rows: Rows = ALL) -> Reader:
        """Yields the batches, or rows of them, from update `start_step` on; closing the generator ends its threads."""
        return in_threads(lambda step: self.batch(step, rows), itertools.count(start_step), threads=2, ahead=AHEAD)


# ---- Stages that end by accuracy


def stages_ended(stages: tuple[Stage, ...], ends: np.ndarray) -> tuple[Stage, ...]:
    """Returns the stages with their actual numbers of updates, as far as decided.

    `ends`, int32 [stages], is the update of the run after which each stage ends; 0 while undecided.
    """
    found, begin = [], 0
    for stage, end in zip(stages, ends.tolist(), strict=True):
        updates = min(stage.updates, end - begin) if end else stage.updates
        found.append(stage._replace(updates=updates))
        begin += updates
    return tuple(found)


class StagedReader:
    """A reader of training batches that reads ahead, and restarts when a stage's end is announced. A context manager.

    The train step announces an end LAG updates ahead, so the host reads metrics already computed, and no device waits.

    Args:
      batches: of the run, with the configured stages.
      ends: update after which each stage ended, 0 while it runs, see `stages_ended`; None if none ends by accuracy.
      step: updates before the first batch.
      rows: rows of each batch that this process reads.

    Attributes:
      batches: with the stages as known now.
    """

    def __init__(self, batches: TrainingBatches, ends: ArrayLike | None, step: int, rows: Rows) -> None:
        self._configured, self._step, self._rows = batches, step, rows
        self._announced: collections.deque[ArrayLike] = collections.deque()
        self._read(batches.stages if ends is None else stages_ended(batches.stages, np.asarray(ends)))

    def _read(self, stages: tuple[Stage, ...]) -> None:
        changed = stages != self._configured.stages  # a copy of batches from an iterable would read its first item
        self.batches = dataclasses.replace(self._configured, stages=stages) if changed else self._configured
        self._reader = self.batches.prefetched(self._step, self._rows)

    def __next__(self) -> Batch:
        self._step += 1
        return next(self._reader)

    def after(self, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of the update just dispatched."""
        if "stage_ends" in metrics:
            self._announced.append(metrics["stage_ends"])
        if len(self._announced) > LAG:
            stages = stages_ended(self._configured.stages, np.asarray(self._announced.popleft()))
            if stages != self.batches.stages:
                self._reader.close()
                self._read(stages)

    def ended(self) -> Stage | None:
        """Returns the stage that ends with the last batch read, with its actual updates; None if none ends there."""
        begin = 0
        for stage in self.batches.stages:
            begin += stage.updates
            if begin == self._step:
                return stage
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()


# ---- Paper's updates, and evaluation


def paper_gradient_weights(real_samples: int, batch_size: int, micro_batch: int) -> np.ndarray:
    """Returns the weight of each row of an update in the paper's gradient, float32 [batch_size].

    The paper sums the mean gradients of its micro-batches and divides by `batch_size` / `micro_batch`, even at an
    epoch's end, where fewer micro-batches remain and the rows of a short last one count more. The first `real_samples`
    rows are not padding. The gradient is that of the mean over all rows of (weight x the row's mean loss).
    """
    weights = np.zeros(batch_size, np.float32)
    short = real_samples % micro_batch
    weights[:real_samples] = 1.0
    if short:
        weights[real_samples - short : real_samples] = micro_batch / short
    return weights


def evaluation_batches(
    stream: TokenStream, sequence_length: int, batch_size: int, rows: Rows = ALL, rest: bool = False
) -> Iterator[Batch]:
    """Yields the given rows of every batch of a split, each sample once, in order; the last batch is padded.

    With `rest`, the tokens after the last whole sample follow, padded: every token but the first is predicted once.
    """
    check_holds_a_sample(stream, sequence_length, "split", rest)
    count = num_samples(stream, sequence_length, rest)
    for indices in in_order(count, batch_size, rows):
        yield take_samples(stream, sequence_length, indices)
