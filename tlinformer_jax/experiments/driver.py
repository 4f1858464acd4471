"""Trains a job, records it in result.json, and performs its actions: `run_job`."""

import contextlib
import json
import pathlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

import tlinformer_jax
from tlinformer_jax.analysis.flops import active_parameters, num_parameters
from tlinformer_jax.decoding.memory import cache_bytes_at
from tlinformer_jax.experiments.actions import check_possible, checked_actions, run_action
from tlinformer_jax.experiments.job import FORMAT, RESULT_FILE, Job, Record, finished_result, write_result
from tlinformer_jax.files import write_text, writing
from tlinformer_jax.models.windows import trained_tokens
from tlinformer_jax.training.console import clock, say
from tlinformer_jax.training.device_memory import memory_advice, peak_bytes
from tlinformer_jax.training.loop import train_run
from tlinformer_jax.training.metrics import METRICS_FILE
from tlinformer_jax.training.setup import TrainedRun
from tlinformer_jax.training.workdir import sole_run

ATTEMPTS_FILE = "attempts.json"
LOCK_FILE = ".result.lock"  # held until the actions are done, so longer than the training's own lock


def run_job(
    job: Job, profile: str | pathlib.Path | None = None, init_from: str | pathlib.Path | None = None
) -> Record | None:
    """Trains a job or continues it, then performs its actions; does nothing if the job is finished.

    Rewrites result.json after each part. Returns the record; None if a signal stopped the training.
    """
    check_possible(checked_actions(job.actions), job.config)
    with sole_run(job.workdir, LOCK_FILE), memory_advice():
        done = finished_result(job)
        if done is not None:
            say(f"{job.name}: already finished")
            return done
        with timed_attempt(job.workdir):
            trained = train_run(job.config, job.workdir, profile, init_from)
        if trained.figures is None:
            return None
        # The peak of this process, which trains one run.
        result = record_of(job, trained, **logged(job, trained), peak=peak_bytes())
        write_result(job.workdir / RESULT_FILE, result)
        for name in job.actions:
            started = time.perf_counter()
            result["then"][name] = run_action(name, trained)
            write_result(job.workdir / RESULT_FILE, result)
            say(f"{name}: done  ({clock(time.perf_counter() - started)})")
        return result


def logged(job: Job, trained: TrainedRun) -> dict[str, Any]:
    """Collects the arguments of `record_of` that a run has logged about itself."""
    events = [json.loads(line) for line in (job.workdir / METRICS_FILE).read_text(encoding="utf-8").splitlines()]
    evaluations = [
        (event["step"], {name.removeprefix("eval/"): event[name] for name in event if name.startswith("eval/")})
        for event in events
        if event.get("eval/loss") is not None
    ]
    if trained.figures:
        evaluations = [each for each in evaluations if each[0] != trained.step] + [(trained.step, trained.figures)]
    attempts, names = read_attempts(job.workdir), ("tokens_per_second", "mfu")
    speeds = {name: [event[key] for event in events if event.get(key := f"train/{name}") is not None] for name in names}
    return {
        "evaluations": evaluations,
        "seconds": sum(end - start for start, end in attempts),
        "attempts": len(attempts),
        "speed": {name: statistics.median(found) if found else None for name, found in speeds.items()},
    }


def record_of(
    job: Job,
    trained: TrainedRun,
    evaluations: Sequence[tuple[int, Mapping[str, float]]],
    seconds: float,
    speed: Mapping[str, float | None],
    attempts: int = 1,
    together: int = 1,
    peak: int | None = None,
) -> Record:
    """Returns the record of a finished run, before its actions.

    In the record, cache counts the bytes of one sequence of N tokens in generation. history lists update and validation
    loss of each evaluation, and for a task the accuracy. target is None if train.steps has no accuracy.

    Args:
      job: the run.
      trained: the run with its last parameters.
      evaluations: pairs of an update and the validation figures after it; the last pair is the run's result.
      seconds: over all attempts, with compilation, evaluation and saving; a share of this for runs trained together.
      speed: medians of tokens_per_second and mfu.
      attempts: how often the run was started.
      together: number of runs that shared the program, see `together`.
      peak: peak memory in bytes; None if unknown.
    """
    config, device = trained.run.config, jax.devices()[0]
    model, train = config.model, config.train
    # The expected number if windows are sampled.
    tokens_of_step = train.batch_size * trained_tokens(model, config.data.sequence_length, train.sampled_windows)
    cache = cache_bytes_at(model, config.data.sequence_length)
    least, figures = train.goal, dict(evaluations[-1][1])
    target = {"accuracy": least, "reached": figures.get("accuracy", 0) >= least}
    measured = ("loss", *(["accuracy"] if config.data.is_task else []))
    return {
        "format": FORMAT,
        **{name: getattr(job, name) for name in ("name", "study", "sweep", "point", "overrides", "command")},
        "seed": config.train.seed,
        "version": tlinformer_jax.__version__,
        "jax": jax.__version__,
        "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
        "config": config.to_dict(),
        "parameters": num_parameters(model),
        **({"active_parameters": active_parameters(model)} if model.mixture else {}),
        "steps": trained.step,
        "tokens": round(trained.step * tokens_of_step),
        "seconds": {"wall": seconds},
        "attempts": attempts,
        "together": together,
        "speed": dict(speed),
        "peak_bytes": peak,
        "cache": {name: getattr(cache, name) for name in ("used", "allocated", "paper")}
        | {"dtype": model.compute_dtype.name},
        "validation": figures,
        "history": [[step, *(each[name] for name in measured)] for step, each in evaluations],
        "target": target | {"most_steps": trained.run.last_step} if least else None,
        "then": {},
    }


@contextlib.contextmanager
def timed_attempt(workdir: pathlib.Path) -> Iterator[None]:
    """Adds the start and the end of the body to attempts.json."""
    attempts, began = [*read_attempts(workdir), [time.time(), 0.0]], time.perf_counter()
    _write_attempts(workdir, attempts)
    try:
        yield
    finally:
        attempts[-1][1] = attempts[-1][0] + time.perf_counter() - began
        _write_attempts(workdir, attempts)


def _write_attempts(workdir: pathlib.Path, attempts: list[list[float]]) -> None:
    with writing(f"workdir {workdir}: {ATTEMPTS_FILE}"):
        write_text(workdir / ATTEMPTS_FILE, json.dumps(attempts) + "\n")


def read_attempts(workdir: pathlib.Path) -> list[list[float]]:
    """Returns start and end of every attempt; a killed one has ended with its last metrics."""
    metrics = workdir / METRICS_FILE
    last = metrics.stat().st_mtime if metrics.exists() else 0.0
    try:
        found = json.loads((workdir / ATTEMPTS_FILE).read_text(encoding="utf-8"))
        return [[float(start), float(end) or max(start, last)] for start, end in found]
    except (OSError, ValueError, TypeError):
        return []
