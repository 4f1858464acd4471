"""Traces device work and lists the kernels that took the time."""

import collections
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.session import Session

# Number of kernels in a table.
MOST = 15


def profile(session: Session, folder: pathlib.Path) -> dict[str, str]:
    """Traces a device loop over a whole generation window, and a slide of the first sequence.

    Args:
      session: at the beginning of a generation window.
      folder: for the traces, in one folder each.

    Returns:
      the result of `trace` for each.
    """
    history, size, overlap = session.history, session.config.generation_window, session.overlap
    session.loop(size)  # compiles
    session.rewind(history, overlap)
    tables = {"hit": trace(folder / "hit", lambda: session.loop(size))}
    if session.config.windowed:
        session.slide_row(0)
        session.rewind(history, overlap + size)

        def slide() -> Any:
            session.slide_row(0)
            return session.cache

        tables["slide"] = trace(folder / "slide", slide)
    return tables


def trace(folder: pathlib.Path, call: Callable[[], Any], most: int = MOST) -> str:
    """Runs `call` under the profiler, waits for its result, and writes the trace to `folder`.

    Returns:
      a table of the `most` kernels with the longest total device time, or one line that says why there is none.
    """
    with jax.profiler.trace(str(folder)):
        jax.block_until_ready(call())
    try:
        kernels = device_kernels(folder)
    except (AttributeError, OSError, RuntimeError, ValueError) as error:
        return f"no kernel table: the trace in {folder} cannot be read ({type(error).__name__}: {error})"
    if not kernels:
        return f"no kernel table: the trace in {folder} has no device plane"
    return kernel_table(kernels, most)


def device_kernels(folder: pathlib.Path) -> dict[str, tuple[int, float]]:
    """Returns name -> (runs, total nanoseconds) of a folder's newest trace; empty without a device plane."""
    files = sorted(folder.glob("**/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    if not files:
        return {}
    planes = [
        plane for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes if plane.name.startswith("/device")
    ]
    return add_up(planes)


def add_up(planes: list[Any]) -> dict[str, tuple[int, float]]:
    """Adds up the events of device planes by name.

    A GPU has its kernels on the lines of its streams, a TPU its operations on the line 'XLA Ops'. Other lines ('XLA
    Modules', 'Steps') repeat the same time by what launched it, so they are left out.
    """
    totals: dict[str, tuple[int, float]] = collections.defaultdict(lambda: (0, 0.0))
    for plane in planes:
        lines = list(plane.lines)
        streams = [line for line in lines if line.name.startswith("Stream")]
        for line in streams or [line for line in lines if line.name == "XLA Ops"]:
            for event in line.events:
                count, duration = totals[event.name]
                totals[event.name] = (count + 1, duration + event.duration_ns)
    return dict(totals)


def kernel_table(kernels: dict[str, tuple[int, float]], most: int = MOST) -> str:
    """Returns the longest kernels as text: total milliseconds, share, runs, microseconds each, name."""
    whole = sum(duration for _, duration in kernels.values()) or 1.0
    lines = [f"{'total ms':>10} {'share':>6} {'runs':>7} {'us each':>9}  kernel"]
    for name, (count, duration) in sorted(kernels.items(), key=lambda item: -item[1][1])[:most]:
        lines.append(
            f"{duration / 1e6:>10.3f} {duration / whole:>6.1%} {count:>7} {duration / count / 1e3:>9.2f}  {name[:90]}"
        )
    lines.append(f"{whole / 1e6:>10.3f} in all, {len(kernels)} kernels")
    return "\n".join(lines)
