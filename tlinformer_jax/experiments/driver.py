"""Trains a job, records it in result.json, and carries out its actions: `run_job`."""

import contextlib
import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

import tlinformer_jax
from tlinformer_jax.analysis.flops import active_parameters
from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.decoding.cache import cache_bytes_at
from tlinformer_jax.experiments.actions import check_possible, checked_actions, run_action
from tlinformer_jax.experiments.job import FORMAT, RESULT_FILE, Job, Record, finished_result, write_result
from tlinformer_jax.files import write_text, writing
from tlinformer_jax.models.windows import trained_tokens
from tlinformer_jax.training.console import clock, memory_advice, peak_bytes, say
from tlinformer_jax.training.loop import train_run
from tlinformer_jax.training.metrics import METRICS_FILE
from tlinformer_jax.training.setup import TrainedRun
from tlinformer_jax.training.workdir import sole_run

ATTEMPTS_FILE = "attempts.json"
LOCK_FILE = ".result.lock"  # held until the actions are done, longer than the training's own lock


def run_job(
    job: Job, profile: str | pathlib.Path | None = None, init_from: str | pathlib.Path | None = None
) -> Record | None:
    """Trains a job or continues it, then carries out its actions; result.json is rewritten after each part.

    A finished job is left as it is. `profile` and `init_from`, and what is raised, are those of `train_run`; an action
    that does not exist and a result.json of another configuration are refused too. Returns the record; None if a signal
    stopped the training.
    """
    check_possible(checked_actions(job.actions), job.config)
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
        # The peak counts the whole process: it is this run's only if this run has raised it.
        peak = after if after is not None and after > (before or 0) else None
        result = record_of(job, outcome_of(job, trained, peak))
        write_result(job.workdir / RESULT_FILE, result)
        for name in job.actions:
            started = time.perf_counter()
            result["then"][name] = run_action(name, trained)
            write_result(job.workdir / RESULT_FILE, result)
            say(f"{name}: done  ({clock(time.perf_counter() - started)})")
        return result


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a training, for its record.

    Attributes:
      trained: the run and its last parameters.
      evaluations: pairs of an update and the validation's figures after it; the last is the run's.
      seconds: of all attempts, with compilation, evaluation and saving; of runs trained together its share.
      speed: tokens_per_second and mfu, medians of what was logged; of runs trained together, of all of them.
      attempts: how often it was started.
      together: runs that shared the program, see `together`.
      peak: the most memory in bytes, None if not known.
    """

    trained: TrainedRun
    evaluations: Sequence[tuple[int, Mapping[str, float]]]
    seconds: float
    speed: Mapping[str, float | None]
    attempts: int = 1
    together: int = 1
    peak: int | None = None


def outcome_of(job: Job, trained: TrainedRun, peak: int | None) -> Outcome:
    """The outcome of a run, from its result and what it has logged."""
    lines = (job.workdir / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    evaluations = [
        (
            event["step"],
            {name.removeprefix("eval/"): value for name, value in event.items() if name.startswith("eval/")},
        )
        for event in events
        if event.get("eval/loss") is not None
    ]
    if trained.figures:
        evaluations = [each for each in evaluations if each[0] != trained.step] + [(trained.step, trained.figures)]
    attempts = read_attempts(job.workdir)
    return Outcome(
        trained,
        evaluations,
        attempts["seconds"],
        {name: median(events, f"train/{name}") for name in ("tokens_per_second", "mfu")},
        attempts["count"],
        peak=peak,
    )


def record_of(job: Job, outcome: Outcome) -> Record:
    """The record of a finished run, before its actions.

    cache counts bytes of one sequence of N tokens in generation. history has update and validation loss of each
    evaluation, and the accuracy of a task. target is None without train.stop_at_accuracy.
    """
    trained = outcome.trained
    config, device = trained.run.config, jax.devices()[0]
    model = config.model
    cache = cache_bytes_at(model, config.data.sequence_length)
    least, figures = config.train.stop_at_accuracy, dict(outcome.evaluations[-1][1])
    target = {"accuracy": least, "reached": figures.get("accuracy", 0) >= least}
    measured = ("loss", *(["accuracy"] if config.data.is_task else []))
    history = [[step, *(each[name] for name in measured)] for step, each in outcome.evaluations]
    return {
        "format": FORMAT,
        **{name: getattr(job, name) for name in ("name", "study", "sweep", "point", "overrides", "command")},
        "seed": config.train.seed,
        "version": tlinformer_jax.__version__,
        "jax": jax.__version__,
        "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
        "config": config.to_dict(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.params)),
        **({"active_parameters": active_parameters(model)} if model.mixture else {}),
        "steps": trained.step,
        "tokens": round(trained.step * tokens_of_step(config)),
        "seconds": {"wall": outcome.seconds},
        "attempts": outcome.attempts,
        "together": outcome.together,
        "speed": dict(outcome.speed),
        "peak_bytes": outcome.peak,
        "cache": {name: getattr(cache, name) for name in ("used", "allocated", "paper")}
        | {"dtype": model.compute_dtype.name},
        "validation": figures,
        "history": history,
        "target": target | {"most_steps": trained.run.horizon.steps} if least else None,
        "then": {},
    }


def tokens_of_step(config: RunConfig) -> float:
    """Tokens that an update is trained on; the expected number where windows are sampled."""
    train = config.train
    return train.batch_size * trained_tokens(config.model, config.data.sequence_length, train.sampled_windows)


def median(events: Sequence[dict[str, Any]], name: str) -> float | None:
    """The median of what was logged as `name`; None if nothing was."""
    values = [event[name] for event in events if event.get(name) is not None]
    return statistics.median(values) if values else None


@contextlib.contextmanager
def timed_attempt(workdir: pathlib.Path) -> Iterator[None]:
    """Adds the time of the body to attempts.json; an attempt that was killed counts until its last metrics."""
    found = read_attempts(workdir)
    seconds, metrics = found["seconds"], workdir / METRICS_FILE
    if found["since"] is not None and metrics.exists():
        seconds += max(0.0, metrics.stat().st_mtime - found["since"])
    _write_attempts(workdir, found["count"] + 1, seconds, time.time())
    started = time.perf_counter()
    try:
        yield
    finally:
        _write_attempts(workdir, found["count"] + 1, seconds + time.perf_counter() - started, None)


def _write_attempts(workdir: pathlib.Path, count: int, seconds: float, since: float | None) -> None:
    with writing(f"workdir {workdir}: {ATTEMPTS_FILE}"):
        text = json.dumps({"count": count, "seconds": seconds, "since": since})
        write_text(workdir / ATTEMPTS_FILE, text + "\n")


def read_attempts(workdir: pathlib.Path) -> dict[str, Any]:
    """Attempts so far: their count; seconds of those that ended; since, the start of one that was killed."""
    try:
        found = json.loads((workdir / ATTEMPTS_FILE).read_text(encoding="utf-8"))
        return {"count": int(found["count"]), "seconds": float(found["seconds"]), "since": found["since"]}
    except (OSError, ValueError, TypeError, KeyError):
        return {"count": 0, "seconds": 0.0, "since": None}
