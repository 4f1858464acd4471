"""WikiText-103: rows of its zip or parquet files, checked against published facts.

A row is a line with its leading space and its newline (" = Title = \\n"); a blank line is the empty string.

Hashes come from Hugging Face `datasets`' dataset_infos.json. Words are counted without end-of-line marks; the published
counts include one per line. Counts of the raw files are not published, and may differ by a thousandth.
"""

import dataclasses
import hashlib
import http.client
import io
import os
import pathlib
import sys
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.data.cache import FOLDER_VARIABLE, cache_folder, exclusive
from tlinformer_jax.data.files import TextPiece, blocks_of, decoded, read_column, read_lines
from tlinformer_jax.data.streams import Counts
from tlinformer_jax.errors import DataError
from tlinformer_jax.files import write_bytes, writing

ZIP_SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # our names -> the zip's
USER_AGENT = "Mozilla/5.0 (compatible; tlinformer_jax)"  # the host refuses Python's default client
TIMEOUT = 60.0  # seconds without a response
ROWS = {"train": 1_801_350, "validation": 3_760, "test": 4_358}
WORDS = {"train": 101_425_671, "validation": 213_886, "test": 241_211}


@dataclasses.dataclass(frozen=True)
class Facts:
    """One variant's zip; `member` is the path of a split in it, with {} for "train", "valid" or "test"."""

    url: str
    size: int
    sha256: str
    member: str
    words_tolerance: float

    @property
    def zip_name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def parquet_files(self, directory: pathlib.Path, split: str) -> list[pathlib.Path]:
        """Lists the split's parquet files in `directory`, or in its subfolder with the variant's name."""
        folders = (directory / self.zip_name.removesuffix(".zip"), directory)
        return next(filter(None, (sorted(folder.glob(f"{split}-*-of-*.parquet")) for folder in folders)), [])


VARIANTS: dict[str, Facts] = {
    "wikitext103": Facts(
        url="https://wikitext.smerity.com/wikitext-103-v1.zip",
        size=190_229_076,
        sha256="242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        member="wikitext-103/wiki.{}.tokens",
        words_tolerance=0.0,
    ),
    "wikitext103-raw": Facts(
        url="https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
        size=191_984_949,
        sha256="91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
        member="wikitext-103-raw/wiki.{}.raw",
        words_tolerance=1e-3,
    ),
}


def identity(config: DataConfig, split: str) -> dict[str, Any]:
    """Returns what a split's text depends on; zip and parquet files have the same text, so neither is part of it."""
    return {"dataset": config.dataset, "split": split, "sha256": VARIANTS[config.dataset].sha256}


def read_documents(config: DataConfig, split: str) -> Iterator[TextPiece]:
    """Yields a split's rows in order, each a document, from files in the cache's `downloads`, else from the network."""
    return ((row if row.strip() else "", True) for row in _rows(config, split))


def _rows(config: DataConfig, split: str) -> Iterator[str]:
    facts = VARIANTS[config.dataset]
    directory = cache_folder() / "downloads"
    path = directory / facts.zip_name
    if not path.is_file():
        if paths := facts.parquet_files(directory, split):
            return (text or "" for path in paths for text in read_column(path, "text"))
        _download(config, facts, path)
    with path.open("rb") as file:
        _check_zip(path, file, facts)
    return _zip_rows(path, facts.member.format(ZIP_SPLITS[split]))


def check_counts(counts: Counts, config: DataConfig, split: str) -> None:
    """Checks that a split has the published number of rows and of words; raises a DataError if not."""
    rows, words = ROWS[split], WORDS[split]
    most_off = VARIANTS[config.dataset].words_tolerance * words
    if counts.num_documents != rows or abs(counts.num_words - words) > most_off:
        found = f"{config.dataset} {split} has {counts.num_documents} rows and {counts.num_words} words"
        raise DataError(f"{cache_folder()}: {found}, must have {rows} and {words}")


def _download(config: DataConfig, facts: Facts, path: pathlib.Path) -> None:
    """Downloads the zip to `path`, completely or not at all."""
    with writing(f"{path}: WikiText-103"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(path.with_name(f"{path.name}.lock")):
            if path.is_file():
                return
            try:
                data = _downloaded(facts)
                _check_zip(path, io.BytesIO(data), facts)
            except DataError as error:
                raise _missing(config, facts, path.parent, str(error)) from None
            write_bytes(path, data)


def _downloaded(facts: Facts) -> bytes:
    print(f"downloading {facts.url}, {facts.size / 1e6:,.1f} MB", file=sys.stderr, flush=True)
    request = urllib.request.Request(facts.url, headers={"User-Agent": USER_AGENT})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            return answer.read(facts.size + 1)  # one byte more shows that it is another file
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{facts.url}: {' '.join(str(error).split())[:200]}") from None


def _missing(config: DataConfig, facts: Facts, folder: pathlib.Path, reason: str) -> DataError:
    return DataError(
        f"{config.dataset} is missing: {reason}\n"
        f"  Get {facts.zip_name} ({facts.size:,} bytes) from {facts.url}, or the parquet files of "
        f"https://huggingface.co/datasets/Salesforce/wikitext/tree/main/{facts.zip_name.removesuffix('.zip')},\n"
        f"  and put the zip or the parquet files into {folder}; {FOLDER_VARIABLE} may name another cache"
    )


def _check_zip(path: pathlib.Path, data: io.BytesIO | io.BufferedReader, facts: Facts) -> None:
    found = hashlib.file_digest(data, "sha256").hexdigest()
    if found != facts.sha256:
        fault = f"sha256 is {found} ({data.seek(0, os.SEEK_END)} bytes), must be {facts.sha256} ({facts.size} bytes)"
        raise DataError(f"{path}: not the published file or damaged: {fault}")


def _zip_rows(path: pathlib.Path, member: str) -> Iterator[str]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as file:
            yield from read_lines(decoded(blocks_of(file), f"{path}: {member}"), path)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise DataError(f"{path}: {member} cannot be read ({error})") from None
