"""The manifest of a checkpoint: every file of it with size and SHA-256, so that damage is noticed before it is used.

A folder `checkpoints/STEP` appears with its manifest in one rename, so one without a manifest is none of ours, or
was tampered with. The manifest checks itself too: it must read exactly as it would be written again.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from typing import Any

from tlinformer_jax.errors import DataError
from tlinformer_jax.files import open_own, read_own, write_text

MANIFEST_FILE = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
      step: updates done; the batches are a function of it, so it is the data's position too.
      files: path within the checkpoint -> (bytes, SHA-256 in hexadecimal); the manifest itself is left out.
      code_version: of this package.
      config_sha256: of the run's configuration, as `config.fingerprint` takes it; empty where none was given.
      validation_loss: nats per token, if the step has been evaluated.
      after_skip: whether the last update was skipped, as not finite; no rollback ends there.
    """

    step: int
    files: dict[str, tuple[int, str]]
    code_version: str
    config_sha256: str
    validation_loss: float | None = None
    after_skip: bool = False


def hash_files(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
    """Sizes and hashes of all files below `folder`, each brought to the disk before it is read."""
    found = {}
    for path in _files(folder):
        with open_own(folder / path, "rb") as file:
            os.fsync(file.fileno())
            found[path] = (os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())
    return found


def write_manifest(folder: pathlib.Path, manifest: Manifest) -> None:
    """Writes the manifest of the checkpoint in `folder`, whole or not at all."""
    write_text(folder / MANIFEST_FILE, _render(dataclasses.asdict(manifest)))


def read_manifest(folder: pathlib.Path) -> Manifest:
    """The manifest of the checkpoint in `folder`; its files are not looked at.

    Raises:
      DataError: if it is missing, damaged, or of another step than the folder's name says.
    """
    path = folder / MANIFEST_FILE
    try:
        text = read_own(path)
    except OSError as error:
        raise DataError(f"checkpoint {folder}: has no readable {MANIFEST_FILE} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(f"checkpoint {folder}: {MANIFEST_FILE} is damaged") from None
    try:
        values = json.loads(text)
        del values["sha256"]
        if _render(values) != text:
            raise ValueError(text)
        files = {name: (int(size), str(digest)) for name, (size, digest) in values.pop("files").items()}
        manifest = Manifest(files=files, **values)
        if not isinstance(manifest.step, int) or not isinstance(manifest.validation_loss, float | None):
            raise TypeError(values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DataError(f"checkpoint {folder}: {MANIFEST_FILE} is damaged") from None
    if folder.name != str(manifest.step):
        raise DataError(f"checkpoint {folder}: {MANIFEST_FILE} is of step {manifest.step}")
    return manifest


def verify(folder: pathlib.Path) -> Manifest:
    """Compares every file of the checkpoint in `folder` with its manifest, which is returned.

    Raises:
      DataError: naming the first file that is missing, too many, of another size, or changed.
    """
    manifest = read_manifest(folder)
    present = set(_files(folder))
    for path in sorted(present - set(manifest.files)):
        raise DataError(f"checkpoint {folder}: file {path} does not belong to it")
    for path, (size, digest) in sorted(manifest.files.items()):
        if path not in present:
            raise DataError(f"checkpoint {folder}: file {path} is missing")
        try:
            with open_own(folder / path, "rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    raise DataError(f"checkpoint {folder}: file {path} has {found:,} bytes instead of {size:,}")
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise DataError(f"checkpoint {folder}: the bytes of file {path} have changed")
        except OSError as error:
            raise DataError(f"checkpoint {folder}: file {path} cannot be read ({error.strerror})") from None
    return manifest


def _files(folder: pathlib.Path) -> list[str]:
    """Everything below `folder` that is no directory, as paths within it, without the manifest and its draft."""
    own = (MANIFEST_FILE, f"{MANIFEST_FILE}.draft")
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for name in (path.relative_to(folder).as_posix() for path in paths) if name not in own)


def _render(values: dict[str, Any]) -> str:
    """The manifest's text: the values, and the hash of all of them."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return json.dumps({**values, "sha256": digest}, indent=1, sort_keys=True) + "\n"
