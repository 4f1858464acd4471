"""Trains the points of a sweep: `python -m tlinformer_jax sweep --sweep=FILE[:VARIANT] --out=DIR`.

Each point has its own folder in DIR and its own process. Finished points are skipped, and interrupted ones continue
from their checkpoints: after a kill, the same command does the rest. After each point, sweep.csv, sweep.json and
sweep.md in DIR describe all finished points; plots are drawn at the end. The status is 1 if a point has failed. In a
job array, --point=$SLURM_ARRAY_TASK_ID trains one point; with --points=N, job K trains every N-th. With --together,
points that differ only in seed and learning rate share a process and a program, which is faster for small models.

`python -m tlinformer_jax.commands.sweep` is the process of one point, which `job.run_in_process` starts.
"""

import contextlib
import dataclasses
import fcntl
import functools
import importlib.util
import json
import os
import pathlib
import re
import shlex
import sys
import threading
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from tlinformer_jax.commands import cli
from tlinformer_jax.config.named import add_defaults
from tlinformer_jax.config.train import LARGEST_SEED
from tlinformer_jax.errors import UserError
from tlinformer_jax.experiments.actions import checked_actions
from tlinformer_jax.experiments.job import STOPPED, Job, Record, finished_result, record_of_job, run_jobs, write_result
from tlinformer_jax.experiments.plan import (
    SEED,
    Sweep,
    check_actions,
    check_data,
    check_together,
    chosen_points,
    groups_of,
    load_sweep,
    plan_points,
)
from tlinformer_jax.files import local_path, open_own

SWEEP = flags.DEFINE_string(
    "sweep", "", "Sweep file, or the name of one of the package's; NAME:VARIANT picks a variant."
)
OUT = flags.DEFINE_string("out", "", "Directory of the sweep: a working directory for each point, tables, plots.")
POINT = flags.DEFINE_integer("point", None, "Number of this job in a job array, from 0.")
POINTS = flags.DEFINE_integer("points", None, "Jobs in the job array; as many as points if not given.")
SEEDS = flags.DEFINE_list("seeds", None, "Seeds of the points that set none; those of the file if not given.")
TOGETHER = flags.DEFINE_bool(
    "together",
    False,
    "Train points that differ only in seed and learning rate as one program, without checkpoints.",
)
RETRIES = flags.DEFINE_integer("retries", 1, "How often a failed point is tried again.", lower_bound=0)
THEN = flags.DEFINE_list(
    "then",
    None,
    "Actions after each training: evaluate, evaluate@LENGTH, samples, history, history@LENGTH; history is left out "
    "where samples fit into one window.",
)
RESULTS = flags.DEFINE_string("results", "", "Directory that also gets the record of each finished point, NAME.json.")
CHECK = flags.DEFINE_bool(
    "check", False, "Check all points and list them with updates, parameters and tokens; train nothing."
)


def main() -> None:
    """Checks all points, trains the unfinished ones, and writes the tables."""
    sweep = load_sweep(SWEEP.value)
    if SEEDS.value is not None:
        sweep = dataclasses.replace(sweep, seeds=cli.integers(SEEDS, most=LARGEST_SEED))
    then = checked_actions(sweep.then, "Sweep.then") if THEN.value is None else checked_actions(THEN.value)
    base = _base(sweep)
    points = plan_points(dataclasses.replace(sweep, then=then), base)
    groups = groups_of(points) if TOGETHER.value else [[point] for point in points]
    chosen = chosen_points(groups, POINT.value, POINTS.value)
    _check(chosen)
    if CHECK.value:
        # JAX is imported here, because a sweep that trains must not import it. A run may use the accelerators.
        import jax

        from tlinformer_jax.experiments.listing import list_points

        jax.config.update("jax_platforms", "cpu")
        check_actions(point for group in chosen for point in group)
        cli.print_result(list_points(groups, base))
        return
    if importlib.util.find_spec("pandas") is None:  # checked before anything is trained
        raise UserError("the tables of a sweep need pandas: pip install 'tlinformer-jax[report]'")
    from tlinformer_jax.experiments.figures import plot_sweep
    from tlinformer_jax.experiments.frame import frame_of

    if RESULTS.value:
        local_path(RESULTS.value, "--results")  # checked before any folder is created
    out = cli.writable_workdir(OUT.value, "--out")
    results = cli.writable_workdir(RESULTS.value, "--results") if RESULTS.value else None
    command = shlex.join(["python", "-m", "tlinformer_jax", "sweep", *sys.argv[1:]])
    stem = pathlib.Path(SWEEP.value.partition(":")[0]).stem

    def placed(points: list[Job]) -> list[Job]:
        return [dataclasses.replace(point, workdir=out / point.name, command=command, sweep=stem) for point in points]

    every = placed(points)
    for point in every:
        finished_result(point)  # raises now if a directory holds another run: the tables are of all points
        if results is not None:
            record_of_job(results / f"{point.name}.json", point)  # raises rather than replace another run's record
    write = functools.partial(_write, every, out, results)
    failures = run_jobs([placed(group) for group in chosen], RETRIES.value, finished=write)
    done = write()
    print((out / "sweep.md").read_text(encoding="utf-8"), end="", flush=True)
    if done:
        try:
            plot_sweep(frame_of(done), out)
        except ImportError as error:
            print(f"no plots: {error}; pip install 'tlinformer-jax[report]'", file=sys.stderr)
    if failures:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in failures.items())
        cli.fail(f"{len(failures)} of {sum(map(len, chosen))} points failed: {reasons}", 1)


