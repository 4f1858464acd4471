"""Jobs in processes of their own: retries, skips, what is said; with small programs in the place of a training."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.support.results import as_earlier, made_result
from tlinformer_jax.config.run import run_config
from tlinformer_jax.errors import UserError
from tlinformer_jax.experiments import job as jobs_module
from tlinformer_jax.experiments.job import Job, finished_result, run_jobs, write_result

# Counts its calls in the working directory, then does what is asked for at this one.
PROGRAM = """
import json, os, pathlib, signal, sys
job = json.loads(json.loads(sys.stdin.readline())[0])
folder = pathlib.Path(job["workdir"])
calls = folder / "calls"
number = len(calls.read_text()) if calls.exists() else 0
calls.write_text("x" * (number + 1))
for_each = job["overrides"]["does"]
does = for_each[min(number, len(for_each) - 1)]
print(f"doing {does}", file=sys.stderr)
if does == "finish":
    (folder / "result.json").write_text(job["overrides"]["result"])
elif does == "die":
    os.kill(os.getpid(), signal.SIGKILL)
elif does == "raise":
    raise RuntimeError("no luck")
elif does == "mistake":
    print("error: d_model", file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture(autouse=True)
def program(monkeypatch):
    monkeypatch.setattr(jobs_module, "COMMAND", (sys.executable, "-c", PROGRAM))


def job(folder: pathlib.Path, name: str, *does: str, then: tuple[str, ...] = ()) -> Job:
    result = made_result(name, 20.0)
    overrides = {"does": does, "result": json.dumps(result)}
    return Job(name, run_config(result["config"]), folder / name, "command", then, overrides=overrides)


def calls(*jobs: Job) -> list[int]:
    paths = [job.workdir / "calls" for job in jobs]
    return [len(path.read_text()) if path.exists() else 0 for path in paths]


def run_each(jobs: list[Job], retries: int) -> dict[str, str]:
    return run_jobs([[job] for job in jobs], retries)


def test_failures_are_tried_again_then_named_and_the_others_go_on(tmp_path, capfd):
    jobs = [
        job(tmp_path, "sound", "finish"),
        job(tmp_path, "once", "die", "finish"),
        job(tmp_path, "always", "raise"),
        job(tmp_path, "killed", "die"),
        job(tmp_path, "wrong", "mistake"),
        job(tmp_path, "silent", "nothing"),
        job(tmp_path, "last", "finish"),
    ]
    failures = run_each(jobs, retries=1)
    assert failures == {
        "always": "status 1: RuntimeError: no luck",
        "killed": "ended by SIGKILL",
        "wrong": "status 2: d_model",
        "silent": "status 0: doing nothing",
    }
    assert calls(*jobs) == [1, 2, 2, 2, 1, 2, 1]
    said = capfd.readouterr().err
    assert "point 2 of 7, once: attempt 2 of 2" in said
    assert "RuntimeError: no luck" in said
    assert (tmp_path / "once" / "log.txt").read_text() == "doing die\ndoing finish\n"
    run_each(jobs, retries=0)
    assert calls(*jobs) == [1, 2, 3, 3, 2, 3, 1], "what is finished is not run again"


GROUP = """
import json, pathlib, sys
jobs = [json.loads(text) for text in json.loads(sys.stdin.readline())]
pathlib.Path(jobs[0]["workdir"], "together").write_text(" ".join(job["name"] for job in jobs))
for job in jobs[: 2 if len(jobs) == 3 else None]:
    pathlib.Path(job["workdir"], "result.json").write_text(job["overrides"]["result"])
print("the third is missing", file=sys.stderr)
"""


def test_a_group_shares_a_process_and_what_is_left_of_it_is_tried_again(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(jobs_module, "COMMAND", (sys.executable, "-c", GROUP))
    jobs = [job(tmp_path, name, "finish") for name in ("one", "two", "three")]
    assert run_jobs([jobs], retries=0) == {"three": "status 0: the third is missing"}
    assert (jobs[0].workdir / "together").read_text() == "one two three"
    assert "point 1 of 1, one and 2 more: starting" in capfd.readouterr().err
    assert run_jobs([jobs], retries=0) == {}
    assert (jobs[2].workdir / "together").read_text() == "three"


def test_what_is_finished_is_told_by_its_record(tmp_path):
    sound = job(tmp_path, "sound", "finish")
    run_each([sound], retries=0)
    assert finished_result(sound)["name"] == "sound"
    more = job(tmp_path, "sound", "finish", then=("samples",))
    assert finished_result(more) is None, "an action is missing"
    path = tmp_path / "sound" / "result.json"
    path.write_text(path.read_text()[:100])
    assert finished_result(sound) is None, "it is cut off"


def test_another_configuration_is_refused_before_anything_runs(tmp_path):
    first, other = job(tmp_path, "first", "finish"), job(tmp_path, "other", "finish")
    other.workdir.mkdir()
    write_result(other.workdir / "result.json", made_result("other", 20.0, train={"steps": 7}))
    with pytest.raises(UserError, match=r"/result.json: belongs to another configuration \(train.steps: 7 -> 100\)"):
        run_each([first, other], retries=0)
    assert calls(first, other) == [0, 0]
    # Where the data are kept is no part of what a run is.
    write_result(other.workdir / "result.json", as_earlier(made_result("other", 20.0)))
    assert run_each([first, other], retries=0) == {}
    assert calls(first, other) == [1, 0]


def test_a_job_survives_being_written_down(tmp_path):
    one = job(tmp_path, "one", "finish", then=("evaluate",))
    assert Job.from_json(one.to_json()).config == one.config
    assert Job.from_json(one.to_json()).then == ("evaluate",)


def test_the_process_ends_when_its_starter_is_gone():
    """As after a kill -9 of the sweep: stdin ends, and nobody waits for it."""
    script = "import time; from tlinformer_jax.commands import sweep; sweep._end_with_starter(); time.sleep(60)"
    started = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        process.stdin.close()
        assert process.wait(timeout=30) == 1
    assert time.monotonic() - started < 30


def test_a_signal_to_the_sweep_stops_the_process_first(tmp_path, monkeypatch):
    """It gets SIGTERM, by which a training saves itself, and is waited for."""
    waits = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(json.loads(json.loads(sys.stdin.readline())[0])["workdir"])
def stop(*_):
    (folder / "saved").write_text("")
    sys.exit(3)
signal.signal(signal.SIGTERM, stop)
(folder / "ready").write_text("")
print("ready", file=sys.stderr, flush=True)
time.sleep(60)
"""
    monkeypatch.setattr(jobs_module, "COMMAND", (sys.executable, "-c", waits))

    def interrupted(lines, log):
        for line in lines:
            os.kill(os.getpid(), signal.SIGINT)
            yield line

    monkeypatch.setattr(jobs_module, "_passed_on", interrupted)
    # A shell that starts the tests in the background has it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_each([job(tmp_path, "long", "finish")], retries=1)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "long" / "saved").exists()
