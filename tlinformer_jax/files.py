"""Files: paths that a user gives, files written whole or not at all, files that are read or written through no link."""

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

from tlinformer_jax.errors import UserError, failure_told

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
# Paths that Orbax and what it stands on take as they are: no wildcard, nothing that stands for a bucket.
PLAIN = re.compile(r"(?!/(gs|s3|az|hf)/)[\w/.,:+=@ -]+")
OPEN_FILES = pathlib.Path("/proc/self/fd")
MOST_BYTES = 2**26  # of a description: config.json, a manifest


def path_fault(text: str) -> str | None:
    """What a path must be that this one is not; None for a path that can be used."""
    if URL.match(text):
        return "must be a local path; to use a bucket, mount it (gcsfuse, mountpoint-s3) and give the path of the mount"
    if not text.isprintable():
        return "must hold printable characters only"
    return None


def local_path(path: str | os.PathLike[str], name: str) -> pathlib.Path:
    """The absolute path that a user gave as `name` (a flag or a field), `~` resolved; UserError for what is no path."""
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
    """A path to an existing folder that holds no character with a meaning for Orbax, TensorStore or glob.

    That is the folder's own path, or else the one by which Linux shows an open folder of this process.
    """
    if PLAIN.fullmatch(str(folder)):
        yield folder
        return
    if not OPEN_FILES.is_dir():
        raise OSError(errno.EINVAL, "its path may hold letters, digits, spaces and /.,:+=@_- only on this system")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield OPEN_FILES / str(descriptor)
    finally:
        os.close(descriptor)


def open_own(path: pathlib.Path, mode: str = "r", buffering: int = -1) -> Any:
    """Opens a regular file of a working directory; OSError for a link, a pipe and the like. Text is UTF-8."""

    def opener(name: str, flags: int) -> int:
        try:
            descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OSError(errno.ELOOP, "it is a link", name) from None
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is no regular file", name)
        return descriptor

    return open(path, mode, buffering, encoding=None if "b" in mode else "utf-8", opener=opener)


def read_own(path: pathlib.Path, most: int = MOST_BYTES) -> str:
    """The text of a regular file of a working directory, read as `open_own` opens it."""
    with open_own(path, "rb") as file:
        data: bytes = file.read(most + 1)
    if len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return data.decode("utf-8")


def read_json(path: pathlib.Path) -> Any:
    """The JSON in such a file."""
    try:
        return json.loads(read_own(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def sealed_text(values: dict[str, Any]) -> str:
    """The values as JSON with `sha256`, the hash of all of them: a change of any of them shows."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return json.dumps(values | {"sha256": digest}, indent=1, sort_keys=True) + "\n"


def unsealed(text: str) -> dict[str, Any]:
    """What `sealed_text` was given."""
    try:
        values = dict(json.loads(text))
        del values["sha256"]
        if sealed_text(values) == text:
            return values
    except (TypeError, KeyError, RecursionError):
        pass
    raise ValueError("it has changed since it was written")


def own_folder(path: pathlib.Path) -> None:
    """Makes a folder of a working directory, with its parents, if it is missing."""
    path.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        raise OSError(errno.ELOOP, "it is a link", str(path))


def write_text(path: pathlib.Path, text: str) -> None:
    """`write_bytes` of a text in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes a file whole or not at all; it is on the disk when this returns. A link of its name is replaced."""
    draft = path.with_name(f"{path.name}.draft")
    draft.unlink(missing_ok=True)  # left by a kill, or a link to some other file
    with open(draft, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)


def writing(name: str) -> contextlib.AbstractContextManager[None]:
    """Raises a DataError that names what cannot be written inside."""
    return failure_told(f"{name} cannot be written")


def sync_folder(folder: pathlib.Path) -> None:
    """Brings a folder's entries, such as one just renamed, to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    """A value for JSON with None for every number that it cannot hold."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]
