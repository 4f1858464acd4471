"""What a command finds around it: streams that are closed or whose reader goes away, JAX's settings, devices.

Imports nothing heavy: every command calls `settle` before it does anything else.
"""

import errno
import io
import os
import sys
import traceback
from typing import Any

# Settings of JAX under which programs of this package fail or compute something else, and JAX's defaults. What a run
# computes is a matter of its configuration alone.
NOT_USED = {
    "JAX_ENABLE_X64": "false",
    "JAX_NUMPY_DTYPE_PROMOTION": "standard",
    "JAX_NUMPY_RANK_PROMOTION": "allow",
    "JAX_DEFAULT_PRNG_IMPL": "threefry2x32",
    "JAX_THREEFRY_PARTITIONABLE": "true",
    "JAX_TRANSFER_GUARD": "allow",
    "JAX_TRANSFER_GUARD_HOST_TO_DEVICE": "allow",
    "JAX_TRANSFER_GUARD_DEVICE_TO_DEVICE": "allow",
    "JAX_TRANSFER_GUARD_DEVICE_TO_HOST": "allow",
}
SWITCHES = dict.fromkeys(("1", "t", "y", "yes", "on"), "true") | dict.fromkeys(
    ("", "0", "f", "n", "no", "off"), "false"
)


class PatientStream(io.TextIOWrapper):
    """A stream for messages: what cannot be written is dropped, so that no message ends what it tells of.

    The layer of text, not that of bytes: a signal that raises there would make the buffer write twice.

    Attributes:
      lost: whether a write has failed, such as to a pipe whose reader has gone away.
    """

    lost = False

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

    def _drop(self, error: OSError) -> None:
        self.lost = True
        if error.errno in (errno.EPIPE, errno.EIO):  # for good: a pipe without a reader, a terminal that is gone
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)


def settle() -> None:
    """Opens standard streams that are closed, makes stdout and stderr patient, leaves out JAX's `NOT_USED`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            # It takes the closed stream's own number, which would else be that of the next file that is opened, and
            # libraries in C write to that number. Processes that are started get it too.
            stream = open(os.devnull, mode)  # noqa: SIM115 (open until the process ends)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)
        elif name != "stdin" and stream is getattr(sys, f"__{name}__"):
            setattr(sys, name, _patient(stream))
    _leave_out_settings()


def reader_is_gone() -> bool:
    """Whether something written to stdout was lost."""
    return getattr(sys.stdout, "lost", False)


def describe_failure(error: BaseException) -> str | None:
    """One line for an error that the environment is to blame for; None for any other."""
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return "~: this user has no home directory here; write the path in full"
    if isinstance(error, FloatingPointError):
        ours = [frame for frame in traceback.extract_tb(error.__traceback__) if "tlinformer_jax" in frame.filename]
        place = f" in {ours[-1].filename}, line {ours[-1].lineno}" if ours else ""
        return f"{str(error).splitlines()[0]}{place} (JAX_DEBUG_NANS or JAX_DEBUG_INFS asks for this)"
    asked = os.environ.get("JAX_PLATFORMS", "")
    if "jax" in sys.modules and (asked or "Unable to initialize backend" in str(error)):
        return _missing_device(asked)
    return None


def _missing_device(asked: str) -> str | None:
    """What is wrong with the devices that are asked for; None if there are such.

    JAX is asked again, since for some devices that are missing it fails later, and with another error each time.
    """
    try:
        sys.modules["jax"].devices()
    except Exception as error:
        refused = str(error).startswith("Unable to initialize backend")
        why = f" ({str(error).split(' (set JAX_PLATFORMS')[0].splitlines()[0]})" if refused else ""
        return f"JAX_PLATFORMS={asked}: must name devices that are here, or be unset for those that are{why}"
    return None


def _patient(stream: Any) -> PatientStream:
    stream.flush()
    raw = open(stream.fileno(), "wb", closefd=False)  # noqa: SIM115 (open until the process ends)
    by_line = stream.line_buffering or stream.write_through  # the latter with `python -u`
    return PatientStream(raw, encoding=stream.encoding, errors=stream.errors, line_buffering=by_line)


def _leave_out_settings() -> None:
    for name, default in NOT_USED.items():
        value = os.environ.pop(name, default)
        if SWITCHES.get(value.lower(), value.lower()) == default:
            continue
        if "jax" in sys.modules:
            sys.modules["jax"].config.update(name.lower(), {"true": True, "false": False}.get(default, default))
        print(f"{name}={value} is not used: the run's configuration says what is computed", file=sys.stderr)
