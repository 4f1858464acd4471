"""Text files: globs, decompression and documents, read in bounded memory.

A document is one or more pairs `(text, ends)`, where `ends` is True for its last piece. Documents without any text are
skipped. Any fault of a file is a `DataError` that names the file, and the line if there is one.
"""

import codecs
import functools
import glob
import json
import lzma
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from tlinformer_jax.errors import DataError, file_errors_as, first_line

COMPRESSED = (".gz", ".xz", ".zst")
COLUMNS = (".parquet", ".arrow")  # each row is a document
BLOCK = 32 * 1024  # bytes per read
STEP = 1024  # compressed bytes at a time; .zst can expand them to 30 MB of equal bytes
MOST_ENTRIES = 100_000  # files and folders that a pattern of unknown origin may search
LARGEST_LINE = 1 << 28  # characters; memory holds several copies of a line
# Folder -> Debian package that installs data there.
PACKAGES = {
    "/usr/share/datasets/fashion-mnist/": "dataset-fashion-mnist",
    "/usr/share/doc/bowtie/examples/": "bowtie-examples",
    "/usr/share/doc/mmseqs2/example-data/": "mmseqs2-examples",
    "/usr/share/asterisk/sounds/en_US_f_Allison/": "asterisk-core-sounds-en-wav",
}

TextPiece = tuple[str, bool]


# ---- Finding files


def find_files(patterns: str, field: str, any_name: bool = False) -> list[pathlib.Path]:
    """Expands the comma-separated globs or plain paths of `field` into files, each once, sorted within a glob.

    Refuses files whose names do not end like those of texts, unless `any_name`.
    """
    found: dict[pathlib.Path, None] = {}
    for pattern in (part.strip() for part in patterns.split(",") if part.strip()):
        path = pathlib.Path(pattern).expanduser().absolute()
        folder = _existing_folder(path)
        names = glob.glob(str(path.relative_to(folder)), root_dir=folder, recursive=True)
        with file_errors_as(f"{field}: {pattern!r} cannot be read"):
            found_files = [path] if path.is_file() else [folder / name for name in sorted(names)]
            matches = [match for match in found_files if match.is_file()]  # reading a pipe would block
        if not matches:
            packages = [package for folder_name, package in PACKAGES.items() if folder_name in pattern]
            hint = "".join(f"; the Debian package {package} ships it" for package in packages)
            raise DataError(f"{field}: no file matches {pattern!r}{hint}")
        for match in matches:
            if not any_name and file_kind(match) is None:
                allowed = "its name must end in .txt or .jsonl, also with .gz, .xz or .zst, or in .parquet or .arrow"
                raise DataError(f"{field}: {match} is not read; {allowed}")
            found[match.resolve()] = None
    if not found:
        kinds = "files" if any_name else ".txt or .jsonl files"
        raise DataError(f"{field} = {patterns!r}: must hold a path or glob of {kinds} for this split")
    return list(found)


def check_patterns(patterns: str, field: str) -> None:
    """Refuses globs that would search large parts of a disk, in configurations that another person may have written."""
    for pattern in map(pathlib.Path, filter(None, map(str.strip, patterns.split(",")))):
        folder = _existing_folder(pattern)
        if not glob.has_magic(str(pattern.parent.relative_to(folder))) or pattern.is_file():
            continue
        entries = 0
        for _, folders, files in os.walk(folder):
            entries += len(folders) + len(files)
            if entries > MOST_ENTRIES:
                fault = f"'{pattern}' would search more than {MOST_ENTRIES:,} files and folders"
                raise DataError(f"{field}: {fault}; name the folders, or evaluate one text as --text_file")


def _existing_folder(pattern: pathlib.Path) -> pathlib.Path:
    """Returns the deepest existing folder of a path: its name has no wildcard."""
    return next(filter(os.path.isdir, pattern.absolute().parents), pathlib.Path("/"))


def file_kind(path: pathlib.Path) -> str | None:
    """Returns "txt", "jsonl", "parquet" or "arrow" by the name's ending, ignoring .gz, .xz and .zst; else None."""
    if path.suffix in COLUMNS:
        return path.suffix[1:]
    name = path.stem if path.suffix in COMPRESSED else path.name
    return next((kind for kind in ("txt", "jsonl") if name.endswith("." + kind)), None)


# ---- Reading documents


def read_documents(path: pathlib.Path, dataset: str, text_field: str) -> Iterator[TextPiece]:
    """Yields the documents of one file; `dataset` and `text_field` as in `DataConfig`."""
    if path.suffix in COLUMNS:
        return ((text, True) for text in read_column(path, text_field) if text)
    texts = decoded(read_blocks(path), path)
    if file_kind(path) == "jsonl":
        return _json_documents(path, texts, text_field)
    return _line_documents(path, texts) if dataset == "lines" else _whole_document(texts)


def read_text(path: pathlib.Path) -> str:
    """Reads a file of any name as one document, like a .txt file."""
    return "".join(decoded(read_blocks(path), path))


def _json_documents(path: pathlib.Path, texts: Iterator[str], field: str) -> Iterator[TextPiece]:
    for number, line in enumerate(read_lines(texts, path), 1):
        if not line.isspace() and (document := _json_text(line, field, f"{path}, line {number}")):
            yield document, True


