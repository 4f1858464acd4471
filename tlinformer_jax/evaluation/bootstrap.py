"""Intervals of a mean loss by bootstrap over the documents of a split."""

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike


def mean_interval(losses: ArrayLike, tokens: ArrayLike) -> tuple[int, float, float]:
    """Returns the number of documents that have tokens, and the 95% interval of the mean loss per token.

    Documents are drawn with replacement, each with all its tokens: tokens of one document are alike, so drawing single
    tokens would give too narrow an interval. The same documents give the same interval. It is NaN if fewer than two
    have tokens or if a loss is not known.

    Args:
      losses: [documents], the sum of each document's losses in nats, or the difference of two models' sums; None if
        not known.
      tokens: [documents], the number of each document's tokens.
    """
    from scipy.stats import bootstrap  # its import takes seconds

    counts = np.asarray(tokens, float)
    sums, counts = np.asarray(losses, float)[counts > 0], counts[counts > 0]
    if len(counts) < 2 or not np.isfinite(sums).all():
        return len(counts), np.nan, np.nan
    draws = np.random.default_rng(0)
    interval = bootstrap((sums, counts), _mean, paired=True, method="percentile", rng=draws).confidence_interval
    return len(counts), float(interval.low), float(interval.high)


def _mean(sums: Float[np.ndarray, "..."], counts: Float[np.ndarray, "..."], axis: int) -> Float[np.ndarray, "..."]:
    """Returns the mean over all tokens of the drawn documents, along `axis`."""
    return sums.sum(axis) / counts.sum(axis)
