"""Requests to stop a run, by a user or a scheduler: it saves after the running step."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

from tlinformer_jax.environment import INTERRUPTED

SIGNALS = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}
T = TypeVar("T")


class Stopped(Exception):
    """An evaluation was given up because a stop was asked for."""


class StopRequest:
    """Notices SIGTERM, SIGHUP and SIGINT while used as a context manager; a second SIGINT ends the process at once.

    An ignored SIGHUP, as under nohup, stays ignored. Python runs no handler during a compilation; a thread therefore
    listens too, answers the user, and acts on the second SIGINT.

    Where `jax.distributed` is initialised, SIGTERM belongs to JAX, which tells the other processes; all stop at the
    same call of `poll`, and must make the same calls. Other signals are passed on as SIGTERM.
    """

    def __init__(self) -> None:
        self._noticed, self._together = False, jax.distributed.is_initialized()
        self._polls = self._interrupts = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        others = {signal.SIGTERM} if self._together else set()
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            others.add(signal.SIGHUP)
        for number in SIGNALS - others:
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
        """The items, until a stop is asked for."""
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
        if number not in SIGNALS:
            return
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            _tell("stopped at once; what was not saved is lost")
            os._exit(INTERRUPTED)
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)  # for JAX, which tells the other processes
        again = "; once more stops at once" if number == signal.SIGINT else ""
        _tell(f"{signal.Signals(number).name}: saving after the running step{again}")


def _tell(message: str) -> None:
    """Writes a line to stderr past Python's buffers, which another thread may hold locked."""
    with contextlib.suppress(OSError):  # stderr is closed
        os.write(2, f"{message}\n".encode())
