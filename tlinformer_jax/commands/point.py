"""One job in a process of its own, for `runner`: `python -m tlinformer_jax point`, the job on stdin.

The sweep holds the other end of stdin. When that closes, the sweep has ended, and this process ends at once, so that
its directory is free for the next sweep. Its status is `STOPPED` if a signal has stopped the training.
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
