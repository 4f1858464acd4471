"""One line of progress on stderr: share done, speed, time left."""

import sys
import time

TERMINAL_INTERVAL = 0.5  # seconds between updates of the one line on a terminal
LOG_INTERVAL = 15.0  # seconds between lines where stderr goes to a file


class Progress:
    """Counts bytes read of a known total and reports now and then.

    Args:
      label: what is being done.
      total: bytes to be read in all.
    """

    def __init__(self, label: str, total: int) -> None:
        self._label, self._total, self._done = label, total, 0
        self._start = time.monotonic()
        self._live = sys.stderr.isatty()
        self._interval = TERMINAL_INTERVAL if self._live else LOG_INTERVAL
        self._next = self._start + self._interval

    def advance(self, count: int) -> None:
        """Notes that `count` more bytes have been read."""
        self._done += count
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._interval
            self._show(now - self._start)

    def finish(self) -> None:
        """Ends the live line."""
        if self._live:
            print(file=sys.stderr)

    def _show(self, elapsed: float) -> None:
        left = elapsed * (self._total - self._done) / max(1, self._done)
        line = (
            f"{self._label}: {100 * self._done / max(1, self._total):.0f}% of {self._total / 1e6:.1f} MB, "
            f"{self._done / 1e6 / elapsed:.2f} MB/s, {_clock(left)} left"
        )
        print(f"\r{line}\033[K" if self._live else line, end="" if self._live else "\n", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
