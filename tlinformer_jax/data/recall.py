"""Multi-query associative recall: pairs of a key and a value, then every key again; its value is the answer.

    k1 v1 k2 v2 ... kP vP | filler and, in between, each key once more with its value

Keys are different ids of the vocabulary's lower half, values any of the upper half. The gap before a question is drawn
by a power law that favours small gaps, as in the protocol's original code (Zoology's, exponent 0.01). The filler is
random values. Shorter samples, those of a curriculum, hold fewer pairs in proportion.
"""

import dataclasses

import numpy as np

from tlinformer_jax.data.draws import below, distinct, random_bits
from tlinformer_jax.data.tasks import Samples
from tlinformer_jax.errors import ConfigError

POWER = 0.01


@dataclasses.dataclass(frozen=True)
class Recall:
    """The task.

    Attributes:
      key: of the random numbers.
      vocabulary: ids; 0 is not used.
      pairs: P of a sample of `full_length` tokens or more.
      full_length: N of the configuration.
    """

    key: int
    vocabulary: int
    pairs: int
    full_length: int

    def __post_init__(self) -> None:
        if self.vocabulary // 2 - 1 < self.pairs:
            allowed = f"must be at most {self.vocabulary // 2 - 1}, the keys of the vocabulary"
            raise ConfigError("data.num_items", self.pairs, allowed)

    def chance(self, length: int) -> float:
        return chance_by_elimination(pairs_of(length, self.pairs, self.full_length))

    def check(self, length: int) -> None:
        pairs = pairs_of(length, self.pairs, self.full_length)
        if length < 4 * pairs:
            raise ConfigError("data.sequence_length", length, f"must be at least {4 * pairs}, 4 for each of its pairs")

    def make(self, numbers: np.ndarray, length: int) -> Samples:
        pairs = pairs_of(length, self.pairs, self.full_length)
        half, rows = self.vocabulary // 2, np.arange(len(numbers))[:, None]
        slots = (length - 2 * pairs) // 2
        bits = random_bits(self.key, numbers, 3 * pairs + slots + length + 1)
        of_keys, of_values, of_slots, filler = np.split(bits, np.cumsum([2 * pairs, pairs, slots]), axis=1)
        keys = 1 + distinct(of_keys, half - 1)
        values = half + below(of_values, self.vocabulary - half)
        tokens = half + below(filler, self.vocabulary - half)
        tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
        asked = 2 * pairs + 2 * _weighted_slots(of_slots, pairs)
        tokens[rows, asked], tokens[rows, asked + 1] = keys, values
        answers = np.zeros((len(numbers), length), bool)
        starts, sources = (np.full((len(numbers), length), -1, np.int32) for _ in range(2))
        answers[rows, asked] = True
        starts[rows, asked] = asked
        sources[rows, asked] = 1 + 2 * np.arange(pairs)
        return Samples(tokens.astype(np.int32), answers, starts, sources)


def chance_by_elimination(pairs: int) -> float:
    """The accuracy of guessing among the values not yet used, H_P / P: each key is asked for once."""
    return sum(1 / left for left in range(1, pairs + 1)) / pairs


def pairs_of(length: int, pairs: int, full_length: int) -> int:
    """The pairs of a sample of `length` tokens, where one of `full_length` has `pairs`."""
    return max(1, pairs * min(length, full_length) // full_length)


def _weighted_slots(bits: np.ndarray, count: int) -> np.ndarray:
    """`count` slots of each row, int64 [rows, count], drawn without replacement with weights (slot + 1)^(POWER - 1).

    The slots with the smallest exponential waiting times are such a draw.
    """
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    waiting = -np.log(uniform) * np.arange(1, bits.shape[1] + 1) ** (1 - POWER)
    return np.argsort(waiting, axis=1, kind="stable")[:, :count]
