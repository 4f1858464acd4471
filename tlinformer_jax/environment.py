"""Handles closed standard streams, JAX's settings and missing devices; describes errors that end a command.

Every command calls `settle` first, so this module imports nothing heavy.
"""

import contextlib
import errno
import io
import os
import signal
import stat
import sys
import traceback
from typing import Any

from tlinformer_jax.errors import UserError, first_line

INTERRUPTED = 130  # exit status of a process that Ctrl-C has ended, as shells report it
# JAX settings, with their defaults, that would change or break a run: only its configuration decides what is computed.
NOT_USED: dict[str, Any] = {
    "JAX_ENABLE_X64": False,
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
    "JAX_DEFAULT_PRNG_IMPL": "threefry2x32",
    "JAX_THREEFRY_PARTITIONABLE": True,
    "JAX_TRANSFER_GUARD": "allow",
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE": "allow",
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE": "allow",
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": "allow",
}


class PatientStream(io.TextIOWrapper):
    """A stream for messages that drops what cannot be written, so that a message never ends the command.

    It handles errors in the text layer, since a signal that raises in the byte layer would make the buffer write twice.
    """

    lost = ""  # why a write has failed, for example because the reader of a pipe has ended
    unread = False  # whether nobody can read on: the reader of a pipe has ended, or a terminal was closed

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._drop(error)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # Python 3.13 prints the errors of streams that it closes when it ends
            super().close()

    def _drop(self, error: OSError) -> None:
        self.lost = error.strerror or first_line(error)
        if error.errno in (errno.EPIPE, errno.EIO):  # a pipe without a reader, a closed terminal, a broken disk
            self.unread = not stat.S_ISREG(os.fstat(self.fileno()).st_mode)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


def settle() -> None:
    """Opens closed standard streams, makes stdout and stderr `PatientStream`s, and removes the settings `NOT_USED`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            # The new stream takes the closed one's descriptor. Otherwise the next opened file would get it, and C
            # libraries would write messages into that file. Child processes inherit the descriptor.
            stream = open(os.devnull, mode)  # noqa: SIM115 (open until the process ends)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
        elif name != "stdin" and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            raw = open(stream.fileno(), "wb", closefd=False)  # noqa: SIM115 (open until the process ends)
            by_line = stream.line_buffering or stream.write_through  # `python -u` sets write_through
            patient = PatientStream(raw, encoding=stream.encoding, errors=stream.errors, line_buffering=by_line)
            setattr(sys, name, patient)
    for name, default in NOT_USED.items():
        value = os.environ.pop(name, None)
        if value is not None:
            if "jax" in sys.modules:
                sys.modules["jax"].config.update(name.lower(), default)
            print(f"{name}={value} is ignored: the run's configuration says what is computed", file=sys.stderr)


def reader_is_gone() -> bool:
    """Returns whether output to stdout was lost."""
    return bool(getattr(sys.stdout, "lost", ""))


class Terminated(BaseException):
    """The exception for SIGTERM and SIGHUP. A BaseException, so that code that handles failures does not catch it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def status_and_message(error: BaseException) -> tuple[int, str | None]:
    """Returns the exit status of a command that `error` ends, and its last line; None for a traceback instead."""
    if isinstance(error, UserError):
        return error.status, str(error)
    if isinstance(error, Terminated):
        return 128 + error.number, f"ended by {error}"
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    message = describe_failure(error)
    return 1 if message is None or isinstance(error, FloatingPointError) else 2, message


def describe_failure(error: BaseException) -> str | None:
    """Describes an error caused by the environment in one line; returns None for other errors."""
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return "~: this user has no home directory here; write the path in full"
    if isinstance(error, FloatingPointError):
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "tlinformer_jax" in frame.filename]
        where = f" in {ours[-1].filename}, line {ours[-1].lineno}" if ours else ""
        return f"{first_line(error)}{where} (JAX_DEBUG_NANS or JAX_DEBUG_INFS is set)"
    asked = os.environ.get("JAX_PLATFORMS", "")
    if "jax" in sys.modules and (asked or "Unable to initialize backend" in str(error)):
        try:  # again, since JAX's first error about a missing device may describe another problem
            sys.modules["jax"].devices()
        except Exception as missing:
            refused = str(missing).startswith("Unable to initialize backend")
            why = f" ({str(missing).split(' (set JAX_PLATFORMS')[0].splitlines()[0]})" if refused else ""
            return f"JAX_PLATFORMS={asked}: must name devices of this machine, or be unset to use those that exist{why}"
    return None