def define_flags() -> None:
    """Defines flags --config.FIELD=VALUE that change the base of the sweep that the command line names.

    This comes before the flags are parsed, because the sweep decides which fields there are.
    """
    if any(re.match(r"--?config(=|$)", argument) for argument in sys.argv[1:]):
        cli.fail("--config: must be left out; --config.SECTION.FIELD=VALUE changes the sweep's own configuration")
    if not any(re.match(r"--?config\.", argument) for argument in sys.argv[1:]):
        return
    named = [argument.partition("=")[2] for argument in sys.argv if re.match(r"--?sweep=", argument)]
    if not named:
        cli.fail("--sweep: must be given as --sweep=FILE beside --config.SECTION.FIELD=VALUE")
    try:
        config = ConfigDict(load_sweep(named[-1]).base)
        add_defaults(config)
        config_flags.DEFINE_config_dict("config", config, lock_config=True)
    except Exception as error:  # ml_collections raises various types for an unknown field
        cli.fail(str(error) if isinstance(error, UserError) else cli.describe(error, sys.argv))


def _check(groups: list[list[Job]]) -> None:
    """Checks that the data exist, and that one program can train each group; raises a UserError if not."""
    check_data([point for group in groups for point in group])
    for group in groups:
        if len(group) > 1:
            try:
                check_together(group[0].config)
            except UserError as error:
                raise UserError(f"point {group[0].name}: {error}") from None


def _base(sweep: Sweep) -> Any:
    """Returns the sweep's base with the command line's changes."""
    if "config" not in flags.FLAGS:
        return sweep.base
    for field in config_flags.get_override_values(flags.FLAGS["config"]):
        if field == SEED:
            raise UserError(f"--config.{field}: a sweep has several seeds; --seeds changes them")
        for name, overrides in sweep.points.items():
            if field in overrides:
                raise UserError(f"--config.{field}: point {name} sets this field itself")
    return flags.FLAGS.config


def _write(jobs: list[Job], out: pathlib.Path, results: pathlib.Path | None) -> list[Record]:
    """Writes the tables of all finished jobs, copies their records, and returns these."""
    from tlinformer_jax.experiments.report import write_tables  # needs pandas

    with open_own(out / ".tables.lock", "a") as lock:  # jobs of an array may finish at the same time
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        done = [result for result in map(finished_result, jobs) if result is not None]
        if results is not None:
            for result in done:
                write_result(results / f"{result['name']}.json", result)
        write_tables(done, out)
    return done


def train_point() -> None:
    """Trains the jobs on the first line of stdin; exits with `STOPPED` if a signal has stopped the training.

    The sweep holds the other end of stdin. When it closes, the sweep has ended, and this process ends too, so that its
    directory is free for the next sweep.
    """
    line = sys.stdin.buffer.readline()
    threading.Thread(target=_end_with_starter, daemon=True).start()

    from tlinformer_jax.experiments.driver import run_job
    from tlinformer_jax.training.setup import use_compilation_cache

    use_compilation_cache()
    jobs = [Job.from_json(text) for text in json.loads(line)]
    if len(jobs) > 1:
        from tlinformer_jax.experiments.together import train_together

        train_together(jobs)
    elif run_job(jobs[0]) is None:
        sys.exit(STOPPED)


def _end_with_starter() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


if __name__ == "__main__":
    cli.run(train_point)
