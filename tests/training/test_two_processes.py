"""Two processes on this machine: they train what one does, stop together, and neither outlives the other."""

import json
import signal
import time

import pytest

from tests.support.commands import TEXT, command
from tests.support.processes import SMALL, saved_steps, start, start_many, start_two, wait_for

MAIN = "tlinformer_jax.main"
# Three windows: the first, and one with history for each of two devices.
WINDOWS = ("--config=configs/tiny.py", *TEXT, "--config.data.sequence_length=96", "--config.train.log_every=1")
WINDOWS += ("--config.train.steps=3", "--config.train.eval_every=0", "--config.model.num_blocks=1")
SPEED = ("tokens_per_second", "tflops", "mfu", "input_wait", "save_wait")


def run(*processes) -> list[str]:
    """Waits for processes that must succeed; returns what each wrote on stderr."""
    told = [process.communicate(timeout=1200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), told
    return told


def events(workdir) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith(SPEED)} for line in lines]


@pytest.mark.slow
def test_two_processes_of_one_device_train_what_one_process_of_two_does(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    steps = ("--config.train.steps=6", "--config.train.keep_checkpoints=9+1")
    steps += ("--config.train.checkpoint_every=0.000001s",)  # after every step
    steps += ("--config.data.dataset=lines",)  # evaluated by document
    steps += ("--config.train.mesh=fsdp=2",)  # each saves parameters that the other does not hold
    run(start(MAIN, *SMALL, *steps, f"--workdir={one}", devices=2))
    told = run(*start_two(MAIN, *SMALL, *steps, f"--workdir={two}"))
    assert "2 x cpu" in told[0]
    assert "step 6/6" not in told[1], "process 0 alone reports"
    assert len(events(one)) == len(events(two)) == 7
    for mine, other in zip(events(one), events(two), strict=True):
        assert mine == pytest.approx(other, rel=1e-6)
    assert saved_steps(one) == saved_steps(two) == [1, 2, 3, 4, 5, 6]
    # Evaluated by two processes, and by one, with the same result.
    asked = ("--json", "--lengths=20")
    (told, _), (silent, _) = [
        process.communicate(timeout=600)
        for process in start_two("evaluate", f"--workdir={two}", *asked, f"--out={tmp_path}/two.json")
    ]
    alone = command("evaluate", f"--workdir={two}", *asked)
    assert "loss" not in silent, "process 0 alone prints"
    # Before it stands a line of the CPU's collectives.
    mine, other = json.loads(told.splitlines()[-1]), json.loads(alone.stdout)
    assert (mine["step"], mine["tokens"]) == (other["step"], other["tokens"])
    assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert len(mine["by_document"]["loss"]) > 10
    assert mine["by_document"]["tokens"] == other["by_document"]["tokens"]
    assert mine["by_document"]["loss"] == pytest.approx(other["by_document"]["loss"], rel=1e-6)
    (mine,), (other,) = mine["by_length"], other["by_length"]
    assert mine["tokens"] == other["tokens"]
    assert mine["figures"] == pytest.approx(other["figures"], rel=1e-6)
    assert json.loads((tmp_path / "two.json").read_text())["by_length"] == [mine]


@pytest.mark.slow
def test_a_mesh_over_processes_trains_what_one_process_does(tmp_path):
    one, four = f"--workdir={tmp_path}/one", f"--workdir={tmp_path}/four"
    run(start(MAIN, *WINDOWS, one))
    run(*start_many(4, MAIN, *WINDOWS, "--config.train.mesh=window=2,context=2", four))
    for mine, other in zip(events(tmp_path / "four"), events(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
@pytest.mark.long
def test_when_one_is_killed_the_other_ends_with_a_clear_line_and_the_same_command_goes_on(tmp_path):
    endless = (*SMALL, "--config.train.steps=1000000", "--config.train.checkpoint_every=5", f"--workdir={tmp_path}")
    kept = [0]
    for victim in (0, 1):
        processes = start_two(MAIN, *endless)
        wait_for(processes[0], f"step {kept[-1] + 12}/")
        processes[victim].kill()
        started = time.monotonic()
        told = processes[1 - victim].communicate(timeout=60)[1]
        assert time.monotonic() - started < 60
        processes[victim].communicate()
        assert processes[1 - victim].returncode == 1
        # Mostly the last line, but a thread of JAX may still be writing a page of its own.
        clear = "error: another process of this run has ended, or cannot be reached"
        assert any(line.startswith(clear) for line in told.splitlines()), told
        assert "Traceback" not in told
        before, kept = kept, saved_steps(tmp_path)
        assert kept[-1] >= before[-1] + 5

    processes = start_two(MAIN, *endless)
    wait_for(processes[0], f"continuing from step {kept[-1]} ")
    wait_for(processes[0], "compiled and ran step")
    # The notice reaches one process alone; both save the same step.
    processes[1].send_signal(signal.SIGTERM)
    last = run(*processes)[0].strip().splitlines()[-1]
    assert (
        last == f"stopped after step {saved_steps(tmp_path)[-1]}, as requested; the same command continues from there"
    )
    assert [event["step"] for event in events(tmp_path)] == list(range(1, saved_steps(tmp_path)[-1] + 1))
