"""The scripts of launch/: what they would run, what they refuse, and a Cloud TPU slice that is taken away."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.support.commands import ROOT, check_refusal
from tests.support.optional import need

TRAIN = ("--config=configs/tiny.py", "--workdir=runs/a b")
SLICE = ("--name=tlin", "--zone=us-west4-a")
SCRIPTS = ("gpu.sh", "tpu_pod.sh", "slurm/train.sbatch", "slurm/sweep.sbatch")


def launch(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    environment = kept | {"PYTHON": sys.executable} | variables
    line = [str(ROOT / "launch" / script), *arguments]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=60)


def shown(script: str, *arguments: str) -> list[str]:
    """The commands that a script prints with --dry_run."""
    result = launch(script, "--dry_run", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_dry_runs_of_one_box_and_slurm():
    module = f"{sys.executable} -m tlinformer_jax"
    (line,) = shown("gpu.sh", "--gpus=0,2", *TRAIN)
    assert line.startswith("env JAX_PLATFORMS=cuda ")
    assert r"CUDA_VISIBLE_DEVICES=0\,2" in line
    assert line.endswith(rf"{module}.main --num_processes=1 --config=configs/tiny.py --workdir=runs/a\ b")
    (line,) = shown("gpu.sh", "--config=configs/tiny.py", "--check")
    assert line.endswith(f"{module}.main --num_processes=1 --config=configs/tiny.py --check")
    (line,) = shown("slurm/train.sbatch", *TRAIN)
    assert line == rf"srun --kill-on-bad-exit=1 {module}.main --config=configs/tiny.py --workdir=runs/a\ b"
    (line,) = shown("slurm/sweep.sbatch", "--sweep=a.py", "--out=b")
    assert line == f"srun --kill-on-bad-exit=1 {module} sweep --point=0 --sweep=a.py --out=b"


def test_dry_run_of_a_tpu_slice_in_order():
    lines = shown("tpu_pod.sh", "resume", *SLICE, "--type=v5litepod-16", "--spot", "--nfs=10.0.0.2:/runs", "--", *TRAIN)
    assert [line.split()[4] for line in lines if line.startswith("gcloud")] == ["create", "scp", "ssh", "ssh"]
    assert "--accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite --spot" in lines[0]
    assert all("--worker=all" in line for line in lines[2:])
    assert r"mount\ -t\ nfs\ 10.0.0.2:/runs\ /mnt/runs" in lines[3]
    # Quoted twice: for the local shell that the line is shown for, and for the remote one.
    assert r"tlinformer_jax.main\ --config=configs/tiny.py\ --workdir=runs/a\\\ b" in lines[4]
    (line,) = shown("tpu_pod.sh", "delete", *SLICE, "--project=p")
    assert line == "gcloud compute tpus tpu-vm delete tlin --zone=us-west4-a --quiet --project=p"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("gpu.sh", "--config=a"), "--workdir=...: missing"),
        (("gpu.sh", "--gpus=all", *TRAIN), "--gpus=all: must be numbers"),
        (("slurm/train.sbatch", "--workdir=a"), "--config=...: missing"),
        (("slurm/train.sbatch", *TRAIN), "SLURM_JOB_ID is not set"),
        (("slurm/sweep.sbatch", "--sweep=a"), "--out=...: missing"),
        (("slurm/sweep.sbatch", "--sweep=a", "--out=b"), "SLURM_ARRAY_TASK_ID is not set"),
        (("tpu_pod.sh", *SLICE), "a command is missing"),
        (("tpu_pod.sh", "create", "delete", *SLICE), "create delete: give one of"),
        (("tpu_pod.sh", "create", "--zone=z", "--name=A_b"), "--name=A_b: must be"),
        (("tpu_pod.sh", "create", *SLICE), "--type=...: missing"),
        (("tpu_pod.sh", "run", *SLICE, "--config=a"), "--config=a: not known"),
        (("tpu_pod.sh", "run", *SLICE, "--", "--config=a"), "--workdir=...: missing"),
        (("tpu_pod.sh", "delete", *SLICE, "--", "x"), "takes nothing after --"),
        (("tpu_pod.sh", "setup", *SLICE, "--nfs=runs"), "--nfs=runs: must be SERVER:/SHARE"),
    ],
)
def test_mistakes_are_one_line_and_status_2(line, message):
    check_refusal(launch(*line), message)


def test_a_python_that_is_not_there_is_named():
    check_refusal(launch("gpu.sh", "--dry_run", *TRAIN, PYTHON="/no/python"), "PYTHON=/no/python: must be")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_head_of_the_script(script):
    result = launch(script, "--help")
    assert result.returncode == 0
    assert f"launch/{script}" in result.stdout
    assert "--dry_run" in result.stdout
    assert "#" not in result.stdout[:3]
    assert "set -euo" not in result.stdout


# A gcloud that remembers what it was asked. The slice's state is a file; training takes the slice away the first time.
GCLOUD = """#!/usr/bin/env bash
cd "$FAKE"
echo "$4 $*" >> calls
case "$4" in
  describe) cat state 2>/dev/null || exit 1 ;;
  create)
    if [[ -e no_room ]]; then rm no_room; exit 1; fi
    echo READY > state
    ;;
  delete) rm state ;;
  ssh)
    [[ "$*" == *tlinformer_jax.main* ]] || exit 0
    if [[ -e broken ]]; then exit 7; fi
    if [[ ! -e preempted ]]; then touch preempted; echo PREEMPTED > state; exit 255; fi
    ;;
