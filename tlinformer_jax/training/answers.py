"""How many answers of a task are right: sums on the device, and the figures made of them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.data.tasks import DEPTHS, REGIONS, AnswerPlaces

CELLS = len(REGIONS) * DEPTHS

# Where the labels of a sample of so many tokens count; None for everywhere.
AnswersOf = Callable[[int], AnswerPlaces | None]


def weighted_places(weights: jax.Array, most: int) -> jax.Array | None:
    """Where a sample's labels count: the head reads these alone, as it would be most of a small model's work.

    Args:
      weights: float32 [batch, length].
      most: labels of a sample whose weight is not 0, at most.

    Returns:
      int32 [batch, most], all places of positive weight and any others; None if there are no more places than these.
    """
    return jax.lax.top_k(weights, most)[1] if most < weights.shape[1] else None


def at_places(array: jax.Array, places: jax.Array) -> jax.Array:
    """[batch, most, ...] of [batch, length, ...]."""
    return jnp.take_along_axis(array, places.reshape(*places.shape, *(1,) * (array.ndim - 2)), axis=1)


def put_back(array: jax.Array, places: jax.Array, length: int, rest: Any) -> jax.Array:
    """The inverse of `at_places`, [batch, length] of [batch, most], with `rest` elsewhere."""
    rows = jnp.arange(array.shape[0])[:, None]
    return jnp.full((array.shape[0], length), rest, array.dtype).at[rows, places].set(array)


def answer_sums(hits: jax.Array, starts: jax.Array, cells: jax.Array) -> dict[str, jax.Array]:
    """Right and all answers of a batch, by where they are asked and by where their sources lie.

    An answer is right if each of its tokens is the one that greedy decoding chooses after those before it, which is to
    say that greedy decoding writes the whole answer.

    Args:
      hits: whether the token after each position is chosen, bool [batch, N].
      starts: see `data.tasks.Samples`, int32 [batch, N].
      cells: see `data.tasks.answer_batches`, int32 [batch, N].

    Returns:
      right and answers, by the position of the answer's last token, float32 [N]; right_cells and answer_cells,
      float32 [CELLS].
    """
    misses = jnp.cumsum(~hits, axis=1, dtype=jnp.int32)
    before = jnp.pad(misses, ((0, 0), (1, 0)))
    ended = starts >= 0
    wrong = misses - jnp.take_along_axis(before, jnp.maximum(starts, 0), axis=1)
    counts = {"answer": ended, "right": ended & (wrong == 0)}
    by_cell = {
        name: jnp.zeros(CELLS, jnp.float32).at[cells].add(jnp.where(count, 1.0, 0.0), mode="drop")
        for name, count in counts.items()
    }
    sums = {name: jnp.sum(count, axis=0, dtype=jnp.float32) for name, count in counts.items()}
    return {
        "right": sums["right"],
        "answers": sums["answer"],
        "right_cells": by_cell["right"],
        "answer_cells": by_cell["answer"],
    }


@dataclasses.dataclass(frozen=True)
class Answers:
    """Sums over a split; float64.

    Attributes:
      right: answers that are right, by the position of the last token, [N].
      answers: all of them.
      right_cells: those that are right, by region and depth of their sources, [regions, DEPTHS].
      answer_cells: all of them.
      chance: see `data.tasks.Task`.
    """

    right: np.ndarray
    answers: np.ndarray
    right_cells: np.ndarray
    answer_cells: np.ndarray
    chance: float

    @classmethod
    def of(cls, sums: dict[str, np.ndarray], chance: float) -> "Answers":
        """From the summed `answer_sums`."""
        shape = (len(REGIONS), DEPTHS)
        right, count = (sums[name].reshape(shape) for name in ("right_cells", "answer_cells"))
        return cls(sums["right"], sums["answers"], right, count, chance)

    def figures(self) -> dict[str, float]:
        """accuracy, the share of answers that are right; accuracy_REGION where there are answers; chance."""
        figures = {"accuracy": _share(self.right.sum(), self.answers.sum())}
        for region, right, count in zip(REGIONS, self.right_cells.sum(axis=1), self.answer_cells.sum(axis=1)):
            if count:
                figures[f"accuracy_{region}"] = _share(right, count)
        return figures | {"chance": self.chance}

    def counts(self) -> dict[str, Any]:
        """Right and all answers of each region by depth, as JSON: REGION -> {right, answers}, integers [DEPTHS]."""
        return {
            region: {"right": _integers(right), "answers": _integers(count)}
            for region, right, count in zip(REGIONS, self.right_cells, self.answer_cells)
        }


def _share(right: float, count: float) -> float:
    return float(right / count) if count else math.nan


def _integers(values: np.ndarray) -> list[int]:
    return [int(value) for value in values]
