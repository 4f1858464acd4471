"""When a checkpoint is due by wall time; all processes of a run get the same answer."""

import time

import jax
import numpy as np
from jax.experimental import multihost_utils

# The clock is looked at so often in the time between two checkpoints, because each look waits for the devices.
LOOKS = 20


class CheckpointTimer:
    """Says when the last checkpoint is nearly `minutes` old. Process 0 decides by its clock and tells the others.

    Args:
      minutes: between two checkpoints, at most; 0 for never.
    """

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._left, self._gap = 1, 1  # steps until the next look, and from the last look to that one
        self.restart()

    def restart(self) -> None:
        """A checkpoint has been saved."""
        self._saved = self._looked = time.monotonic()

    def due(self, result: object) -> bool:
        """Whether to save now; all processes must call it once after every step, with what the step returned."""
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
