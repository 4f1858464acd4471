"""What a command finds around it: streams that are closed or whose reader goes away, JAX's settings, devices.

Imports nothing heavy: every command calls `settle` before it does anything else.
"""

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


class PatientFile(io.FileIO):
    """A file for messages: what cannot be written is dropped, so that no message ends what it tells of.

    Attributes:
      lost: whether a write has failed, such as to a pipe whose reader has gone away.
    """

    lost = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            self.lost = True
            return len(memoryview(data).cast("B"))


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
    return getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", False)


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


def _patient(stream: Any) -> io.TextIOWrapper:
    stream.flush()
    raw = PatientFile(stream.fileno(), "wb", closefd=False)
    buffered = io.BufferedWriter(raw)
    by_line = stream.line_buffering or stream.write_through  # the latter with `python -u`
    return io.TextIOWrapper(buffered, encoding=stream.encoding, errors=stream.errors, line_buffering=by_line)


def _leave_out_settings() -> None:
    for name, default in NOT_USED.items():
        value = os.environ.pop(name, default)
        if SWITCHES.get(value.lower(), value.lower()) == default:
            continue
        if "jax" in sys.modules:
            sys.modules["jax"].config.update(name.lower(), {"true": True, "false": False}.get(default, default))
        print(f"{name}={value} is not used: the run's configuration says what is computed", file=sys.stderr)
