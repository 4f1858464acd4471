"""The record of a finished run, `result.json`: reading, writing, checking. Without JAX."""

import json
import pathlib
from typing import Any

from tlinformer_jax.errors import DataError
from tlinformer_jax.files import finite, write_text

RESULT_FILE = "result.json"
FORMAT = "tlinformer_jax run 1"
# What every record has; `record.record_of` says what each part is.
PARTS = {
    **dict.fromkeys(("name", "study", "command", "version", "jax"), str),
    **dict.fromkeys(("config", "overrides", "device", "seconds", "speed", "cache", "validation", "best", "then"), dict),
    **dict.fromkeys(("seed", "parameters", "steps", "tokens"), int),
    "history": list,
}


def write_result(path: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes a record whole or not at all; figures that are not finite become null.

    A line for each part.

    Raises:
      DataError: if it cannot be written.
    """
    try:
        parts = [f"{json.dumps(name)}: {json.dumps(part, allow_nan=False)}" for name, part in finite(result).items()]
        write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None


def read_result(path: pathlib.Path) -> dict[str, Any]:
    """Reads a record.

    Raises:
      DataError: if it cannot be read, or is none.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise DataError(f"{path}: is no JSON ({error})") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise DataError(f"{path}: is no record of a run; its 'format' must be {FORMAT!r}")
    for name, kind in PARTS.items():
        if not isinstance(result.get(name), kind):
            raise DataError(f"{path}: {name!r} must be {kind.__name__}")
    return result