def _json_text(line: str, field: str, where: str) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, dict) or field not in value:
        names = ", ".join(map(repr, value)) if isinstance(value, dict) else ""
        raise DataError(f"{where}: no field {field!r} (data.text_field); the line has {names or 'no fields'}")
    text = value[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} (data.text_field) must be a string, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: field {field!r} holds half a surrogate pair, which is no character") from None
    return text


def _line_documents(path: pathlib.Path, texts: Iterator[str]) -> Iterator[TextPiece]:
    for line in read_lines(texts, path):
        text = line.rstrip("\r\n")
        if text and not text.isspace():
            yield text, True


def _whole_document(texts: Iterator[str]) -> Iterator[TextPiece]:
    found = False
    for text in texts:
        yield text, False
        found = True
    if found:
        yield "", True


def read_column(path: pathlib.Path, column: str) -> Iterator[str | None]:
    """Yields the texts in a column of a .parquet file, or of an .arrow file (Arrow IPC, file or stream)."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading {path.suffix} needs pyarrow: pip install pyarrow") from None
    try:
        if path.suffix == ".parquet":
            file = pyarrow.parquet.ParquetFile(path)
            schema, batches = file.schema_arrow, file.iter_batches(columns=[column])
        else:
            source = pyarrow.memory_map(str(path))
            try:
                file = pyarrow.ipc.open_file(source)
                schema, batches = file.schema, map(file.get_batch, range(file.num_record_batches))
            except pyarrow.ArrowInvalid:  # a stream, as Hugging Face `datasets` writes it
                source.seek(0)
                batches = pyarrow.ipc.open_stream(source)
                schema = batches.schema
        types = [str(field.type) for field in schema if field.name == column]
        if len(types) != 1 or not types[0].endswith(("string", "string_view")):
            columns = ", ".join(f"{field.name!r} ({field.type})" for field in schema)
            raise DataError(f"{path}: must have one column {column!r} (data.text_field) of text; it has {columns}")
        for batch in batches:
            yield from batch.column(column).to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: column {column!r} (data.text_field) is not valid UTF-8 ({error.reason})") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as {path.suffix[1:]} ({first_line(error)})") from None


# ---- Reading bytes and text


def read_blocks(path: pathlib.Path) -> Iterator[bytes]:
    """Yields the file's content, decompressed if its name's ending says so."""
    with file_errors_as(f"{path}: cannot be read"), path.open("rb") as file:
        yield from _decompressed(blocks_of(file), path) if path.suffix in COMPRESSED else blocks_of(file)


def blocks_of(file: IO[bytes]) -> Iterator[bytes]:
    """Yields the rest of an open file in blocks."""
    return iter(functools.partial(file.read, BLOCK), b"")


def decoded(blocks: Iterator[bytes], where: object) -> Iterator[str]:
    """Decodes UTF-8, without a byte order mark at the start; a DataError names the line in `where` that is not."""
    line = 1
    try:
        for text in codecs.iterdecode(blocks, "utf-8-sig"):
            yield text
            line += text.count("\n")
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        fault = f"not valid UTF-8 (byte {error.object[error.start]:#04x}: {error.reason})"
        raise DataError(f"{where}, line {line}: {fault}") from None


def read_lines(texts: Iterable[str], where: object) -> Iterator[str]:
    """Yields the lines of a text with their newlines, which the last may lack. Only "\\n" ends a line.

    Raises a DataError for a line of more than LARGEST_LINE characters, without reading it to its end.
    """
    parts: list[str] = []
    size = 0
    for text in texts:
        *ended, rest = text.split("\n")
        for line in ended:
            yield "".join((*parts, line, "\n"))
            parts, size = [], 0
        if rest:
            parts.append(rest)
            size += len(rest)
            if size > LARGEST_LINE:
                raise DataError(f"{where}: holds a line of more than {LARGEST_LINE:,} characters; cut it into several")
    if parts:
        yield "".join(parts)


def _decompressed(raw: Iterator[bytes], path: pathlib.Path) -> Iterator[bytes]:
    new_machine, failure = _decompressor(path)
    machine = new_machine()
    try:
        for data in (block[start : start + STEP] for block in raw for start in range(0, len(block), STEP)):
            while data:
                if machine.eof:
                    data = data.lstrip(b"\0")  # concatenated files may have padding between their parts
                    if not data:
                        break
                    machine = new_machine()
                yield machine.decompress(data)
                data = machine.unused_data if machine.eof else b""
    except failure as error:
        raise DataError(f"{path}: damaged {path.suffix} data ({error})") from None
    if not machine.eof:
        raise DataError(f"{path}: truncated: its {path.suffix} data ends before the end-of-stream mark")


def _decompressor(path: pathlib.Path) -> tuple[Callable[[], Any], type[Exception]]:
    """Returns a factory of decompressors with `decompress`, `eof` and `unused_data`, and the error that they raise."""
    if path.suffix == ".gz":
        return lambda: zlib.decompressobj(wbits=31), zlib.error
    if path.suffix == ".xz":
        return lzma.LZMADecompressor, lzma.LZMAError
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{path}: reading .zst needs zstandard: pip install zstandard") from None
    # Files written by `zstd --long=31` need the largest window.
    return lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(), zstandard.ZstdError
