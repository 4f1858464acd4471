"""SIGTERM and Ctrl-C while text is tokenised: one line, a status, nothing left behind, and a rerun that works."""

import os
import signal
import subprocess
import sys

import pytest

from tests.support.commands import ROOT, TEXT, command, command_line, run_line

# The text comes slowly, so that there is time to interrupt.
SLOWLY = """
import sys, time
from tlinformer_jax.data import streams
groups = streams.group_pieces
def slowly(pieces):
    for number, group in enumerate(groups(pieces)):
        if number == 20:
            print("under way", file=sys.stderr, flush=True)
        time.sleep(0.3 if number > 20 else 0)
        yield group
streams.group_pieces = slowly
"""

# Python drops what is raised in a finalizer.
FINALIZER = """
import time
from tlinformer_jax.commands import cli
class Slow:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(20)
def main():
    Slow()
    time.sleep(20)
cli.run(main)
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_is_not_lost_in_a_finalizer(number, status):
    # nohup, which may run the tests, ignores SIGHUP.
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "signal.signal(signal.SIGHUP, signal.SIG_DFL)" + FINALIZER
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        told = process.communicate(timeout=10)[1]
    assert process.returncode == status
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize(
    ("module", "number", "status", "message"),
    [
        ("tlinformer_jax.main", signal.SIGTERM, 143, "error: ended by SIGTERM"),
        ("prepare", signal.SIGINT, 130, "error: interrupted"),
    ],
)
def test_an_interrupted_tokenisation_leaves_nothing_and_can_be_repeated(
    module, number, status, message, tmp_path, own_cache
):
    text = tmp_path / "text.txt"
    text.write_text("abcdefg " * 16 * 1024 * 40)
    prepare = [
        "--config=configs/tiny.py",
        *("--config.data.dataset=text", f"--config.data.train_files={text}", f"--config.data.validation_files={text}"),
    ]
    arguments = [*prepare, f"--workdir={tmp_path}/run"] if module.endswith("main") else prepare
    line, environment = command_line(module, *arguments)
    line[2] = SLOWLY + line[2]
    # As a scheduler or a terminal does it: the signal reaches the whole group of processes.
    with subprocess.Popen(
        line, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert "under way" in process.stderr.readline()
        os.killpg(process.pid, number)
        told = process.communicate(timeout=30)[1]
    assert (process.returncode, told.strip()) == (status, message)
    assert [path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]
    assert not list((tmp_path / "run").iterdir()) if module.endswith("main") else True
    again = command("prepare", *prepare)
    assert again.returncode == 0, again.stderr
    assert again.stdout.startswith(f"train: {text.stat().st_size + 1:,} tokens, 1 documents")


def test_a_save_that_fails_in_the_background_is_one_line(tmp_path):
    """The disk is full for Orbax's own thread."""
    fault = """
import errno
from orbax.checkpoint._src.checkpointers import async_checkpointer
def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")
async_checkpointer._background_wait_for_commit_futures = full
"""
    shrunk = ("--config.model.d_model=16", "--config.model.num_heads=2", "--config.model.num_blocks=1")
    shrunk += ("--config.model.hidden_depth=0", "--config.train.eval_every=0")
    shrunk += ("--config.train.steps=1", "--config.data.sequence_length=64", f"--workdir={tmp_path}")
    line, environment = command_line("tlinformer_jax.main", "--config=configs/tiny.py", *TEXT, *shrunk)
    line[2] = fault + line[2]
    result = run_line(line, environment)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("No space left") == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last == f"error: checkpoint {tmp_path}/checkpoints/1.saving: cannot be written (No space left on device)"
