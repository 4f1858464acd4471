"""Sweeps: a base configuration and named points, each of which changes some fields. Does not use JAX."""

import collections
import dataclasses
import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ml_collections import ConfigDict

from tlinformer_jax.config.named import load_python
from tlinformer_jax.config.run import SECTIONS, RunConfig, run_config, unknown_field
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.sources import find_split
from tlinformer_jax.data.tokenizers import build_tokenizer, check_vocab
from tlinformer_jax.errors import ConfigError, UserError
from tlinformer_jax.experiments.actions import check_possible, possible_actions
from tlinformer_jax.experiments.job import Job, flat

# The report's section for a sweep: comparison with Base at the same N, by window sizes, or by accuracy.
STUDIES = ("architectures", "windows", "retrieval")
SEED = "train.seed"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The result of the function `get_sweep` in a sweep file."""

    # As returned by a config file's `get_config`; the command's flags may change it.
    base: Mapping[str, Any]
    # Name -> fields that differ from the base, such as {"model.history_window": 128}; 'train.seed' may list the point's
    # own seeds.
    points: Mapping[str, Mapping[str, Any]]
    seeds: Sequence[int] = (0,)  # for all other points; each point is trained once with every seed
    # Names of `experiments.actions` to perform after each training; `history` where samples have one.
    then: Sequence[str] = ()
    study: str = "windows"


def load_sweep(where: str) -> Sweep:
    """Loads a sweep from a Python file, `FILE.py` or `FILE.py:VARIANT`, or a sweep of the package by name."""
    sweep, what = load_python(where, "--sweep", "get_sweep"), f"--sweep={where}"
    if not isinstance(sweep, Sweep):
        raise UserError(f"{what}: get_sweep must return a Sweep, not {type(sweep).__name__}")
    if not hasattr(sweep.base, "items"):
        raise UserError(f"{what}: Sweep.base must be a ConfigDict, not {type(sweep.base).__name__}")
    if not isinstance(sweep.points, Mapping) or not sweep.points:
        raise UserError(f"{what}: Sweep.points must name at least one point")
    for name, overrides in sweep.points.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.+-]*", name, re.ASCII):
            raise UserError(
                f"{what}: point {name!r}: must be letters, digits, '.', '_', '+' and '-', because it names a folder"
            )
        if not isinstance(overrides, Mapping):
            raise UserError(f"{what}: point {name}: must be a dictionary of fields, not {type(overrides).__name__}")
    if not isinstance(sweep.seeds, list | tuple) or not sweep.seeds:
        raise UserError(f"{what}: Sweep.seeds must be a list of at least one integer")
    if sweep.study not in STUDIES:
        raise UserError(f"{what}: Sweep.study = {sweep.study!r}: must be one of {', '.join(STUDIES)}")
    return sweep


def plan_points(sweep: Sweep, base: Mapping[str, Any] | None = None) -> list[Job]:
    """Returns all runs of a sweep in order, named POINT-seedSEED; `base` replaces the sweep's own."""
    base = sweep.base if base is None else base
    points: list[Job] = []
    for name, overrides in sweep.points.items():
        fields = dict(overrides)
        seeds = fields.pop(SEED, sweep.seeds)
        seeds = seeds if isinstance(seeds, list | tuple) else (seeds,)
        if not seeds:
            raise UserError(f"point {name}: train.seed must hold at least one seed")
        try:
            configs = [run_config(_changed(base, {**fields, SEED: seed})) for seed in seeds]
        except UserError as error:
            raise UserError(f"point {name}: {error}") from None
        for seed, config in zip(seeds, configs):
            then = possible_actions(sweep.then, config)
            points.append(Job(f"{name}-seed{seed}", config, then=then, study=sweep.study, point=name, overrides=fields))
    (name, times), *_ = collections.Counter(point.name for point in points).most_common(1)
    if times > 1:
        raise UserError(f"point {name}: occurs twice; names and seeds must differ")
    return points


