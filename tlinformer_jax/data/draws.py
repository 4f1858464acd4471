"""Random numbers by SplitMix64, each a function of a key, of the sample's number and of its place in the sample.

So a sample is the same in every batch, process and thread, on every platform and with every numpy version.
"""

import hashlib

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def key_of(*names: object) -> int:
    """A 64-bit key for the names."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:8], "little")


def random_bits(key: int, samples: np.ndarray, count: int) -> np.ndarray:
    """`count` random 64-bit numbers of each sample, uint64 [samples, count]; `samples` are integers [samples] >= 0."""
    start = _mixed(np.asarray(samples).astype(np.uint64)[:, None] * GOLDEN + np.uint64(key))
    return _mixed(start + np.arange(1, count + 1, dtype=np.uint64) * GOLDEN)


def below(bits: np.ndarray, bound: int | np.ndarray) -> np.ndarray:
    """Random bits as integers 0 .. bound - 1, int64; bound < 2^31, one for all or of a shape that broadcasts."""
    return ((bits >> np.uint64(32)) * np.asarray(bound, np.uint64) >> np.uint64(32)).astype(np.int64)


def distinct(bits: np.ndarray, bound: int) -> np.ndarray:
    """Different integers 0 .. bound - 1 in random order, int64 [samples, count], of bits [samples, 2 * count].

    `bound` must be at least `count`.
    """
    count = bits.shape[1] // 2
    chosen = np.empty((len(bits), count), np.int64)
    for number in range(count):  # Floyd's algorithm: a number chosen before is replaced by the newest
        newest = bound - count + number
        one = below(bits[:, number], newest + 1)
        taken = (chosen[:, :number] == one[:, None]).any(axis=1)
        chosen[:, number] = np.where(taken, newest, one)
    return np.take_along_axis(chosen, np.argsort(bits[:, count:], axis=1, kind="stable"), axis=1)


def _mixed(bits: np.ndarray) -> np.ndarray:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
