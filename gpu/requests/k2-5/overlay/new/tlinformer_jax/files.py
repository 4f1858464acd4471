"""Files: paths that a user gives, files written completely or not at all, and files opened without following links."""

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tlinformer_jax.errors import UserError, file_errors_as

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
# Paths that Orbax and its libraries take literally: no wildcard, no prefix of a bucket.
PLAIN = re.compile(r"(?!/(gs|s3|az|hf)/)[\w/.,:+=@ -]+")
OPEN_FILES = pathlib.Path("/proc/self/fd")
MOST_BYTES = 2**26  # of a small text file: config.json, a manifest


def path_fault(text: str) -> str | None:
    """Says what a path must be if this one cannot be used; returns None for a usable path."""
    if URL.match(text):
        return "must be a local path; to use a bucket, mount it (gcsfuse, mountpoint-s3) and give the path of the mount"
    if not text.isprintable():
        return "must hold printable characters only"
    return None


def local_path(path: str | os.PathLike[str], name: str) -> pathlib.Path:
    """Returns the absolute path of the flag or field `name`, with `~` resolved; a UserError if it is no path."""
    try:
        text = os.fspath(path)
    except TypeError:
        raise UserError(f"{name} = {path!r}: must be a path") from None
    if not text:
        raise UserError(f"{name}: must be a path; it is empty")
    fault = path_fault(text)
    try:
        if fault is None:
            return pathlib.Path(text).expanduser().absolute()
    except (RuntimeError, OSError) as error:
        fault = f"cannot be resolved ({getattr(error, 'strerror', None) or error})"
    raise UserError(f"{name} = {text!r}: {fault}")


@contextlib.contextmanager
def plain_path(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path to an existing folder without characters that Orbax, TensorStore or glob would interpret.

    The path is the folder's own, or else the one by which Linux shows an open folder of this process.
    """
    if PLAIN.fullmatch(str(folder)):
        yield folder
        return
    if not OPEN_FILES.is_dir():
        raise OSError(errno.EINVAL, "on this system its path may only have letters, digits, spaces and /.,:+=@_-")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield OPEN_FILES / str(descriptor)
    finally:
        os.close(descriptor)


def open_own(path: pathlib.Path, mode: str = "r", buffering: int = -1) -> Any:
    """Opens a regular file of a working directory, text as UTF-8; raises an OSError for a link, a pipe and the like."""

    def opener(name: str, flags: int) -> int:
        try:
            descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(errno.ELOOP, "it is a link", name) from None
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is not a regular file", name)
        return descriptor

    return open(path, mode, buffering, encoding=None if "b" in mode else "utf-8", opener=opener)


def read_own(path: pathlib.Path, most: int = MOST_BYTES) -> str:
    """Reads the text of a regular file of a working directory, opened by `open_own`."""
    with open_own(path, "rb") as file:
        data: bytes = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return data.decode("utf-8")


def read_json(path: pathlib.Path) -> Any:
    """Reads JSON from a regular file of a working directory."""
    try:
        return json.loads(read_own(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def sealed_text(values: dict[str, Any]) -> str:
    """Returns the values as JSON with `sha256`, a hash of all of them, so that any change can be noticed."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return json.dumps(values | {"sha256": digest}, indent=1, sort_keys=True) + "\n"


def unsealed(text: str) -> dict[str, Any]:
    """Inverts `sealed_text`; raises a ValueError if the text has been changed."""
    try:
        values = dict(json.loads(text))
        del values["sha256"]
        if sealed_text(values) == text:
            return values
    except (TypeError, KeyError, RecursionError):
        pass
    raise ValueError("it has changed since it was written")


def own_folder(path: pathlib.Path) -> None:
    """Creates a folder of a working directory, with its parents, if it is missing."""
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link", str(path))


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text in UTF-8 by `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes a file completely or not at all; it is on disk when this returns. Replaces a link of the same name."""
    draft = path.with_name(f"{path.name}.draft")
    draft.unlink(missing_ok=True)  # left by a killed process, or a link to another file
    try:
        with open(draft, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)  # a part, if the disk is full
    sync_folder(path.parent)


def writing(name: str) -> contextlib.AbstractContextManager[None]:
    """Raises a DataError that names what could not be written in the body."""
    return file_errors_as(f"{name} cannot be written")


def sync_folder(folder: pathlib.Path) -> None:
    """Flushes a folder's entries, such as one just renamed, to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    """Replaces numbers that JSON cannot represent by None."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
