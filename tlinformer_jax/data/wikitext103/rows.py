"""The rows of WikiText-103, from its zip or its parquet files; nothing of TFDS here.

A row is a line with its leading space and its newline (" = Title = \\n"); a blank line is the empty string.
"""

import hashlib
import io
import pathlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from tlinformer_jax.data.files import decode_line, read_lines
from tlinformer_jax.data.wikitext103.facts import WIKI_SPLITS, Facts
from tlinformer_jax.errors import DataError


def check_zip(path: pathlib.Path, facts: Facts) -> None:
    """Refuses a zip that is not the published one.

    Raises:
      DataError: naming the file and what its sha256 must be.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != facts.sha256:
        size = path.stat().st_size
        raise DataError(
            f"{path}: not the published file or damaged: sha256 is {found} ({size} bytes), "
            f"must be {facts.sha256} ({facts.size} bytes)"
        )


def zip_rows(path: pathlib.Path, facts: Facts, split: str) -> Iterator[str]:
    """Yields the rows of "train", "validation" or "test".

    Raises:
      DataError: if the zip cannot be read.
    """
    member = facts.member.format(WIKI_SPLITS[split])
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            for number, line in enumerate(read_lines(_blocks(file), path), 1):
                yield _row(decode_line(line, f"{path}: {member}", number))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise DataError(f"{path}: {member} cannot be read ({error})") from None


def find_parquet(directory: pathlib.Path, facts: Facts, split: str) -> list[pathlib.Path]:
    """The split's parquet files in `directory`, or in the folder there that is named like the variant."""
    for place in (directory / facts.parquet, directory):
        if found := sorted(place.glob(f"{split}-*-of-*.parquet")):
            return found
    return []


def parquet_rows(paths: list[pathlib.Path]) -> Iterator[str]:
    """Yields the rows of a split's parquet files.

    Raises:
      DataError: if pyarrow is missing or a file cannot be read.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{paths[0]}: reading parquet needs pyarrow: pip install pyarrow") from None
    for path in paths:
        try:
            for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["text"]):
                yield from (_row(text) for text in batch.column("text").to_pylist())
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            raise DataError(f"{path}: cannot be read as parquet with a column 'text' ({error})") from None


def check_counts(rows: Iterator[str], facts: Facts, split: str, name: str) -> None:
    """Refuses rows whose number, or number of words, is not the published one.

    Raises:
      DataError: naming `name`, the split and both numbers.
    """
    found_rows = found_words = 0
    for row in rows:
        found_rows += 1
        found_words += len(row.encode("utf-8").split())
    words_off = abs(found_words - facts.words[split])
    if found_rows != facts.rows[split] or words_off > facts.words_tolerance * facts.words[split]:
        raise DataError(
            f"{name}: {split} has {found_rows} rows and {found_words} words, "
            f"must have {facts.rows[split]} and {facts.words[split]}"
        )


def _row(line: str) -> str:
    return line if line.strip() else ""


def _blocks(file: Any) -> Iterator[bytes]:
    while block := file.read(16 * io.DEFAULT_BUFFER_SIZE):
        yield block
