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
from tlinformer_jax.parallel.constraints import EVALUATION_AXES
from tlinformer_jax.parallel.sharding import put_batch


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sums over a split, by position in the sample.

    Attributes:
      losses: summed cross-entropy in nats, float64 [N].
      weights: number of tokens, float64 [N].
    """

    losses: np.ndarray
    weights: np.ndarray

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


def evaluate_split(step: Callable[[Any, Any], Any], params: Any, batches: Iterator[Batch], mesh: Mesh) -> Evaluation:
    """Runs the jitted evaluation step over all batches of a split."""
    losses: np.ndarray | float = 0.0
    weights: np.ndarray | float = 0.0
    for batch in batches:
        sums = step(params, put_batch(batch, mesh, EVALUATION_AXES))
        losses = losses + np.asarray(sums["losses"], np.float64)
        weights = weights + np.asarray(sums["weights"], np.float64)
    return Evaluation(np.asarray(losses), np.asarray(weights))


def summary(result: Evaluation, stream: TokenStream, generation_window: int) -> dict[str, float]:
    """The figures of a split.

    Returns:
      loss (nats per token), perplexity (per token), perplexity_per_word and perplexity_per_word_with_eol where
      words and lines were counted, bits_per_byte, loss_first_window, and loss_later_windows where the samples are
      longer than one window; `analysis.perplexity` defines the denominators.
    """
    texts = perplexity(float(result.losses.sum()), result.tokens, stream)
    figures = {
        "loss": result.loss,
        "perplexity": texts.per_token,
        "perplexity_per_word": texts.per_word,
        "perplexity_per_word_with_eol": texts.per_word_with_eol,
        "bits_per_byte": texts.bits_per_byte,
        "loss_first_window": result.mean(0, generation_window),
    }
    if len(result.losses) > generation_window:
        figures["loss_later_windows"] = result.mean(generation_window, len(result.losses))
    return {name: value for name, value in figures.items() if value is not None}
