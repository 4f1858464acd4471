"""Documents cut into pieces of bounded size and encoded: the unit of work of a tokenising process.

Imports nothing heavy: every tokenising process imports this module.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.errors import DataError, UserError

PIECE_CHARACTERS = 1 << 17  # a piece's size, and that of the group of pieces that one task holds
LARGEST_UNCUT = 1 << 28  # characters that may be held in memory because nothing says where to cut them
ASCII_SPACE = " \t\n\r\x0b\x0c"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a document, so cut that the parts' tokens joined are the document's.

    Attributes:
      text: the part.
      previous: the character before it in its document, "" at the start.
      ends: whether the document ends here.
    """

    text: str
    previous: str
    ends: bool


@dataclasses.dataclass(frozen=True)
class Counts:
    """What is counted of a text.

    Attributes:
      num_bytes: UTF-8 bytes.
      num_documents: documents that ended.
      num_words: words between ASCII white space (a no-break space does not end a word).
      num_lines: newlines, and a document's last line where no newline ends it.
    """

    num_bytes: int = 0
    num_documents: int = 0
    num_words: int = 0
    num_lines: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.num_bytes + other.num_bytes,
            self.num_documents + other.num_documents,
            self.num_words + other.num_words,
            self.num_lines + other.num_lines,
        )


def cut_documents(
    documents: Iterable[tuple[str, bool]], safe_cut: Callable[[str], int], size: int = PIECE_CHARACTERS
) -> Iterator[Piece]:
    """Cuts a stream of `(text, ends)` into pieces of about `size` characters, where `safe_cut` finds a place.

    A document without such a place stays whole.

    Raises:
      DataError: for one of more than LARGEST_UNCUT characters without such a place, which is not read to its end.
    """
    rest, previous = "", ""
    try_at = size  # after a failure the next try waits until the rest has doubled, so that the work stays linear
    for text, ends in documents:
        rest += text
        start, window = 0, try_at
        while len(rest) - start > window:
            cut = safe_cut(rest[start : start + window])
            if not cut:
                window *= 2
                continue
            yield Piece(rest[start : start + cut], previous, ends=False)
            start, window = start + cut, size
            previous = rest[start - 1]
        rest, try_at = rest[start:], window
        if len(rest) > LARGEST_UNCUT:
            told = f"has more than {LARGEST_UNCUT:,} characters without a place where the tokenizer allows a cut"
            raise DataError(f"the document with {rest[:40]!r} {told}; split it into several")
        if ends:
            yield Piece(rest, previous, ends=True)
            rest, previous, try_at = "", "", size


def group_pieces(pieces: Iterable[Piece], size: int = PIECE_CHARACTERS) -> Iterator[list[Piece]]:
    """Groups pieces in order until a group holds `size` characters (or as many pieces as that)."""
    group: list[Piece] = []
    weight = 0
    for piece in pieces:
        group.append(piece)
        weight += len(piece.text) + 64  # an empty row costs too
        if weight >= size:
            yield group
            group, weight = [], 0
    if group:
        yield group


def encode_pieces(pieces: Iterable[Piece], tokenizer: Tokenizer, dtype: np.dtype) -> tuple[np.ndarray, Counts]:
    """Encodes pieces, with `end_of_text` after every document.

    Returns:
      The tokens, `dtype` [length], and the counts of the text.

    Raises:
      DataError: for a document that the tokenizer cannot take.
    """
    end = np.array([tokenizer.end_of_text], dtype)
    parts, total = [np.empty(0, dtype)], Counts()
    for piece in pieces:
        if piece.text:
            parts.append(_encode(piece.text, tokenizer).astype(dtype))
        if piece.ends:
            parts.append(end)
        total += _count(piece)
    return np.concatenate(parts), total


def _encode(text: str, tokenizer: Tokenizer) -> np.ndarray:
    try:
        return tokenizer.encode(text)
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of libraries in Rust
            raise
        told = f"tokenizer {tokenizer.name}: it cannot encode the {len(text):,} characters of a document from"
        raise DataError(f"{told} {text[:40]!r} on ({error})") from None


def _count(piece: Piece) -> Counts:
    encoded = piece.text.encode("utf-8")
    inside = piece.text and piece.previous and piece.text[0] not in ASCII_SPACE and piece.previous not in ASCII_SPACE
    last = (piece.previous + piece.text)[-1:]
    unended = piece.ends and last not in ("", "\n")
    return Counts(
        len(encoded), int(piece.ends), len(encoded.split()) - bool(inside), encoded.count(b"\n") + int(unended)
    )
