"""Random numbers that are functions of place: of a key, of the sample and of the draw's number in the sample.

So a sample is the same whichever batch, process or thread makes it, on every platform and with every numpy version,
and whole batches are drawn without a loop over samples. The numbers are SplitMix64's.
"""

import hashlib

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key_of(*names: object) -> int:
    """A 64-bit key for what the names say."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "little")


def draw(key: int, samples: np.ndarray, count: int) -> np.ndarray:
    """`count` random words of each sample, uint64 [samples, count]; `samples` are integers [samples] >= 0."""
    start = _mixed(np.asarray(samples).astype(np.uint64)[:, None] * GOLDEN + np.uint64(key))
    return _mixed(start + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN)


def below(words: np.ndarray, bound: int | np.ndarray) -> np.ndarray:
    """Words as integers 0 .. bound - 1, int64; bound < 2^31, one for all or of a shape that broadcasts."""
    return ((words >> np.uint64(32)) * np.asarray(bound, np.uint64) >> np.uint64(32)).astype(np.int64)


def distinct(words: np.ndarray, bound: int) -> np.ndarray:
    """As many different integers 0 .. bound - 1 of each sample as half its words, in random order.

    Args:
      words: uint64 [samples, 2 * count].
      bound: at least count.

    Returns:
      int64 [samples, count].
    """
    count = words.shape[1] // 2
    chosen = np.empty((len(words), count), np.int64)
    for number in range(count):  # Floyd's way: what was chosen before makes room for the newest number
        newest = bound - count + number
        one = below(words[:, number], newest + 1)
        taken = (chosen[:, :number] == one[:, None]).any(axis=1)
        chosen[:, number] = np.where(taken, newest, one)
    return np.take_along_axis(chosen, np.argsort(words[:, count:], axis=1, kind="stable"), axis=1)


def _mixed(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
