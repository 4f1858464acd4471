"""Token streams: a split as one long row of token ids, with facts about its text, and how text is tokenised.

Threads encode text on all cores, in bounded memory: the tokenizers' libraries release Python's lock.
`ranked_groups` finds texts that share passages, which belong in one split.
"""

import collections
import dataclasses
import mmap
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.errors import DataError, UserError

_READ_AT_ONCE = 1 << 22  # tokens
PIECE_CHARACTERS = 1 << 17  # size of a piece, and of the group of pieces that one thread encodes at a time
LARGEST_UNCUT = 1 << 28  # most characters held in memory of a document that cannot be cut
HASH = np.uint64(0x9E3779B97F4A7C15)  # multiplier of the rolling hash; odd
ASCII_SPACE = " \t\n\r\x0b\x0c"

Encoded = tuple[np.ndarray, "Counts"]

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """A split as one row of tokens, with the tokenizer's end-of-text between documents; counts are None if unknown."""

    tokens: np.ndarray  # [length], unsigned integers; may be memory-mapped
    num_bytes: int  # UTF-8 bytes of the text, without separators
    num_documents: int
    num_words: int | None = None  # separated by white space
    num_lines: int | None = None
    sha256: str = ""  # of the tokens, in hexadecimal; "" if not computed


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowStream(TokenStream):
    """A split given as samples: `rows` has {inputs, labels, weights: [samples, N]}, `tokens` all inputs in one row."""

    rows: dict[str, np.ndarray]


def smallest_dtype(vocab_size: int) -> np.dtype:
    """Returns the smallest unsigned integer type that can hold every id."""
    return np.min_scalar_type(vocab_size - 1)


def check_token_ids(stream: TokenStream, vocab_size: int, name: str) -> None:
    """Checks that all ids of a stream are in [0, vocab_size); raises a DataError if not."""
    for start, part in parts_of(stream.tokens):
        if int(part.max()) >= vocab_size or int(part.min()) < 0:
            where = int(np.argmax((part >= vocab_size) | (part < 0)))
            raise outside_vocabulary(f"{name}, position {start + where}", int(part[where]), vocab_size)


def parts_of(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields a long row in parts, each with its first position; does not keep a mapped file in memory."""
    mapping = tokens.base if isinstance(tokens, np.memmap) and tokens.mode == "r" else None
    for start in range(0, len(tokens), _READ_AT_ONCE):
        yield start, tokens[start : start + _READ_AT_ONCE]
        if isinstance(mapping, mmap.mmap):
            mapping.madvise(mmap.MADV_DONTNEED)


def positions_of(token: int, tokens: np.ndarray) -> np.ndarray:
    """Returns the positions of a token in a long row, ascending, int64."""
    found = [start + np.flatnonzero(part == token) for start, part in parts_of(tokens)]
    return np.concatenate([np.empty(0, np.int64), *found])


def in_order(count: int, batch_size: int, rows: np.ndarray | slice) -> Iterator[np.ndarray]:
    """Yields the given rows of batches of the numbers below `count`, int [rows]; the last batch is filled with -1."""
    for start in range(0, count, batch_size):
        indices = np.arange(start, start + batch_size)
        yield np.where(indices < count, indices, -1)[rows]


def outside_vocabulary(where: str, token: int, vocab_size: int) -> DataError:
    """Returns the error for a token id outside the model's vocabulary."""
    allowed = f"model.vocab_size = {vocab_size} allows 0 to {vocab_size - 1}; the default is that of data.tokenizer"
    return DataError(f"{where}: token id {token} is outside the vocabulary; {allowed}")


def in_threads(
    make: Callable[[Item], Made], items: Iterable[Item], threads: int, ahead: int
) -> Generator[Made, None, None]:
    """Yields `make(item)` in order; threads keep up to `ahead` results ready, and end with the generator."""
    executor = ThreadPoolExecutor(threads, thread_name_prefix="data")
    pending: collections.deque[Future[Made]] = collections.deque()
    try:
        for item in items:
            pending.append(executor.submit(make, item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


# ---- Tokenising text


@dataclasses.dataclass(frozen=True)
class DocumentPiece:
    """A part of a document, cut such that the tokens of all parts are the tokens of the document."""

    text: str
    previous: str  # the character before this part in its document; "" at the start
    ends: bool  # whether the document ends here


@dataclasses.dataclass(frozen=True)
class Counts:
    """Sizes of a text."""

    num_bytes: int = 0  # of UTF-8
    num_documents: int = 0  # documents that ended
    num_words: int = 0  # separated by ASCII white space: a no-break space does not end a word
    num_lines: int = 0  # newlines, and a document's last line if no newline ends it

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values())))