def check_data(points: Iterable[Job]) -> None:
    """Checks that all points' tokenizers and files exist and fit the vocabularies; raises a UserError if not."""

    def check(point: Job) -> None:
        data = point.config.data
        tokenizer = build_tokenizer(data.tokenizer)
        check_vocab(tokenizer, point.config.model.vocab_size)
        for split in ("train", "validation", *(["test"] if data.test_files else [])):
            find_split(data, split, tokenizer)

    _check_each(points, lambda point: (point.config.data, point.config.model.vocab_size), check)


def check_actions(points: Iterable[Job]) -> None:
    """Checks that models and data allow the points' actions; raises a UserError if not.

    Texts that are not tokenised yet are not checked. The action `history` needs JAX, which is then imported.
    """
    _check_each(
        points,
        lambda point: (point.then, point.config.data, point.config.model),
        lambda point: check_possible(point.then, point.config, find_split),
    )


def _check_each(points: Iterable[Job], key: Callable[[Job], Hashable], check: Callable[[Job], None]) -> None:
    """Checks one point for each different key; names the point in the error."""
    different: dict[Hashable, Job] = {}
    for point in points:
        different.setdefault(key(point), point)
    for point in different.values():
        try:
            check(point)
        except UserError as error:
            raise UserError(f"point {point.name}: {error}") from None


def groups_of(points: Sequence[Job]) -> list[list[Job]]:
    """Groups jobs that differ only in seed and learning rate, which one program can train."""
    groups: dict[RunConfig, list[Job]] = {}
    for point in points:
        train = dataclasses.replace(point.config.train, seed=0, learning_rate=0.0)
        groups.setdefault(dataclasses.replace(point.config, train=train), []).append(point)
    return list(groups.values())


def check_together(config: RunConfig) -> None:
    """Checks that runs with this configuration can be trained together; raises a ConfigError if not."""
    train, data = config.train, config.data
    if any(stage.accuracy for stage in data.stages):
        allowed = "must have no stage that ends by accuracy for --together: runs change length at the same update"
        raise ConfigError("data.curriculum", data.curriculum, allowed)
    for name in ("accumulation", "sampled_windows", "ema", "max_skipped_updates"):
        only = TrainConfig.__dataclass_fields__[name].default
        if getattr(train, name) != only:
            raise ConfigError(f"train.{name}", getattr(train, name), f"must be {only} for --together")
    if config.model.dropout:
        raise ConfigError("model.dropout", config.model.dropout, "must be 0 for --together")
    if train.schedule == "paper" or train.eval_every == "epoch" or train.epochs:
        allowed = "must be updates, with train.eval_every in updates and another schedule than 'paper', for --together"
        raise ConfigError("train.steps", train.steps, allowed)


def chosen_points(points: Sequence[T], job: int | None, jobs: int | None) -> list[T]:
    """Returns the points, or groups, of job `job` (from 0; None: all) of `jobs` jobs (None: as many as points)."""
    if job is None:
        if jobs is not None:
            raise UserError("--points: needs --point, the number of this job")
        return list(points)
    jobs = len(points) if jobs is None else jobs
    if not 1 <= jobs <= len(points):
        raise UserError(f"--points={jobs}: must be 1 .. {len(points)}, the points of the sweep with their seeds")
    if not 0 <= job < jobs:
        raise UserError(f"--point={job}: must be 0 .. {jobs - 1}")
    return list(points[job::jobs])


def overrides_between(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields in which `other` differs from `base`, in the form of a point."""
    before = flat(base)
    return {path: value for path, value in flat(other).items() if path not in before or before[path] != value}


def _changed(base: Mapping[str, Any], fields: Mapping[str, Any]) -> ConfigDict:
    """Returns the base with some fields, such as 'model.history_window', changed."""
    for path, value in fields.items():
        if missing := unknown_field(path):
            raise ConfigError(path, value, missing)
    config = ConfigDict({section: {} for section in SECTIONS} | ConfigDict(base).to_dict(), type_safe=False)
    config.update_from_flattened_dict(fields)
    return config
