"""The job scripts on a real SLURM of two nodes, which the test sets up on this machine."""

import json
import re
import sys
import time

import pytest

from tests.launch.cluster import missing_programs, running_cluster
from tests.support.commands import ROOT, TEXT, command_line
from tests.support.optional import need
from tests.support.processes import SMALL, saved_steps

SOON = 120  # seconds that a job may take for its next step


@pytest.fixture(scope="module")
def cluster():
    need(missing_programs(), "apt-get install slurm-wlm munge")
    with running_cluster() as cluster:
        yield cluster


def submit(cluster, folder, *line: str) -> str:
    """Submits a job from the repository's root, as a user does; returns what sbatch prints. Output: folder/*.out."""
    _, environment = command_line("")
    settings = {name: environment[name] for name in ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")}
    output = f"--output={folder}/%A-%a.out"
    return cluster.command(
        "sbatch", "--parsable", output, *line, cwd=ROOT, timeout=1200, PYTHON=sys.executable, NPROC="8", **settings
    )


def told(folder) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.glob("*.out")))


def wait_until(cluster, folder, condition, what: str, seconds: float = SOON) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not seen in {seconds} s: {what}\n{told(folder)}\n{cluster.logs()}"
        time.sleep(0.5)


def run(cluster, folder, *line: str) -> None:
    """Submits a job, waits until it is done and no longer: `sbatch --wait` looks ever more seldom."""
    job = submit(cluster, folder, *line).strip()
    wait_until(cluster, folder, lambda: not cluster.command("squeue", "--noheader"), "the end", seconds=1200)
    states = re.findall(r"JobState=(\w+)", cluster.command("scontrol", "show", "job", job))
    assert set(states) == {"COMPLETED"}, f"{states}\n{told(folder)}\n{cluster.logs()}"


def logged_steps(workdir) -> list[int]:
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.long
def test_two_tasks_on_two_nodes_train_to_the_end(cluster, tmp_path):
    workdir = tmp_path / "run"
    arguments = (*SMALL, "--config.train.steps=6", "--config.train.mesh=fsdp=2")
    script = ("--nodes=2", "--ntasks-per-node=1", "launch/slurm/train.sbatch")
    run(cluster, tmp_path, *script, *arguments, f"--workdir={workdir}")
    output = told(tmp_path)
    assert "2 x cpu" in output, output
    assert logged_steps(workdir)[:6] == [1, 2, 3, 4, 5, 6]
    assert saved_steps(workdir)[-1] == 6


@pytest.mark.slow
@pytest.mark.long
def test_a_job_whose_time_is_nearly_over_saves_and_goes_on_after_the_queue(cluster, tmp_path):
    workdir = tmp_path / "run"
    arguments = (*SMALL, "--config.train.steps=1000000", f"--workdir={workdir}")
    script = ("--nodes=2", "--ntasks-per-node=1", "launch/slurm/train.sbatch")
    job = submit(cluster, tmp_path, *script, *arguments).strip()
    wait_until(cluster, tmp_path, lambda: "step 3/" in told(tmp_path), "step 3")
    cluster.command("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@300 does
    wait_until(cluster, tmp_path, lambda: "into the queue again" in told(tmp_path), "the requeue")
    (saved,) = saved_steps(workdir)
    assert f"stopped after step {saved}, as requested" in told(tmp_path)
    wait_until(cluster, tmp_path, lambda: f"continuing from step {saved} " in told(tmp_path), "the second start")
    wait_until(cluster, tmp_path, lambda: logged_steps(workdir)[-1] > saved + 2, "further steps")
    # A preemption as SLURM does it: SIGTERM to the steps, and time to end.
    cluster.command("scancel", job)
    wait_until(cluster, tmp_path, lambda: not cluster.command("squeue", "--noheader"), "the end")
    assert told(tmp_path).count("stopped after step") == 2
    last = saved_steps(workdir)[-1]
    assert last > saved
    assert logged_steps(workdir) == list(range(1, last + 1))


@pytest.mark.slow
@pytest.mark.long
def test_a_job_array_trains_all_points_of_a_sweep(cluster, tmp_path):
    out = tmp_path / "sweep"
    arguments = ("--sweep=configs/sweep_windows.py:tiny", f"--out={out}", "--config.train.steps=4", "--then=", *TEXT)
    run(cluster, tmp_path, "--array=0-3%2", "launch/slurm/sweep.sbatch", *arguments)
    assert len(json.loads((out / "sweep.json").read_text())) == 4, told(tmp_path)
    for point in ("8-24", "16-16", "24-8", "auto-16"):
        assert logged_steps(out / f"{point}-seed0")[-1] == 4
        assert json.loads((out / f"{point}-seed0" / "result.json").read_text())["name"] == f"{point}-seed0"
