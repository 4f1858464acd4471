"""Evaluation of a split: loss by position, and the figures made of it."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tlinformer_jax.data.batches import Batch
from tlinformer_jax.data.streams import TokenStream
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
        sums = step(params, put_batch(batch, mesh))
        losses = losses + np.asarray(sums["losses"], np.float64)
        weights = weights + np.asarray(sums["weights"], np.float64)
    return Evaluation(np.asarray(losses), np.asarray(weights))


def summary(result: Evaluation, stream: TokenStream, generation_window: int) -> dict[str, float]:
    """The figures of a split.

    Returns:
      loss (nats per token), perplexity, bits_per_byte (of the text that the evaluated tokens encode, taken as
      the split's mean bytes per token; separators count as tokens and not as bytes), loss_first_window, and
      loss_later_windows where the samples are longer than one window.
    """
    figures = {
        "loss": result.loss,
        "perplexity": math.exp(min(result.loss, 700.0)),
        "bits_per_byte": result.loss / math.log(2) * len(stream.tokens) / stream.num_bytes,
        "loss_first_window": result.mean(0, generation_window),
    }
    if len(result.losses) > generation_window:
        figures["loss_later_windows"] = result.mean(generation_window, len(result.losses))
    return figures
