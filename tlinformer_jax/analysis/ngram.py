"""An order-2 token n-gram with Witten-Bell smoothing: the floor that a trained model must beat."""

import numpy as np


def witten_bell_bits(train: np.ndarray, test: np.ndarray, vocab_size: int) -> float:
    """Mean bits per token of `test` under a model of two preceding tokens, fitted on `train`.

    P(c | ab) interpolates the trigram count with P(c | b), that with P(c), and that with the uniform law; each
    level's own weight is n / (n + t) for a context seen n times with t different successors (Witten-Bell).

    Args:
      train: token ids [length], below vocab_size.
      test: token ids [length]; the first two are context only.
      vocab_size: number of ids; at most 2 million, so that three of them fit in a 64-bit key.

    Returns:
      bits per token.
    """
    train, test = train.astype(np.int64), test.astype(np.int64)
    probability = np.full(len(test) - 2, 1.0 / vocab_size)
    for order in range(3):
        seen, asked = _contexts(train, order, vocab_size), _contexts(test, order, vocab_size)[2 - order :]
        follow = train[order:]
        grams, gram_counts = np.unique(seen * vocab_size + follow, return_counts=True)
        heads, totals = np.unique(seen, return_counts=True)
        kinds = np.bincount(np.searchsorted(heads, grams // vocab_size), minlength=len(heads))
        count = _lookup(grams, gram_counts, asked * vocab_size + test[2:])
        total, kind = _lookup(heads, totals, asked), _lookup(heads, kinds, asked)
        known = total > 0
        mixed = (count + kind * probability) / np.maximum(total + kind, 1)
        probability = np.where(known, mixed, probability)
    return float(-np.log2(probability).mean())


def _contexts(tokens: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    """For each token from index `order` on, its `order` predecessors as one number."""
    length = len(tokens) - order
    key = np.zeros(length, np.int64)
    for offset in range(order):
        key = key * vocab_size + tokens[offset : offset + length]
    return key


def _lookup(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """values of `asked` among the sorted `keys`, 0 where absent."""
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, values[place], 0)
