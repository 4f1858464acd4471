"""Stages of a curriculum that end by competence: as soon as training answers well enough.

The train step records the accuracy of each update and announces the end of a stage LAG updates ahead, so that the host
reads figures that are already computed and the device never waits. Accuracies and announced ends are part of the train
state: a resumed run changes stage at the same update.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.config.data import Stage
from tlinformer_jax.data.batches import Batch, Rows, TrainingBatches

WINDOW = 20  # updates whose mean accuracy decides
LAG = 4  # updates that are still made on the old samples after those


@flax.struct.dataclass
class Competence:
    """What decides when stages end.

    Attributes:
      recent: share of the answers' tokens that were right, in the last updates of each stage, float32 [stages, WINDOW],
        the latest last; -inf before the first.
      ends: update of the run after which each stage ends, int32 [stages]; 0 while undecided.
    """

    recent: jax.Array
    ends: jax.Array


def initial_competence(stages: tuple[Stage, ...]) -> Competence | None:
    """The state before the first update; None if no stage ends by competence."""
    if not any(stage.accuracy for stage in stages):
        return None
    return Competence(jnp.full((len(stages), WINDOW), -jnp.inf, jnp.float32), jnp.zeros(len(stages), jnp.int32))


def stage_with_goal(stages: tuple[Stage, ...], length: int) -> int | None:
    """The number of the stage on samples of `length` tokens, if it ends by competence."""
    return next((number for number, stage in enumerate(stages) if stage.length == length and stage.accuracy), None)


def record_accuracy(
    competence: Competence, number: int, goal: float, accuracy: jax.Array, step: jax.Array
) -> Competence:
    """The state after an update of stage `number`, which ends at a mean accuracy of `goal` over WINDOW updates.

    `accuracy` is the update's, float32 []; `step` counts the updates before it, int32 [].
    """
    recent = jnp.append(competence.recent[number, 1:], accuracy)
    reached = (competence.ends[number] == 0) & (jnp.mean(recent) >= goal)
    ends = competence.ends.at[number].set(jnp.where(reached, step + 1 + LAG, competence.ends[number]))
    return Competence(competence.recent.at[number].set(recent), ends)


def stages_ended(stages: tuple[Stage, ...], ends: np.ndarray) -> tuple[Stage, ...]:
    """The stages with the updates that they take, as far as decided; `ends` as in `Competence`."""
    found, begin = [], 0
    for stage, end in zip(stages, ends.tolist(), strict=True):
        updates = min(stage.updates, end - begin) if end else stage.updates
        found.append(stage._replace(updates=updates))
        begin += updates
    return tuple(found)


def describe_end(stage: Stage, step: int, competence: Competence | None) -> str:
    """Which stage of the curriculum ended after update `step`, and why."""
    text = f"step {step}: the stage on samples of {stage.length} tokens ends after {stage.updates:,} updates"
    if not stage.accuracy or competence is None:
        return f"{text}, as configured"
    if step in competence.ends.tolist():
        return f"{text}: training accuracy has reached {stage.accuracy:g} over {WINDOW} updates, {LAG} updates ago"
    return f"{text}, the most that it may take"


def batches_from(batches: TrainingBatches, competence: Competence | None) -> TrainingBatches:
    """`batches` with the lengths of the stages that the state of the run has decided."""
    if competence is None:
        return batches
    return dataclasses.replace(batches, stages=stages_ended(batches.stages, np.asarray(competence.ends)))


class StagedReader:
    """Reads training batches ahead, and starts again where the end of a stage is announced. A context manager.

    Args:
      batches: of the run, with the stages of its configuration.
      competence: of the state that the run goes on from.
      step: updates before the first batch.
      rows: of each batch that this process holds.

    Attributes:
      batches: with the stages as they are known now.
    """

    def __init__(self, batches: TrainingBatches, competence: Competence | None, step: int, rows: Rows) -> None:
        self._configured, self._step, self._rows = batches, step, rows
        self.batches = batches_from(batches, competence)
        self._announced: collections.deque[jax.Array] = collections.deque()
        self._reader = self.batches.prefetched(step, rows)

    def __next__(self) -> Batch:
        self._step += 1
        return next(self._reader)

    def after(self, metrics: Mapping[str, Any]) -> bool:
        """Takes the metrics of the update just dispatched; returns whether the stages have changed."""
        if "stage_ends" not in metrics:
            return False
        self._announced.append(metrics["stage_ends"])
        if len(self._announced) <= LAG:
            return False
        stages = stages_ended(self._configured.stages, np.asarray(self._announced.popleft()))
        if stages == self.batches.stages:
            return False
        self._reader.close()
        self.batches = dataclasses.replace(self.batches, stages=stages)
        self._reader = self.batches.prefetched(self._step, self._rows)
        return True

    def ended(self) -> Stage | None:
        """The stage that ends with the last batch read, with the updates that it took; None if none does."""
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
