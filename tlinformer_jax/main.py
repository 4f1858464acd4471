"""Trains a model: `python -m tlinformer_jax.main --config=FILE --workdir=DIR [--config.FIELD=VALUE ...]`.

With --check instead of --workdir it only prints what the run needs, or why it cannot start. Several processes run
together if SLURM, Open MPI, Kubernetes or a TPU pod starts them, or with --coordinator_address, --num_processes and
--process_id.
"""

import contextlib
import os
import pathlib
import shlex
import sys
from typing import TYPE_CHECKING

from absl import flags

from tlinformer_jax.commands import cli
from tlinformer_jax.config.run import RunConfig, run_config
from tlinformer_jax.errors import UserError
from tlinformer_jax.files import local_path

if TYPE_CHECKING:
    from tlinformer_jax.parallel.processes import Cluster

cli.define_config_flag()
WORKDIR = flags.DEFINE_string("workdir", "", "Directory of the run: configuration, metrics, checkpoints.")
CHECK = flags.DEFINE_bool("check", False, "Check the configuration, print what the run needs, write nothing.")
CHECK_COMPILE = flags.DEFINE_bool("check_compile", False, "Like --check, but also compile a step and print its memory.")
INIT_FROM = flags.DEFINE_string("init_from", None, "Working directory whose parameters a new run starts from.")
THEN = flags.DEFINE_list(
    "then",
    None,
    "Write result.json, then do: evaluate, evaluate@LENGTH, samples, history, history@LENGTH; none if empty.",
)
cli.define_process_flags()
PROFILE = flags.DEFINE_string("profile", "", "Directory for a trace of a few training steps, for xprof.")


def main() -> None:
    """Checks the whole configuration, then trains, unless only a check was requested."""
    # First the checks that do not need JAX, which takes seconds to import.
    cluster = cli.cluster()
    config = run_config(cli.config_values())
    for flag in (INIT_FROM, PROFILE):
        if flag.value:
            local_path(flag.value, f"--{flag.name}")
    if THEN.value is not None and cluster is not None:
        raise UserError(f"--then={','.join(THEN.value)}: works only with one process")
    if CHECK.value or CHECK_COMPILE.value:
        _check(config)
        return
    named = [local_path(flag.value, f"--{flag.name}") for flag in (WORKDIR, PROFILE) if flag.value]
    missing = [folder for folder in named if not os.path.lexists(folder)]
    try:
        workdir = cli.writable_workdir(WORKDIR.value)
        profile = cli.writable_workdir(PROFILE.value, "--profile") if PROFILE.value else None
        _train(config, workdir, profile, cluster)
    except UserError:
        for folder in sorted(missing, reverse=True):  # a folder before the one that contains it
            with contextlib.suppress(OSError):  # the folder is not empty, or was not made
                folder.rmdir()
        raise


def _train(config: RunConfig, workdir: pathlib.Path, profile: pathlib.Path | None, cluster: "Cluster | None") -> None:
    """Trains; with --then also writes result.json into the working directory, and performs the actions of --then."""
    if THEN.value is None:
        from tlinformer_jax.commands.prepare import prepare
        from tlinformer_jax.parallel.processes import joined
        from tlinformer_jax.training.loop import train_and_evaluate

        if cluster is not None:
            # Before joining, which waits only a limited time for all processes, and leaves SIGTERM to JAX.
            list(prepare(config.data, config.model.vocab_size))
        with joined(cluster):
            train_and_evaluate(config, workdir, profile, INIT_FROM.value)
        return
    from tlinformer_jax.experiments.driver import run_job
    from tlinformer_jax.experiments.job import Job

    command = shlex.join(["python", "-m", "tlinformer_jax.main", *sys.argv[1:]])
    run_job(Job(workdir.name, config, workdir, command, tuple(THEN.value)), profile, INIT_FROM.value)


def _check(config: RunConfig) -> None:
    from tlinformer_jax.data.sources import find_split
    from tlinformer_jax.experiments.actions import check_possible, checked_actions
    from tlinformer_jax.training.check import check_run
    from tlinformer_jax.training.device_memory import memory_advice
    from tlinformer_jax.training.workdir import Origin, check_origin

    if INIT_FROM.value is not None:
        check_origin(Origin(local_path(INIT_FROM.value, "--init_from")), config)
    check_possible(checked_actions(THEN.value or ()), config, find_split)
    with memory_advice():
        cli.print_result(check_run(config, CHECK_COMPILE.value))


if __name__ == "__main__":
    cli.run(main)
