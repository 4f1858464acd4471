"""Files that are whole or not there, and values that JSON can hold."""

import hashlib
import json
import math
import os
import pathlib
import stat
from typing import Any

MOST_BYTES = 1 << 26  # of a description or a tokenizer; the largest published tokenizers have half of it


def read_small(path: pathlib.Path) -> bytes:
    """The content of a file that anybody may have written: bounded in size, and never waited for.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is no regular file, or too large.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise ValueError(f"larger than {MOST_BYTES:,} bytes")
    return data


def read_json(path: pathlib.Path) -> Any:
    """The JSON of such a file.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is no JSON, is nested too deeply, or for what `read_small` refuses.
    """
    try:
        return json.loads(read_small(path))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """The values with `sha256`, the hash of all of them as JSON: a change of any of them shows."""
    return values | {"sha256": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file whole or not at all; it is on the disk when this returns."""
    draft = path.with_name(f"{path.name}.draft")
    with open(draft, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_folder(path.parent)


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
