"""Segment copy: random symbols, a mark, then the same symbols once more. The second half are the answers.

    a1 a2 ... aS 0 a1 a2 ... aS        S = N // 2

Each answer stood S + 1 tokens before: where S exceeds both windows, none can be read from them.
"""

import dataclasses

import numpy as np

from tlinformer_jax.data.draws import below, random_bits
from tlinformer_jax.data.tasks import Samples
from tlinformer_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Copying:
    """The task.

    Attributes:
      key: of the random numbers.
      vocabulary: ids: 0 is the mark, the others are symbols.
    """

    key: int
    vocabulary: int

    def chance(self, length: int) -> float:
        return 1 / (self.vocabulary - 1)

    def check(self, length: int) -> None:
        if length < 2 or length % 2:
            raise ConfigError("data.sequence_length", length, "must be even, two halves, for data.dataset = 'copy'")

    def make(self, numbers: np.ndarray, length: int) -> Samples:
        size = length // 2
        symbols = 1 + below(random_bits(self.key, numbers, size), self.vocabulary - 1)
        tokens = np.concatenate([symbols, np.zeros((len(numbers), 1), np.int64), symbols], axis=1)
        answers = np.zeros((len(numbers), length), bool)
        answers[:, size:] = True
        position = np.broadcast_to(np.arange(length, dtype=np.int32), answers.shape)
        return Samples(
            tokens.astype(np.int32), answers, np.where(answers, position, -1), np.where(answers, position - size, -1)
        )
