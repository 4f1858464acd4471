"""Means over bins of positions, against loops over single tokens."""

import itertools

import numpy as np
import pytest

from tlinformer_jax.evaluation.report import bin_edges, by_position, by_window_position
from tlinformer_jax.training.evaluation import Evaluation


def sums(length: int) -> Evaluation:
    """Of one to five tokens at each position, but for none at positions 4 and 5."""
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 6, length).astype(float)
    weights[4:6] = 0
    return Evaluation(rng.random(length) * weights, weights)


def mean(result: Evaluation, positions) -> float | None:
    tokens = sum(result.weights[i] for i in positions)
    return sum(result.losses[i] for i in positions) / tokens if tokens else None


def close(found, expected):
    assert [value is None for value in found] == [value is None for value in expected]
    told = [value for value in found if value is not None]
    assert told == pytest.approx([value for value in expected if value is not None], abs=1e-6)


@pytest.mark.parametrize(("length", "bins"), [(1024, 64), (8192, 64), (100, 64), (3, 64), (1, 64), (22, 5)])
def test_bins_cover_every_position_and_are_as_equal_as_they_can_be(length, bins):
    edges = bin_edges(length, bins)
    widths = np.diff(edges)
    assert len(widths) == min(bins, length)
    assert (edges[0], edges[-1]) == (0, length)
    assert widths.min() >= 1
    assert widths.max() - widths.min() <= 1


@pytest.mark.parametrize("bins", [64, 11, 3])
def test_by_position(bins):
    result = sums(22)
    found = by_position(result, bins)
    places = [range(low, high) for low, high in itertools.pairwise(found["edges"])]
    close(found["loss"], [mean(result, place) for place in places])
    assert found["tokens"] == [sum(result.weights[i] for i in place) for place in places]
    weighted = sum((loss or 0) * tokens for loss, tokens in zip(found["loss"], found["tokens"]))
    assert weighted / result.tokens == pytest.approx(result.loss, abs=1e-6)


@pytest.mark.parametrize(("window", "bins"), [(4, 64), (4, 2), (5, 2), (22, 64), (7, 3)])
def test_by_position_in_the_window(window, bins):
    """22 positions: the last window is short for all but 22."""
    result = sums(22)
    found = by_window_position(result, window, bins)
    edges = found["edges"]
    assert (edges[0], edges[-1], len(edges)) == (0, window, min(bins, window) + 1)
    first, later = (
        [
            [i for i in range(22) if low <= i % window < high and (i >= window) == is_later]
            for low, high in itertools.pairwise(edges)
        ]
        for is_later in (False, True)
    )
    close(found["first"], [mean(result, places) for places in first])
    assert found["first_tokens"] == [sum(result.weights[i] for i in places) for places in first]
    if window == 22:
        assert "later" not in found
        return
    close(found["later"], [mean(result, places) for places in later])
    assert found["later_tokens"] == [sum(result.weights[i] for i in places) for places in later]


def test_a_sample_shorter_than_a_window():
    found = by_window_position(Evaluation(np.array([1.0, 4.0, 0.0]), np.array([1.0, 2.0, 0.0])), 8)
    assert found == {"edges": [0, 1, 2, 3], "first": [1.0, 2.0, None], "first_tokens": [1, 2, 0]}
