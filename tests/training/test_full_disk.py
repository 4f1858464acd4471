"""A disk that is full, or that takes no writing at all: named in one line, nothing lost, nothing waits for ever."""

import contextlib
import pathlib
import resource
import subprocess

import pytest

from tests.support import bad_files
from tests.support.commands import check_refusal, command
from tlinformer_jax.errors import DataError
from tlinformer_jax.training.metrics import MetricsLog
from tlinformer_jax.training.workdir import LOCK_FILE, sole_run
from tools.fault_check import final_state, log_difference, logged, state_difference


@contextlib.contextmanager
def no_file_above(size: int):
    """Writes beyond `size` bytes fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_metrics_that_cannot_be_written_are_an_error_at_once(tmp_path):
    def write_on() -> None:
        with no_file_above(4096), MetricsLog(tmp_path) as log:
            for step in range(1000):
                log.write(step, {"train/loss": 1.5})

    with pytest.raises(DataError, match=r"(metrics\.jsonl|tensorboard) cannot be written \(File too large\)"):
        write_on()
    assert (tmp_path / "metrics.jsonl").stat().st_size <= 4096


def test_tensorboard_does_not_wait_for_a_disk_that_is_full(tmp_path):
    def write_on() -> None:
        with no_file_above(4096), MetricsLog(tmp_path) as log:
            for step in range(1000):
                log.write(step, {})  # without values an event takes more bytes than its JSON line
                log.sync()

    with pytest.raises(DataError, match=r"tensorboard cannot be written \(File too large\)"):
        write_on()


def test_a_lock_that_cannot_be_written_is_an_error(tmp_path):
    with no_file_above(0), pytest.raises(DataError, match=r"\.lock cannot be written"), sole_run(tmp_path):
        pass
    with sole_run(tmp_path):
        assert "process" in (tmp_path / LOCK_FILE).read_text()


def occupied(folder: pathlib.Path) -> int:
    """Bytes on the disk of all files."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))


def mounted(folder: pathlib.Path, options: str) -> bool:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    return done.returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mounted(folder, "size=64k"):
        pytest.skip("a file system of a limited size takes the right to mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_run_on_a_full_disk_goes_on_where_it_was_once_there_is_room(tmp_path, small_disk):
    bad_files.write_files(tmp_path)
    train = ["tlinformer_jax.main", f"--config={tmp_path}/small.py", "--config.train.steps=8"]
    train += ["--config.train.log_every=1", "--config.train.keep_checkpoints=1"]
    train += ["--config.model.architecture=transformer"]  # is soon traced
    whole, run = tmp_path / "whole", small_disk / "run"
    done = command(*train, f"--workdir={whole}")
    assert done.returncode == 0, done.stderr
    room = occupied(whole / "checkpoints" / "8")

    assert mounted(small_disk, f"remount,size={int(1.75 * room)}")  # the first checkpoint fits, no second one beside it
    full = command(*train, f"--workdir={run}")
    assert full.returncode == 2, full.stderr
    assert "Traceback" not in full.stderr
    assert full.stderr.splitlines()[-1].startswith(f"error: checkpoint {run}/checkpoints/4.saving: cannot be written")
    assert "No space left on device" in full.stderr

    assert mounted(small_disk, f"remount,size={8 * room}")
    done = command(*train, f"--workdir={run}")
    assert done.returncode == 0, done.stderr
    assert "continuing from step 2" in done.stderr
    assert log_difference(logged(whole), logged(run)) is None
    assert state_difference(final_state(whole), final_state(run)) is None

    assert mounted(small_disk, "remount,ro")
    check_refusal(command(*train, f"--workdir={run}"), f"--workdir={run}: must be a directory that can be written")
    evaluated = command("evaluate", f"--workdir={run}")
    assert evaluated.returncode == 0, evaluated.stderr
    assert mounted(small_disk, "remount,rw")
