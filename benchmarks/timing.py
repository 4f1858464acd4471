"""Timing of device work, device facts and memory counters for all benchmarks."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

MOST_CALLS = 50


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls, each waited for, without the first call if it compiles."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure that is reported."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The shortest time."""
        return min(self.seconds)

    def per(self, count: int) -> "Timing":
        """Returns the timing of one of `count` equal operations in a call."""
        return Timing(tuple(seconds / count for seconds in self.seconds))

    def figures(self) -> dict[str, Any]:
        """Returns the entries of the reports: seconds (median), best_seconds, calls."""
        return {"seconds": self.median, "best_seconds": self.best, "calls": len(self.seconds)}


def time_calls(
    call: Callable[[], Any],
    budget: float,
    *,
    prepare: Callable[[], Any] | None = None,
    least: int = 3,
    compiled: bool = False,
) -> Timing:
    """Times `call` until the budget is spent, after a first call that is not counted.

    Args:
      call: function to time; its result is waited for.
      budget: seconds for all counted calls. At least `least` are made unless they take four times the budget.
      prepare: called and waited for before each call; not timed.
      least: minimum number of counted calls.
      compiled: if true, nothing is left to compile, so the first call counts.
    """
    if not compiled:
        _timed(call, prepare)
    seconds: list[float] = []
    started = time.perf_counter()
    while len(seconds) < MOST_CALLS:
        spent = time.perf_counter() - started
        if seconds and spent > (budget if len(seconds) >= least else 4 * budget):
            break
        seconds.append(_timed(call, prepare))
    return Timing(tuple(seconds))


def _timed(call: Callable[[], Any], prepare: Callable[[], Any] | None) -> float:
    if prepare is not None:
        jax.block_until_ready(prepare())
    started = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - started


def device_facts() -> dict[str, Any]:
    """Returns the facts about the machine for reports.

    Returns:
      device, platform, memory_limit_bytes (of JAX's allocator; None if unknown), jax.
    """
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "memory_limit_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "jax": jax.__version__,
    }
