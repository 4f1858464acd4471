"""Evaluation of a split: loss by position, and the figures made of it."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tlinformer_jax.analysis.perplexity import perplexity
from tlinformer_jax.data.batches import Batch
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tasks import Split
from tlinformer_jax.parallel.constraints import EVALUATION_AXES
from tlinformer_jax.parallel.sharding import put_batch
from tlinformer_jax.training.answers import Answers


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sums over a split, by position in the sample.

    Attributes:
      losses: summed cross-entropy in nats, float64 [N].
      weights: number of tokens, float64 [N].
      answers: of a task; else None.
    """

    losses: np.ndarray
    weights: np.ndarray
    answers: Answers | None = None

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return self.mean(0, len(self.losses))

    @property
    def tokens(self) -> int:
        """Tokens that were predicted."""
        return int(self.weights.sum())

    def mean(self, start: int, stop: int) -> float:
        """Mean cross-entropy in nats per token over positions start .. stop - 1; NaN if there are none."""
        weight = self.weights[start:stop].sum()
        return float(self.losses[start:stop].sum() / weight) if weight else math.nan


def evaluate_split(
    step: Callable[[Any, Any], Any], params: Any, batches: Iterator[Batch], mesh: Mesh, chance: float | None = None
) -> Evaluation:
    """Runs the jitted evaluation step over all batches of a split; `chance` is that of a task, else None."""
    totals: dict[str, np.ndarray] = {}
    for batch in batches:
        sums = step(params, put_batch(batch, mesh, EVALUATION_AXES))
        for name, part in sums.items():
            totals[name] = totals.get(name, 0.0) + np.asarray(part, np.float64)
    answers = None if chance is None else Answers.of(totals, chance)
    return Evaluation(totals["losses"], totals["weights"], answers)


def summary(result: Evaluation, stream: Split, generation_window: int) -> dict[str, float]:
    """The figures of a split.

    Returns:
      loss (nats per token), perplexity (per token), perplexity_per_word and perplexity_per_word_with_eol where
      words and lines were counted, bits_per_byte, loss_first_window, and loss_later_windows where the samples are
      longer than one window; `analysis.perplexity` defines the denominators. Of a task: loss (nats per token of the
      answers), and what `Answers.figures` returns.
    """
    if not isinstance(stream, TokenStream):
        assert result.answers is not None
        return {"loss": result.loss, **result.answers.figures()}
    texts = perplexity(float(result.losses.sum()), result.tokens, stream)
    figures = {
        "loss": result.loss,
        "perplexity": texts.per_token,
        "perplexity_per_word": texts.per_word,
        "perplexity_per_word_with_eol": texts.per_word_with_eol,
        "bits_per_byte": texts.bits_per_byte if stream.num_bytes else None,
        "loss_first_window": result.mean(0, generation_window),
    }
    if len(result.losses) > generation_window:
        figures["loss_later_windows"] = result.mean(generation_window, len(result.losses))
    return {name: value for name, value in figures.items() if value is not None}
