"""The token cache: each split is tokenised once, stored in its own directory, and memory-mapped afterwards.

    FOLDER/tokens/<key>/meta.json    the tokens' identity, counts, size and hashes of tokens.bin, and its own hash
    FOLDER/tokens/<key>/tokens.bin   the ids, in the smallest unsigned type that fits the vocabulary
    FOLDER/tokens/<key>.lock         held while the cache is being made
    FOLDER/tokens/<key>.tmp-*        an unfinished cache, also one left by a killed run

A cache is made in a temporary directory and renamed, so a cache under its final name is complete. On file systems
without locks, the first of several processes wins.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import platform
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np

from tlinformer_jax.data.streams import Counts, Encoded, TokenStream
from tlinformer_jax.errors import DataError, UserError, file_errors_as
from tlinformer_jax.files import local_path, read_own, sealed_text, sync_folder, unsealed, write_text

FOLDER_VARIABLE = "TLINFORMER_CACHE"
FORMAT = 4  # part of every cache's key, so that caches of other formats are not found
META_FILE = "meta.json"
TOKENS_FILE = "tokens.bin"
ENDS = 1 << 20  # bytes hashed at the start and at the end of a file

Identity = dict[str, Any]
Encode = Callable[[], Generator[Encoded, None, None]]


def file_identity(path: pathlib.Path) -> Identity:
    """Returns a file's path, size, modification time [ns] and hash of its start and end."""
    with file_errors_as(f"{path}: cannot be read"), path.open("rb") as file:
        status = os.fstat(file.fileno())
        ends = hashlib.sha256(file.read(ENDS))
        file.seek(max(0, status.st_size - ENDS))
        ends.update(file.read(ENDS))
    return {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "ends": ends.hexdigest()}


def cache_folder() -> pathlib.Path:
    """Returns the folder $TLINFORMER_CACHE; by default $XDG_CACHE_HOME/tlinformer_jax, or ~/.cache/tlinformer_jax.

    Its folder `downloads` may hold the zip or parquet files of WikiText-103, which is otherwise downloaded. The data
    sets of TensorFlow Datasets are in its folder `tensorflow_datasets`.
    """
    if given := os.environ.get(FOLDER_VARIABLE):
        return local_path(given, FOLDER_VARIABLE)
    if given := os.environ.get("XDG_CACHE_HOME"):
        return local_path(given, "XDG_CACHE_HOME") / "tlinformer_jax"
    try:
        home = pathlib.Path.home()
    except RuntimeError:
        raise UserError(f"{FOLDER_VARIABLE}: must be set to a folder, because there is no home directory") from None
    return local_path(home / ".cache", "the home directory's cache") / "tlinformer_jax"


def cached_tokens(identity: Identity, encode: Encode) -> tuple[TokenStream, bool]:
    """Returns the memory-mapped tokens of `identity`, and whether they were already stored.

    `identity` is all that the tokens depend on, as JSON. `encode` yields missing tokens in order, with their counts.
    """
    final = _directory(identity)
    if stream := find_tokens(identity):
        return stream, True
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(final.with_name(f"{final.name}.lock")) as locked:
            if stream := find_tokens(identity):
                return stream, True
            shutil.rmtree(final, ignore_errors=True)  # a damaged cache
            for left in final.parent.glob(f"{final.name}.tmp-{platform.node()}-*") if locked else ():
                shutil.rmtree(left, ignore_errors=True)  # left by a killed run
            _make(final, identity, encode)
    except OSError as error:
        why = f"the token cache cannot be written ({error.strerror or error}); {FOLDER_VARIABLE} may name another"
        raise DataError(f"{error.filename or final}: {why}") from None
    made = _open_sound(final)
    assert made is not None
    return made, False


def find_tokens(identity: Identity) -> TokenStream | None:
    """Returns the stream of a cache that `cached_tokens` has made; None if missing or damaged. Writes nothing."""
    return _open_sound(_directory(identity))


@contextlib.contextmanager
def exclusive(path: pathlib.Path) -> Iterator[bool]:
    """Waits for and holds the lock file `path`; yields False if the file system has no locks."""
    with path.open("w") as file:
        locked = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which has locked {path}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            locked = False
        yield locked


def _directory(identity: Identity) -> pathlib.Path:
    text = json.dumps({"format": FORMAT} | identity, sort_keys=True)
    return cache_folder() / "tokens" / hashlib.sha256(text.encode()).hexdigest()[:32]


def _open_sound(directory: pathlib.Path) -> TokenStream | None:
    """Opens the cache in a directory; returns None if it is missing or does not match its meta.json."""
    if not os.path.lexists(directory):  # also if it cannot be reached; the attempt to write it then says why
        return None
    try:
        meta = unsealed(read_own(directory / META_FILE))
        found = file_identity(directory / TOKENS_FILE)
        for name in ("size", "ends"):
            if found[name] != meta["tokens"][name]:
                raise ValueError(f"{TOKENS_FILE}: {name} is {found[name]}, not {meta['tokens'][name]}")
    except (OSError, ValueError) as error:
        print(f"{directory}: damaged token cache ({error}); it is made again", file=sys.stderr)
        return None
    tokens = np.memmap(directory / TOKENS_FILE, np.dtype(meta["dtype"]), mode="r")
    return TokenStream(tokens, **meta["counts"], sha256=meta["tokens"]["sha256"])


def _make(final: pathlib.Path, identity: Identity, encode: Encode) -> None:
    temporary = final.with_name(f"{final.name}.tmp-{platform.node()}-{os.getpid()}-{time.monotonic_ns()}")
    temporary.mkdir()
    try:
        path, counts, digest, dtype = temporary / TOKENS_FILE, Counts(), hashlib.sha256(), ""
        # Closing the generator ends the encoding threads at once if writing fails.
        with contextlib.closing(encode()) as encoded, path.open("wb") as file:
            for tokens, counted in encoded:
                data, dtype = tokens.tobytes(), tokens.dtype.name
                file.write(data)
                digest.update(data)
                counts += counted
            file.flush()
            os.fsync(file.fileno())
        written = file_identity(path)
        meta = {
            "identity": identity,
            "dtype": dtype,
            "counts": dataclasses.asdict(counts),
            "tokens": {"size": written["size"], "ends": written["ends"], "sha256": digest.hexdigest()},
        }
        write_text(temporary / META_FILE, sealed_text(meta))
        try:
            temporary.rename(final)
        except OSError:
            if not _open_sound(final):  # without locks, another process may have made it
                raise
        sync_folder(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
