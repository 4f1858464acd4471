"""N-grams, whose loss a trained model must beat. `python -m tools.ngram_floor` prints it.

Smoothing is interpolated Kneser-Ney with separate discounts for counts of 1, 2, and more (Chen and Goodman, 1998).
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

BYTES = 6  # most tokens of context if tokens are bytes
BYTE_VOCABULARY = 512  # tokens of a vocabulary up to this size count as bytes


@dataclasses.dataclass(frozen=True)
class _Level:
    """The n-grams of one length, of the training tokens and of the tokens to predict."""

    contexts: np.ndarray  # number of each n-gram's context, ascending
    counts: np.ndarray  # how often each n-gram occurs
    preceded: np.ndarray  # how many different tokens occur before each n-gram
    asked: np.ndarray  # number of the n-gram that ends in each token to predict; -1 if it does not occur in training
    asked_contexts: np.ndarray  # likewise, the number of its context


def kneser_ney_bits(train: np.ndarray, test: np.ndarray, vocab_size: int, context: int) -> list[float]:
    """Returns mean bits per token of n-grams with 0, 1, ... `context` tokens of context, fitted on `train`.

    The mean is over all tokens of `test` but the first. A context that training has not seen is shortened.
    """
    bits = []
    lower = np.full(len(test) - 1, 1.0 / vocab_size)
    for level in _levels(train.astype(np.int64), test.astype(np.int64), vocab_size, context):
        # The longest n-grams are weighted by their counts, shorter ones by the number of tokens that precede them.
        bits.append(float(-np.log2(_mixed(level, level.counts, lower)).mean()))
        lower = _mixed(level, level.preceded, lower)
    return bits


def _levels(train: np.ndarray, test: np.ndarray, vocab_size: int, context: int) -> Iterator[_Level]:
    """Yields the n-grams with 0, 1, ... `context` tokens of context.

    An n-gram's number is its rank among the sorted pairs of its context's number and its last token, so that numbers of
    any length fit into 64 bits.
    """
    ends, test_ends = np.zeros(len(train) + 1, np.int64), np.zeros(len(test) + 1, np.int64)
    level = None
    for size in range(context + 2):
        # Both arrays hold numbers of n-grams of `size` tokens; token i + size (in `test`: i) follows the one at i.
        pairs = ends[:-1] * vocab_size + train[size:]
        # Computes the same as np.unique, several times faster.
        order = np.argsort(pairs)
        ordered = pairs[order]
        starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        keys, counts = ordered[starts], np.diff(starts, append=len(pairs))
        numbers = np.empty_like(order)
        numbers[order] = np.repeat(np.arange(len(keys)), counts)
        if level is not None:
            suffixes = ends[1:][order[starts]]
            yield dataclasses.replace(level, preceded=np.bincount(suffixes, minlength=len(level.counts)))
        asked = test_ends[:-1] * vocab_size + test
        index = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
        found = np.where((test_ends[:-1] >= 0) & (keys[index] == asked), index, -1)
        level = _Level(keys // vocab_size, counts, counts, found[1:], test_ends[1:-1])
        ends, test_ends = numbers, np.append(-1, found)


def _mixed(level: _Level, counts: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Returns the probabilities of the tokens to predict; `lower` are those with one token less of context."""
    taken = _discounts(counts)[np.minimum(counts, 3)]
    total, left = np.bincount(level.contexts, counts), np.bincount(level.contexts, taken)
    contexts = np.where(level.asked_contexts < len(total), level.asked_contexts, -1)
    known = (contexts >= 0) & (total[contexts] > 0)
    own = np.where(level.asked >= 0, (counts - taken)[level.asked], 0.0)
    return np.where(known, (own + left[contexts] * lower) / np.maximum(total[contexts], 1), lower)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Returns the discounts for counts of 0, 1, 2, and 3 or more; half if they cannot be estimated."""
    seen = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(np.float64)
    if not seen.all():
        return np.array([0.0, 0.5, 0.5, 0.5])
    times = np.arange(1, 4)
    taken = times - (times + 1) * seen[0] / (seen[0] + 2 * seen[1]) * seen[1:] / seen[:-1]
    return np.append(0.0, np.clip(taken, 0.01, times - 0.01))


def byte_floor(train: np.ndarray, test: np.ndarray, vocab_size: int) -> tuple[float, int]:
    """Returns bits per token of the best model with 1 to BYTES tokens of context, and its number of tokens."""
    bits = kneser_ney_bits(train, test, vocab_size, BYTES)[1:]
    return min((value, size) for size, value in enumerate(bits, 1))


def by_columns(tokens: np.ndarray, width: int) -> np.ndarray:
    """Reorders square images so that the pixels of a column are adjacent, keeping the first token in front."""
    images = tokens[1 : 1 + (len(tokens) - 1) // width**2 * width**2].reshape(-1, width, width)
    return np.append(tokens[:1], images.swapaxes(1, 2))