esac
"""


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "gcloud").write_text(GCLOUD)
    (folder / "gcloud").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(tmp_path))
    return tmp_path


def asked(cloud) -> list[str]:
    """The subcommands that the cloud was asked for, without questions about its state."""
    words = (line.split()[0] for line in (cloud / "calls").read_text().splitlines())
    return [word for word in words if word != "describe"]


def test_a_slice_that_is_taken_away_comes_back_and_the_run_goes_on(cloud):
    (cloud / "no_room").touch()
    result = launch("tpu_pod.sh", "resume", *SLICE, "--type=v5litepod-16", "--retry=0", "--", *TRAIN)
    assert result.returncode == 0, result.stderr
    once = ["create", "scp", "ssh", "ssh"]
    assert asked(cloud) == ["create", *once, "delete", *once]
    assert "was taken away" in result.stderr


@pytest.mark.parametrize("folder", ["", "/mnt/runs/a b$c"])
def test_the_workers_get_the_cache_folder_if_it_is_set(folder, cloud, tmp_path):
    """The remote command as gcloud was given it, run by a shell whose Python prints its environment."""
    (cloud / "preempted").touch()
    result = launch("tpu_pod.sh", "run", *SLICE, "--", *TRAIN, TLINFORMER_CACHE=folder)
    assert result.returncode == 0, result.stderr
    (line,) = (cloud / "calls").read_text().splitlines()
    remote = line.split("--command=")[1].split(" --zone=")[0]
    python = tmp_path / "tlinformer_jax" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "${TLINFORMER_CACHE-unset}" "$4"\n')
    python.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name != "TLINFORMER_CACHE"}
    done = subprocess.run(["bash", "-c", remote], cwd=tmp_path, env=kept, capture_output=True, text=True, check=True)
    assert done.stdout == f"{folder or 'unset'} --workdir=runs/a b\n"


def test_a_command_that_fails_on_a_slice_that_is_well_ends_it(cloud):
    (cloud / "broken").touch()
    result = launch("tpu_pod.sh", "resume", *SLICE, "--type=v5litepod-16", "--retry=0", "--", *TRAIN)
    assert result.returncode == 7
    assert asked(cloud) == ["create", "scp", "ssh", "ssh"]


def test_shellcheck():
    need([name for name in ("shellcheck",) if shutil.which(name) is None], "apt-get install shellcheck")
    files = [path for pattern in ("*.sh", "slurm/*") for path in sorted((ROOT / "launch").glob(pattern))]
    assert len(files) == 6
    line = ["shellcheck", "--external-sources", *map(str, files), str(ROOT / ".ci/run")]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stdout
