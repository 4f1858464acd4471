"""State tracking: a sample is a word over a group, and the label of every position is the product up to there.

    g1          g2           g3 ...          random elements of the group
    g1     g2 * g1     g3 * g2 * g1 ...      the labels

"parity" is the group of two elements: whether so far an odd number of ones came. "s5" is that of the 120 permutations
of five things, whose word problem models of constant depth are believed unable to solve at all lengths (TC0 and NC1).

The state after a position depends on all tokens before it: as an answer, its source is the sample's first token.
"""

import dataclasses
import itertools

import numpy as np

from tlinformer_jax.data.tasks import Samples, below, random_bits
from tlinformer_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Group:
    """A group by its permutations of a few things, of which permutation a moves thing i to place a[i]."""

    permutations: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return len(self.permutations)

    def products(self) -> np.ndarray:
        """[a, b] is the number of the permutation that does b, then a; int64 [size, size]."""
        number = {permutation: place for place, permutation in enumerate(self.permutations)}
        rows = [[number[tuple(a[i] for i in b)] for b in self.permutations] for a in self.permutations]
        return np.array(rows)


GROUPS = {
    "parity": Group(((0, 1), (1, 0))),
    "s5": Group(tuple(itertools.permutations(range(5)))),
}


@dataclasses.dataclass(frozen=True)
class StateTracking:
    """The task: of the ids, the first `group.size` are the elements that are read, the next as many the states."""

    key: int  # of the random numbers
    vocabulary: int
    group: Group

    def chance(self, length: int) -> float:
        return 1 / self.group.size

    def check(self, length: int) -> None:
        if self.vocabulary < 2 * self.group.size:
            allowed = f"must have at least {2 * self.group.size} ids: the elements of the group, and the states"
            raise ConfigError("data.tokenizer", f"numbers:{self.vocabulary}", allowed)

    def make(self, numbers: np.ndarray, length: int) -> Samples:
        tokens, products = below(random_bits(self.key, numbers, length + 1), self.group.size), self.group.products()
        states = tokens[:, :-1].copy()
        for place in range(1, length):
            states[:, place] = products[tokens[:, place], states[:, place - 1]]
        ends = np.broadcast_to(np.arange(length), states.shape)
        samples = Samples.of(tokens, ends, np.zeros_like(states))
        return dataclasses.replace(samples, labels=(self.group.size + states).astype(np.int32))
