"""Token streams: one long row of token ids per split, and what is known of the text it came from."""

import dataclasses

import numpy as np

from tlinformer_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class TokenStream:
    """A split as one row of tokens, documents separated by the tokenizer's end-of-text.

    Attributes:
      tokens: [length], unsigned integers; may be memory-mapped.
      num_bytes: UTF-8 bytes of the text that `tokens` encode, separators not counted.
      num_documents: documents joined in the stream.
      num_words: whitespace-separated words of the text, end-of-line marks not counted; None if not counted.
      num_lines: lines (rows) of the text; None if not counted.
    """

    tokens: np.ndarray
    num_bytes: int
    num_documents: int
    num_words: int | None = None
    num_lines: int | None = None


def check_token_ids(stream: TokenStream, vocab_size: int, name: str) -> None:
    """Refuses a stream that holds an id outside [0, vocab_size).

    Raises:
      DataError: naming the stream, the id and its position.
    """
    chunk = 1 << 24  # bounds the memory that a memory-mapped stream takes here
    for start in range(0, len(stream.tokens), chunk):
        part = stream.tokens[start : start + chunk]
        top = int(part.max())
        if top >= vocab_size:
            where = start + int(np.argmax(part >= vocab_size))
            raise DataError(
                f"{name}: token id {int(stream.tokens[where])} at position {where} is outside the vocabulary; "
                f"model.vocab_size = {vocab_size} allows 0 to {vocab_size - 1}"
            )
