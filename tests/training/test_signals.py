"""Signals to a run, as a user or a scheduler sends them."""

import json
import signal
import subprocess
import sys
import threading

import pytest

from tests.support.commands import ROOT, TEXT, check_refusal, command, command_line
from tlinformer_jax.training.callbacks import Stopped, StopRequest

WAIT = """
import hashlib, signal, sys, time
from tlinformer_jax.training.callbacks import StopRequest
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, which may run the tests, ignores it
with StopRequest() as stop:
    print("ready", flush=True)
    while not stop:
        time.sleep(0.01)
    if sys.argv[1] == "twice":
        # Half a minute in C, with the interpreter's lock released, like a compilation: no handler of Python's runs.
        hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
print("ended", bool(stop))
"""


def waiting(how: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", WAIT, how],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def test_one_interrupt_asks_and_a_second_ends_at_once():
    with waiting("once") as process:
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, "ended True\n")
    assert err == "SIGINT: saving after the running step; a second one stops at once\n"
    with waiting("twice") as process:
        process.send_signal(signal.SIGINT)
        assert "a second one stops at once" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (-signal.SIGINT, "")


def test_handlers_are_put_back_and_other_threads_left_alone():
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, which may run the tests, ignores it
    before = [signal.getsignal(number) for number in numbers]
    for number in numbers:
        with StopRequest() as stop:
            assert list(stop.watch([1, 2])) == [1, 2]
            signal.raise_signal(number)
            assert stop
            with pytest.raises(Stopped):
                list(stop.watch([1, 2]))
        assert before == [signal.getsignal(number) for number in numbers]

    def elsewhere():
        with StopRequest() as stop:
            outcome.append(bool(stop))

    outcome: list[bool] = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert outcome == [False]


def test_a_hangup_that_is_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_is_answered_though_nobody_reads_it():
    with waiting("once") as process:
        process.stderr.close()
        for _ in range(2):
            process.send_signal(signal.SIGHUP)
        assert process.stdout.read() == "ended True\n"
    assert process.returncode == 0


@pytest.mark.slow
def test_a_terminated_training_command_saves_and_exits_0_and_its_directory_takes_no_second_run(tmp_path):
    arguments = [
        "--config=configs/tiny.py",
        *TEXT,
        *("--config.model.d_model=16", "--config.model.num_heads=2", "--config.model.num_blocks=1"),
        *("--config.data.sequence_length=64", "--config.train.steps=1000000"),
        *("--config.train.log_every=1", "--config.train.eval_every=0", f"--workdir={tmp_path}"),
    ]
    line, environment = command_line("tlinformer_jax.main", *arguments)
    with subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        told = iter(process.stderr.readline, "")
        assert any("compiled and ran step 1" in text for text in told)
        drain = threading.Thread(target=lambda: rest.extend(told))
        rest: list[str] = []
        drain.start()
        check_refusal(
            command("tlinformer_jax.main", *arguments), f"another run is training into it (process {process.pid} "
        )
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        drain.join()
    (saved,) = (int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert f"stopped after step {saved}, as requested" in rest[-1]
    steps = [json.loads(text)["step"] for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, saved + 1))
    evaluated = command("evaluate", f"--workdir={tmp_path}", "--json")
    assert json.loads(evaluated.stdout)["step"] == saved, evaluated.stderr
