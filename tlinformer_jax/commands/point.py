"""One job in a process of its own, for `runner`: `python -m tlinformer_jax point`, the job on stdin.

Whoever started it holds the other end of stdin: when that closes, its process is gone, and this one ends at once, so
that the same sweep, started again, finds the directory free. Its status is
`STOPPED` if a signal has stopped the training.
"""

import os
import sys
import threading


def main() -> None:
    """Runs the job of the first line of stdin."""
    line = sys.stdin.buffer.readline()
    threading.Thread(target=_end_with_starter, daemon=True).start()

    from tlinformer_jax.experiments.driver import run_job
    from tlinformer_jax.experiments.job import STOPPED, Job
    from tlinformer_jax.training.setup import use_compilation_cache

    use_compilation_cache()
    if run_job(Job.from_json(line.decode())) is None:
        sys.exit(STOPPED)


def _end_with_starter() -> None:
    """Waits for the end of stdin, then ends the process."""
    while os.read(0, 1024):
        pass
    os._exit(1)
