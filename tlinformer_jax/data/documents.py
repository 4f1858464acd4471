"""The documents of a split, and `data.document_masking`: samples packed from documents that do not see each other.

A document starts with the preceding end-of-text, and predicts all of its own tokens and the end-of-text after it: as in
one long row, every token but the first is predicted once. A document of more than N tokens is cut into pieces of N and
a shorter last piece, which count as separate documents. The pieces are packed by best fit: from the longest to the
shortest, each goes into the fullest sample that has room for it. The remaining room is padding of weight 0.

Which pieces share a sample depends only on the tokens and N. The order of samples is drawn as for any other text.
"""

import bisect
import collections
import dataclasses
from typing import Any

import numpy as np

from tlinformer_jax.data.streams import TokenStream, positions_of

MOST_DOCUMENTS = 200  # of a split whose losses are summed by document


def document_numbers(stream: TokenStream, end_of_text: int) -> np.ndarray | None:
    """Returns the number of each token's document, uint8 [length]; an end-of-text belongs to the document before it.

    Returns None if the split has one document or more than MOST_DOCUMENTS, or if it is not known where they end: the
    row must hold one end-of-text for each of `num_documents`, the last one at its end.
    """
    if not 2 <= stream.num_documents <= MOST_DOCUMENTS:
        return None
    ends = positions_of(end_of_text, stream.tokens)
    if len(ends) != stream.num_documents or ends[-1] + 1 != len(stream.tokens):
        return None
    return np.repeat(np.arange(len(ends), dtype=np.uint8), np.diff(ends, prepend=-1))


@dataclasses.dataclass(frozen=True)
class Packing:
    """Pieces of documents in samples of `length` tokens.

    Attributes:
      starts, sizes: first input in the stream, and number of inputs, of each piece, int64 [pieces], sample by sample.
      firsts: the first piece of each sample, then the number of pieces, int64 [samples + 1].
    """

    length: int
    starts: np.ndarray
    sizes: np.ndarray
    firsts: np.ndarray

    @classmethod
    def of(cls, starts: np.ndarray, sizes: np.ndarray, length: int) -> "Packing":
        """Packs pieces in any order, none longer than `length`."""
        samples = best_fit(sizes, length)
        order = np.argsort(samples, kind="stable")
        firsts = np.searchsorted(samples[order], np.arange(samples.max(initial=-1) + 2))
        return cls(length, starts[order], sizes[order], firsts)

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.firsts) - 1

    @property
    def padding(self) -> float:
        """The fraction of all positions that is padding."""
        return 1 - float(self.sizes.sum()) / (self.count * self.length)

    def take(self, tokens: np.ndarray, samples: np.ndarray) -> dict[str, np.ndarray]:
        """Returns {inputs, labels, documents: int32 [batch, N], weights: float32 [batch, N]} of samples.

        `documents` numbers a sample's documents from 0, with its padding as the last. A sample < 0 is all padding.
        """
        shape = len(samples), self.length
        batch = {name: np.zeros(shape, np.int32) for name in ("inputs", "labels", "documents")}
        batch["weights"] = np.zeros(shape, np.float32)
        for row, sample in enumerate(samples):
            if sample < 0:
                continue
            filled = 0
            for piece in range(self.firsts[sample], self.firsts[sample + 1]):
                start, size = self.starts[piece], self.sizes[piece]
                here = row, slice(filled, filled + size)
                batch["inputs"][here] = tokens[start : start + size]
                batch["labels"][here] = tokens[start + 1 : start + size + 1]
                batch["weights"][here] = 1
                filled += size
                batch["documents"][row, filled:] += 1
        return batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentStream(TokenStream):
    """A split whose documents are packed into samples."""

    end_of_text: int
    _packings: dict[int, Packing] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, stream: TokenStream, end_of_text: int) -> "DocumentStream":
        """Makes a packed split from documents that `end_of_text` separates."""
        return cls(**vars(stream), end_of_text=end_of_text)

    def packing(self, length: int) -> Packing:
        """Returns the packing into samples of `length` tokens, which is made once."""
        if length not in self._packings:
            self._packings[length] = Packing.of(*self._pieces(length), length)
        return self._packings[length]

    def _pieces(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns first inputs and sizes of the documents; those longer than `length` are cut."""
        inputs = max(0, len(self.tokens) - 1)  # the last token is only a label
        begins = np.unique(np.append(0, positions_of(self.end_of_text, self.tokens)))
        begins = begins[begins < inputs]
        sizes = np.diff(begins, append=inputs)
        counts = -(-sizes // length)
        numbers = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(begins, counts) + numbers * length
        return starts, np.minimum(np.repeat(sizes, counts) - numbers * length, length)


def best_fit(sizes: np.ndarray, length: int) -> np.ndarray:
    """Returns the sample of each piece, int64 [pieces]; samples have `length` tokens."""
    samples, whole = np.empty(len(sizes), np.int64), sizes == length
    count = int(whole.sum())
    samples[whole] = np.arange(count)
    open_samples: dict[int, list[int]] = collections.defaultdict(list)  # free tokens -> samples
    rooms: list[int] = []  # free tokens for which there is a sample, ascending
    order: Any = np.argsort(-sizes, kind="stable")[count:]
    for piece, size in zip(order.tolist(), sizes[order].tolist()):
        index = bisect.bisect_left(rooms, size)
        if index == len(rooms):
            sample, room = count, length
            count += 1
        else:
            room = rooms[index]
            sample = open_samples[room].pop()
            if not open_samples[room]:
                del rooms[index]
        samples[piece] = sample
        if left := room - size:
            if not open_samples[left]:
                bisect.insort(rooms, left)
            open_samples[left].append(sample)
    return samples
