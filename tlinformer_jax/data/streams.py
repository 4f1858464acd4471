"""Token streams: one long row of token ids per split, and what is known of the text it came from."""

import collections
import dataclasses
import mmap
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from tlinformer_jax.errors import DataError

_CHECKED_AT_ONCE = 1 << 22  # tokens

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """A split as one row of tokens, documents separated by the tokenizer's end-of-text; None is not counted."""

    tokens: np.ndarray  # [length], unsigned integers; may be memory-mapped
    num_bytes: int  # UTF-8 bytes of the text, separators not counted
    num_documents: int
    num_words: int | None = None  # between white space
    num_lines: int | None = None
    sha256: str = ""  # of the tokens, in hexadecimal; "" if not computed


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowStream(TokenStream):
    """A split whose samples are given: `rows` are {inputs, labels, weights: [samples, N]}, `tokens` all inputs."""

    rows: dict[str, np.ndarray]


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer type that holds every id."""
    return np.min_scalar_type(vocab_size - 1)


def check_token_ids(stream: TokenStream, vocab_size: int, name: str) -> None:
    """Refuses (DataError) a stream that holds an id outside [0, vocab_size)."""
    for start in range(0, len(stream.tokens), _CHECKED_AT_ONCE):
        part = _mapped_anew(stream.tokens, start, _CHECKED_AT_ONCE)
        if int(part.max()) >= vocab_size or int(part.min()) < 0:
            where = int(np.argmax((part >= vocab_size) | (part < 0)))
            raise outside_vocabulary(f"{name}, position {start + where}", int(part[where]), vocab_size)


def outside_vocabulary(where: str, token: int, vocab_size: int) -> DataError:
    """What is said of an id that the model does not know."""
    allowed = f"model.vocab_size = {vocab_size} allows 0 to {vocab_size - 1}; by default it is that of data.tokenizer"
    return DataError(f"{where}: token id {token} is outside the vocabulary; {allowed}")


def _mapped_anew(tokens: np.ndarray, start: int, count: int) -> np.ndarray:
    """`tokens[start : start + count]`, of a memory-mapped file as a mapping of its own.

    Pages that were read stay in memory until their mapping is gone: one mapping would come to hold the whole corpus.
    """
    part = tokens[start : start + count]
    if not isinstance(tokens, np.memmap) or not isinstance(tokens.base, mmap.mmap):  # a slice's offset is not its own
        return part
    offset = tokens.offset + start * tokens.itemsize
    return np.memmap(tokens.filename, tokens.dtype, mode="r", offset=offset, shape=part.shape)


def in_threads(
    make: Callable[[Item], Made], items: Iterable[Item], threads: int, ahead: int
) -> Generator[Made, None, None]:
    """Yields `make(item)` in order; the threads keep up to `ahead` of them ready, and end with the generator."""
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
