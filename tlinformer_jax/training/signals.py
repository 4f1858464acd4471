"""A stop on request: SIGTERM, or SIGINT (Ctrl-C) once, let the running step end and the run save itself."""

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax

T = TypeVar("T")


class Stopped(Exception):
    """What was under way, such as an evaluation, was given up on request."""


class StopRequest:
    """Notices SIGTERM and SIGINT while it is used as a context manager.

    After the first SIGINT, a second one ends the process at once, even inside a compilation. Does nothing outside
    the main thread, where Python takes no signals, and in runs of several processes: those would have to agree on
    the step first.
    """

    def __init__(self) -> None:
        self._noticed = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __bool__(self) -> bool:
        """Whether a stop is asked for."""
        return self._noticed

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until a stop is asked for.

        Raises:
          Stopped: then.
        """
        for item in items:
            if self._noticed:
                raise Stopped
            yield item

    def _notice(self, number: int, _: Any) -> None:
        again = ""
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            again = "; once more stops at once"
        self._noticed = True
        name = signal.Signals(number).name
        # Not print: the signal may have come in the middle of one.
        os.write(2, f"{name}: saving after the running step{again}\n".encode())
