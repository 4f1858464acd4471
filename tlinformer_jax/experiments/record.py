"""The record of a run that has just been trained: `result.json`."""

import itertools
import json
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import jax

import tlinformer_jax
from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.decoding.accounting import cache_bytes_at
from tlinformer_jax.experiments.job import Job
from tlinformer_jax.experiments.results import FORMAT
from tlinformer_jax.models.windows import trained_tokens
from tlinformer_jax.training.loop import Trained
from tlinformer_jax.training.metrics import METRICS_FILE

Events = Sequence[dict[str, Any]]


def record_of(job: Job, trained: Trained, wall_seconds: float, attempts: int, peak_bytes: int | None) -> dict[str, Any]:
    """All that the record says of a finished run, but for its actions.

    Args:
      job: as it was ordered.
      trained: what became of it, not stopped before its end.
      wall_seconds: of all attempts together.
      attempts: how often it was started.
      peak_bytes: most memory in use on the first device; None where it is not known.

    Returns:
      format; name, study, sweep, point, overrides, seed, command; version, jax; device (kind, platform, count);
      config, by section; parameters; steps; tokens, all that were trained on; seconds: `train`, of all steps at the
      logged speeds, without compilation and evaluation (None where none was logged), and `wall`, with all of them;
      attempts; speed: the median of the logged tokens_per_second and mfu (None where unknown); peak_bytes; cache: bytes
      of one sequence of N tokens, used, allocated, by the paper's formula (None where it has none), and the dtype;
      validation: the last figures; best: the step of the lowest validation loss, and that; history: pairs of step and
      validation loss; target: of a run that train.stop_at_accuracy can end, {accuracy, reached, most_steps}, else
      None: where it was not reached, most_steps have bound it; then: empty.
    """
    config, events = trained.run.config, read_events(job.workdir)
    history = loss_history(events)
    best = min(history, key=lambda pair: pair[1], default=(trained.step, None))
    device = jax.devices()[0]
    return {
        "format": FORMAT,
        "name": job.name,
        "study": job.study,
        "sweep": job.sweep,
        "point": job.point,
        "overrides": job.overrides,
        "seed": config.train.seed,
        "command": job.command,
        "version": tlinformer_jax.__version__,
        "jax": jax.__version__,
        "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
        "config": config.to_dict(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trained.params)),
        "steps": trained.step,
        "tokens": round(trained.step * tokens_of_step(config)),
        "seconds": {"train": train_seconds(events, tokens_of_step(config)), "wall": wall_seconds},
        "attempts": attempts,
        "speed": {name: median(events, f"train/{name}") for name in ("tokens_per_second", "mfu")},
        "peak_bytes": peak_bytes,
        "cache": cache(config),
        "validation": dict(trained.figures or {}),
        "best": {"step": best[0], "loss": best[1]},
        "history": [list(pair) for pair in history],
        "target": target(trained),
        "then": {},
    }


def target(trained: Trained) -> dict[str, Any] | None:
    """The accuracy that ends a run, whether it was reached, and the updates that end it otherwise."""
    least = trained.run.config.train.stop_at_accuracy
    if not least:
        return None
    reached = trained.figures is not None and trained.figures["accuracy"] >= least
    return {"accuracy": least, "reached": reached, "most_steps": trained.run.horizon.steps}


def tokens_of_step(config: RunConfig) -> float:
    """Tokens that a whole update is trained on; the expected number where windows are sampled."""
    train = config.train
    return train.batch_size * trained_tokens(config.model, config.data.sequence_length, train.sampled_windows)


def cache(config: RunConfig) -> dict[str, Any]:
    """What one sequence of N tokens takes in generation, in the compute dtype of this device."""
    found = cache_bytes_at(config.model, config.data.sequence_length)
    parts = {"used": found.used, "allocated": found.allocated, "paper": found.paper}
    return parts | {"dtype": config.model.compute_dtype.name}


def read_events(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The events of metrics.jsonl."""
    lines = (workdir / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def loss_history(events: Events) -> list[tuple[int, float]]:
    """Step and validation loss of every evaluation."""
    return [(event["step"], event["eval/loss"]) for event in events if event.get("eval/loss") is not None]


def median(events: Events, name: str) -> float | None:
    """The median of what was logged under a name; None if nothing was."""
    values = [event[name] for event in events if event.get(name) is not None]
    return statistics.median(values) if values else None


def train_seconds(events: Events, tokens: float) -> float | None:
    """Time of all logged steps of `tokens` tokens, each at the speed that was logged next.

    The first step, and the first after an interruption, have no speed of their own because they compile: they count
    at the median. None if no speed was logged.
    """
    middle = median(events, "train/tokens_per_second")
    if middle is None:
        return None
    logged = [event for event in events if "train/loss" in event]
    starts = itertools.chain([0], (event["step"] for event in logged))
    return sum(
        (event["step"] - start) * tokens / (event.get("train/tokens_per_second") or middle)
        for start, event in zip(starts, logged)
    )
