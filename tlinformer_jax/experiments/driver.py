"""Trains a run, records it, and does what is to be done with its parameters: `run_job`."""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from tlinformer_jax.errors import DataError
from tlinformer_jax.experiments.actions import check_possible, checked_actions, run_action
from tlinformer_jax.experiments.job import Job, finished_result
from tlinformer_jax.experiments.record import record_of
from tlinformer_jax.experiments.results import RESULT_FILE, write_result
from tlinformer_jax.files import write_text
from tlinformer_jax.training.loop import train_run
from tlinformer_jax.training.memory import memory_advice, peak_bytes
from tlinformer_jax.training.metrics import METRICS_FILE, clock, say
from tlinformer_jax.training.workdir import sole_run

ATTEMPTS_FILE = "attempts.json"
# Held until the actions are done, which is longer than the training's own.
LOCK_FILE = ".result.lock"


def run_job(
    job: Job, profile: str | pathlib.Path | None = None, init_from: str | pathlib.Path | None = None
) -> dict[str, Any] | None:
    """Trains the job, or goes on with it, then does its actions; result.json is written after each part, whole.

    Args:
      job: as ordered, its directory made; one that is finished is left as it is.
      profile: see `train_run`.
      init_from: see `train_run`.

    Returns:
      what result.json holds; None where a signal has stopped the training.

    Raises:
      UserError: see `train_run`; for an action that does not exist; where result.json is of another configuration.
    """
    check_possible(checked_actions(job.then), job.config)
    with sole_run(job.workdir, LOCK_FILE), memory_advice(job.config):
        done = finished_result(job)
        if done is not None:
            say(f"{job.name}: finished before")
            return done
        before = peak_bytes()
        with timed_attempt(job.workdir):
            trained = train_run(job.config, job.workdir, profile, init_from)
        if trained.figures is None:
            return None
        after = peak_bytes()
        attempts = read_attempts(job.workdir)
        # The count is of the process: this run's only where it has raised it.
        peak = after if after is not None and after > (before or 0) else None
        result = record_of(job, trained, attempts["seconds"], attempts["count"], peak)
        write_result(job.workdir / RESULT_FILE, result)
        for name in job.then:
            started = time.perf_counter()
            result["then"][name] = run_action(name, trained.run, trained.params)
            write_result(job.workdir / RESULT_FILE, result)
            say(f"{name}: done  ({clock(time.perf_counter() - started)})")
        return result


@contextlib.contextmanager
def timed_attempt(workdir: pathlib.Path) -> Iterator[None]:
    """Adds the time inside to that of earlier attempts, in a file of the working directory.

    One that was killed counts as long as it wrote metrics.
    """
    found = read_attempts(workdir)
    seconds, metrics = found["seconds"], workdir / METRICS_FILE
    if found["since"] is not None and metrics.exists():
        seconds += max(0.0, metrics.stat().st_mtime - found["since"])
    values = {"count": found["count"] + 1, "seconds": seconds, "since": time.time()}
    _write_attempts(workdir, values)
    started = time.perf_counter()
    try:
        yield
    finally:
        _write_attempts(workdir, values | {"seconds": seconds + time.perf_counter() - started, "since": None})


def _write_attempts(workdir: pathlib.Path, values: dict[str, Any]) -> None:
    try:
        write_text(workdir / ATTEMPTS_FILE, json.dumps(values) + "\n")
    except OSError as error:
        raise DataError(f"workdir {workdir}: {ATTEMPTS_FILE} cannot be written ({error.strerror})") from None


def read_attempts(workdir: pathlib.Path) -> dict[str, Any]:
    """The attempts so far: count; seconds of those that have ended; since, when the last began if it was killed."""
    try:
        found = json.loads((workdir / ATTEMPTS_FILE).read_text(encoding="utf-8"))
        return {"count": int(found["count"]), "seconds": float(found["seconds"]), "since": found["since"]}
    except (OSError, ValueError, TypeError, KeyError):
        return {"count": 0, "seconds": 0.0, "since": None}
