"""One run a working directory: a lock on a file in it, which the system releases when the process ends, however."""

import contextlib
import errno
import fcntl
import os
import pathlib
import platform
from collections.abc import Iterator

import jax

from tlinformer_jax.errors import DataError
from tlinformer_jax.files import open_own
from tlinformer_jax.training.metrics import say

LOCK_FILE = ".lock"


@contextlib.contextmanager
def sole_run(workdir: pathlib.Path, name: str = LOCK_FILE) -> Iterator[None]:
    """Holds the lock of the working directory inside; process 0 does so for all processes of a run.

    The file names the holder's process and host. It stays when the lock is released: only the lock counts, so a
    file left by a killed run is no obstacle.

    Args:
      workdir: the working directory.
      name: of the file, where what is held for itself is more than the training.

    Raises:
      DataError: if another run holds it, or the file cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    path = workdir / name
    try:
        file = open_own(path, "a+")
    except OSError as error:
        raise DataError(f"workdir {workdir}: {name} cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "not named"
            raise DataError(f"workdir {workdir}: another run is training into it ({holder})") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
            say(f"workdir {workdir}: its file system has no locks; a second run here would not be noticed")
        try:  # past the file's buffer, which would raise once more when it is closed
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on host {platform.node()}\n".encode())
        except OSError as error:
            raise DataError(f"workdir {workdir}: {name} cannot be written ({error.strerror})") from None
        yield
