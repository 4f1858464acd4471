"""Mean losses by position in the sample, and by position in the generation window, over bins of positions."""

from typing import Any

import numpy as np

from tlinformer_jax.training.answers import Answers
from tlinformer_jax.training.evaluation import Evaluation

BINS = 64
DIGITS = 6  # of a mean, after the point: float32 losses know no more


def bin_edges(length: int, bins: int = BINS) -> np.ndarray:
    """Edges of `bins` bins of positions 0 .. length - 1, as equal as whole numbers allow; fewer if there are fewer.

    Returns:
      int64 [bins + 1], rising from 0 to length: bin i holds the positions edges[i] .. edges[i + 1] - 1.
    """
    bins = min(bins, length)
    return np.arange(bins + 1, dtype=np.int64) * length // bins


def by_position(result: Evaluation, bins: int = BINS) -> dict[str, list[Any]]:
    """The loss by position in the sample.

    Returns:
      edges: as `bin_edges` gives them; loss: mean nats per token of each bin, None where it holds no token;
      tokens: of each bin.
    """
    edges = bin_edges(len(result.losses), bins)
    loss, tokens = _means(result.losses, result.weights, edges)
    return {"edges": edges.tolist(), "loss": loss, "tokens": tokens}


def by_window_position(result: Evaluation, window: int, bins: int = BINS) -> dict[str, list[Any]]:
    """The loss by position in a generation window, or in a stretch of as many tokens of a model without windows.

    Returns:
      edges: as `bin_edges` gives them for a window; first and first_tokens: mean nats per token, and tokens, in the
      sample's first window; later and later_tokens: in all its later ones together, where it has any.
    """
    length = len(result.losses)
    edges = bin_edges(min(window, length), bins)
    rows = [np.pad(sums, (0, -length % window)).reshape(-1, window) for sums in (result.losses, result.weights)]
    columns = {"edges": edges.tolist()}
    columns["first"], columns["first_tokens"] = _means(rows[0][0], rows[1][0], edges)
    if length > window:
        columns["later"], columns["later_tokens"] = _means(rows[0][1:].sum(axis=0), rows[1][1:].sum(axis=0), edges)
    return columns


def accuracy_by_position(answers: Answers, bins: int = BINS) -> dict[str, list[int]]:
    """Answers by the position in the sample at which their last token is predicted.

    Returns:
      edges: as `bin_edges` gives them; right, answers: numbers of each bin.
    """
    edges = bin_edges(len(answers.answers), bins)
    right, count = (np.add.reduceat(sums, edges[:-1]) for sums in (answers.right, answers.answers))
    return {"edges": edges.tolist(), "right": [int(sums) for sums in right], "answers": [int(sums) for sums in count]}


def _means(losses: np.ndarray, weights: np.ndarray, edges: np.ndarray) -> tuple[list[float | None], list[int]]:
    """Mean loss and number of tokens of each bin, of sums by position; zero past the edges."""
    total, tokens = (np.add.reduceat(sums, edges[:-1]) for sums in (losses, weights))
    means = [round(float(loss / count), DIGITS) if count else None for loss, count in zip(total, tokens)]
    return means, [int(count) for count in tokens]
