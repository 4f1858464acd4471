"""Token streams: one long row of token ids per split, and what is known of the text it came from."""

import dataclasses
import mmap

import numpy as np

from tlinformer_jax.errors import DataError

_CHECKED_AT_ONCE = 1 << 22  # tokens


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """A split as one row of tokens, documents separated by the tokenizer's end-of-text.

    Attributes:
      tokens: [length], unsigned integers; may be memory-mapped.
      num_bytes: UTF-8 bytes of the text, separators not counted.
      num_documents: documents joined in the stream.
      num_words: words between white space, end-of-line marks not counted; None if not counted.
      num_lines: lines (rows) of the text; None if not counted.
      sha256: of the tokens, in hexadecimal; "" if not computed.
    """

    tokens: np.ndarray
    num_bytes: int
    num_documents: int
    num_words: int | None = None
    num_lines: int | None = None
    sha256: str = ""


def smallest_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned integer type that holds every id."""
    return np.min_scalar_type(vocab_size - 1)


def check_token_ids(stream: TokenStream, vocab_size: int, name: str) -> None:
    """Refuses (DataError) a stream that holds an id outside [0, vocab_size)."""
    for start in range(0, len(stream.tokens), _CHECKED_AT_ONCE):
        part = _mapped_anew(stream.tokens, start, _CHECKED_AT_ONCE)
        if int(part.max()) >= vocab_size:
            where = int(np.argmax(part >= vocab_size))
            raise DataError(
                f"{name}: token id {int(part[where])} at position {start + where} is outside the vocabulary; "
                f"model.vocab_size = {vocab_size} allows 0 to {vocab_size - 1}"
            )


def _mapped_anew(tokens: np.ndarray, start: int, count: int) -> np.ndarray:
    """`tokens[start : start + count]`, of a memory-mapped file as a mapping of its own.

    Pages that were read stay in memory until their mapping is gone: one mapping would come to hold the whole corpus.
    """
    part = tokens[start : start + count]
    if not isinstance(tokens, np.memmap) or not isinstance(tokens.base, mmap.mmap):  # a slice's offset is not its own
        return part
    offset = tokens.offset + start * tokens.itemsize
    return np.memmap(tokens.filename, tokens.dtype, mode="r", offset=offset, shape=part.shape)
