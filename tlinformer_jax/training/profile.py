"""A trace of a few training steps, for xprof or TensorBoard's profile plugin."""

import pathlib
from typing import Any

import jax

from tlinformer_jax.training.metrics import say

# Steps after the first that are let pass, and steps that are traced.
WARMUP, TRACED = 10, 3


class StepTrace:
    """Traces TRACED steps of a run, WARMUP steps after its first, or earlier where the run is shorter.

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
        """Called when `step` is dispatched; starts or ends the trace.

        Args:
          step: number of the step.
          results: of the step; waited for where the trace begins or ends.

        Returns:
          whether it waited, so that the time must not count as training.
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