def available_cores() -> int:
    """Returns the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_documents(documents: Iterable[tuple[str, bool]], tokenizer: Tokenizer) -> Generator[Encoded, None, None]:
    """Encodes a stream of `(text, ends)`; yields tokens in order, with `end_of_text` after every document, and counts.

    Uses one thread per core, and reads ahead only what keeps the threads busy. Raises a DataError for a document that
    cannot be cut or encoded.
    """
    groups = group_pieces(cut_documents(documents, tokenizer.safe_cut))
    dtype, threads = smallest_dtype(tokenizer.vocab_size), available_cores()
    return in_threads(lambda group: encode_pieces(group, tokenizer, dtype), groups, threads, 2 * threads)


def cut_documents(
    documents: Iterable[tuple[str, bool]], safe_cut: Callable[[str], int], size: int = PIECE_CHARACTERS
) -> Iterator[DocumentPiece]:
    """Cuts a stream of `(text, ends)` into pieces of about `size` characters, where `safe_cut` allows it.

    A document without such a position stays whole; a DataError if it has more than LARGEST_UNCUT characters.
    """
    rest, previous = "", ""
    try_at = size  # doubled after each failure, so that the total work is linear
    for text, ends in documents:
        rest += text
        start, window = 0, try_at
        while len(rest) - start > window:
            cut = safe_cut(rest[start : start + window])
            if not cut:
                window *= 2
                continue
            yield DocumentPiece(rest[start : start + cut], previous, ends=False)
            start, window = start + cut, size
            previous = rest[start - 1]
        rest, try_at = rest[start:], window
        if len(rest) > LARGEST_UNCUT:
            limit = f"{LARGEST_UNCUT:,} characters without a place where the tokenizer allows a cut"
            raise DataError(f"the document with {rest[:40]!r} has more than {limit}; split it into several")
        if ends:
            yield DocumentPiece(rest, previous, ends=True)
            rest, previous, try_at = "", "", size


def group_pieces(pieces: Iterable[DocumentPiece], size: int = PIECE_CHARACTERS) -> Iterator[list[DocumentPiece]]:
    """Groups pieces in order until a group has `size` characters; an empty piece counts as a few characters too."""
    group: list[DocumentPiece] = []
    weight = 0
    for piece in pieces:
        group.append(piece)
        weight += len(piece.text) + 64
        if weight >= size:
            yield group
            group, weight = [], 0
    if group:
        yield group


def encode_pieces(pieces: Iterable[DocumentPiece], tokenizer: Tokenizer, dtype: np.dtype) -> Encoded:
    """Encodes pieces to tokens, `dtype` [length], with `end_of_text` after every document; returns the counts too."""
    parts, total = [np.empty(0, dtype)], Counts()
    for piece in pieces:
        if piece.text:
            parts.append(_encode(piece.text, tokenizer).astype(dtype))
        if piece.ends:
            parts.append(np.array([tokenizer.end_of_text], dtype))
        total += _count(piece)
    return np.concatenate(parts), total


def _encode(text: str, tokenizer: Tokenizer) -> np.ndarray:
    try:
        return tokenizer.encode(text)
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # raised by libraries in Rust
            raise
        fault = f"tokenizer {tokenizer.name}: it cannot encode {len(text):,} characters of a document that begin with"
        raise DataError(f"{fault} {text[:40]!r} ({error})") from None


def _count(piece: DocumentPiece) -> Counts:
    encoded = piece.text.encode("utf-8")
    inside = piece.text and piece.previous and piece.text[0] not in ASCII_SPACE and piece.previous not in ASCII_SPACE
    last = (piece.previous + piece.text)[-1:]
    unended = piece.ends and last not in ("", "\n")
    words, lines = len(encoded.split()) - bool(inside), encoded.count(b"\n") + int(unended)
    return Counts(len(encoded), int(piece.ends), words, lines)


# ---- Texts that share passages


def ranked_groups(sequences: Sequence[np.ndarray], length: int, weights: Sequence[int] | None = None) -> np.ndarray:
    """Returns the rank of each sequence's group, int [sequences]: 0 for the group with the largest sum of weights.

    Sequences of integers >= 0 that share `length` consecutive numbers, directly or through others, are one group. Runs
    of numbers are compared by a hash of 64 bits. Without weights, each sequence counts as 1. Of equal groups, the one
    with the earliest sequence comes first.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count, numbers = len(sequences), np.concatenate([np.empty(0, np.uint8), *sequences]).astype(np.uint64)
    owners = np.repeat(np.arange(count), [len(sequence) for sequence in sequences])
    starts = max(0, len(numbers) - length + 1)
    hashes = np.zeros(starts, np.uint64)
    for offset in range(length):
        hashes = hashes * HASH + numbers[offset : offset + starts]
    within = owners[:starts] == owners[length - 1 :]
    hashes, owners = hashes[within], owners[:starts][within]
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    same = np.flatnonzero(hashes[1:] == hashes[:-1])
    links = coo_array((np.ones(len(same)), (owners[same], owners[same + 1])), shape=(count, count))
    groups = connected_components(links, directed=False)[1]  # numbered by their first members
    order = np.argsort(-np.bincount(groups, weights), kind="stable")
    return np.argsort(order)[groups]
