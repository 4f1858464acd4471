"""What the loop asks after each step: whether to stop (signals), to save (wall time), to trace."""

import contextlib
import os
import pathlib
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from tlinformer_jax.training.metrics import say

T = TypeVar("T")

# What a shell reports of a process that Ctrl-C has ended.
INTERRUPTED = 130
# How often the clock is read between two checkpoints; each time waits for the devices.
LOOKS = 20
# Steps after the first before the trace begins, and steps that are traced.
WARMUP, TRACED = 10, 3


class Stopped(Exception):
    """An evaluation was given up because a stop was asked for."""


class StopRequest:
    """Notices SIGTERM, SIGHUP and SIGINT while used as a context manager; a second SIGINT ends the process at once.

    An ignored SIGHUP, as under nohup, stays ignored. Python runs handlers between two of its own instructions only, so
    not during a compilation; a thread therefore listens too, answers the user, and acts on the second SIGINT.

    Where `jax.distributed` is initialised, SIGTERM belongs to JAX, which tells the other processes; all stop at the
    same call of `poll`, and must make the same calls. Other signals are passed on as SIGTERM. Outside the main thread,
    where Python takes no signals, only what JAX notices counts.
    """

    def __init__(self) -> None:
        self._noticed = False
        self._together = jax.distributed.is_initialized()
        self._polls = 0
        self._interrupts = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        numbers = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}
        if self._together:
            numbers.discard(signal.SIGTERM)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            numbers.discard(signal.SIGHUP)
        for number in numbers:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writing)
        self._listener.join()
        os.close(self._reading)

    def __bool__(self) -> bool:
        """Whether a stop is asked for, and agreed on where there are several processes."""
        return self._noticed

    def poll(self) -> bool:
        """The same, after having asked the other processes."""
        if self._together and not self._noticed:
            self._polls += 1
            self._noticed = multihost_utils.reached_preemption_sync_point(self._polls)
        return self._noticed

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until a stop is asked for.

        Raises:
          Stopped: then.
        """
        for item in items:
            if self.poll():
                raise Stopped
            yield item

    def _handle(self, *_: Any) -> None:
        self._noticed = self._noticed or not self._together

    def _listen(self) -> None:
        while numbers := os.read(self._reading, 64):
            for number in numbers:
                self._answer(number)

    def _answer(self, number: int) -> None:
        if number not in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            return
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            _tell("stopped at once; what was not saved is lost")
            os._exit(INTERRUPTED)
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)  # for JAX, which tells the other processes
        again = "; once more stops at once" if number == signal.SIGINT else ""
        _tell(f"{signal.Signals(number).name}: saving after the running step{again}")


class CheckpointTimer:
    """Says when the last checkpoint is nearly `seconds` old (0: never). Process 0 decides and tells the others."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._left, self._gap = 1, 1  # steps until the next look, and from the last look to that one
        self.restart()

    def restart(self) -> None:
        """A checkpoint has been saved."""
        self._saved = self._looked = time.monotonic()

    def due(self, result: object) -> bool:
        """Whether to save now; all processes call it once after every step, with what the step returned."""
        if not self._seconds:
            return False
        self._left -= 1
        if self._left:
            return False
        jax.block_until_ready(result)
        now = time.monotonic()
        step_seconds = max(now - self._looked, 1e-9) / self._gap
        between = self._seconds / LOOKS
        gap = max(1, min(2 * self._gap, int(between / step_seconds)))
        late = int(now - self._saved + max(between, gap * step_seconds) >= self._seconds)
        if jax.process_count() > 1:
            late, gap = map(int, multihost_utils.broadcast_one_to_all(np.array([late, gap], np.int32)))
        self._looked, self._left, self._gap = now, gap, gap
        return bool(late)


class StepTrace:
    """Traces TRACED steps of a run for xprof, WARMUP steps after its first, or earlier where the run is shorter.

    Args:
      folder: receives the trace; None traces nothing.
      first: steps done before this run.
      last: the run's last step.
    """

    def __init__(self, folder: pathlib.Path | None, first: int, last: int) -> None:
        self._folder = folder
        self._begin = first + 1 + max(0, min(WARMUP, last - first - 1 - TRACED))
        self._end = min(last, self._begin + TRACED)
        self._tracing = False

    def after(self, step: int, results: Any) -> bool:
        """Starts or ends the trace when `step` is dispatched; returns whether it waited for `results`.

        The time must then not count as training.
        """
        if self._folder is None or self._begin >= self._end or step not in (self._begin, self._end):
            return False
        jax.block_until_ready(results)
        if self._tracing:
            jax.profiler.stop_trace()
            say(f"traced steps {self._begin + 1} to {self._end} into {self._folder}")
        else:
            jax.profiler.start_trace(str(self._folder))
        self._tracing = not self._tracing
        return True


def _tell(message: str) -> None:
    """Writes a line to stderr past Python's buffers, which another thread may hold locked."""
    with contextlib.suppress(OSError):  # stderr is closed
        os.write(2, f"{message}\n".encode())
