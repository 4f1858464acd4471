"""A real sweep: killed in the middle and started again, with a point that fails."""

import csv
import json
import operator
import os
import pathlib
import signal
import subprocess
import time

import pytest

from tests.support.commands import ROOT, TEXT, TEXT_FILE, check_refusal, command, command_line
from tests.support.processes import saved_steps
from tests.support.results import made_result
from tlinformer_jax.decoding import Generator
from tlinformer_jax.experiments.actions import PROMPTS, SAMPLE_TOKENS, SAMPLING
from tlinformer_jax.experiments.job import read_result, write_result

SWEEP = """
from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.experiments.plan import Sweep


def get_sweep(variant="four"):
    base = default_config_dict()
    base.model.update(vocab_size=257, d_model=16, num_heads=2, num_blocks=1, hidden_depth=0, d_ff=24)
    base.model.update(generation_window=8, architecture="sliding_window")  # is soon compiled
    base.train.update(steps=4, batch_size=8, warmup_steps=1, log_every=50, checkpoint_every=50)
    base.data.update(dataset="text", train_files="TEXT", validation_files="TEXT")
    base.data.update(tokenizer="bytes", sequence_length=32)
    points = {
        "first": {"model.history_window": 8},
        "long": {"model.history_window": 16, "train.steps": 600},
        "wrong": {"model.history_window": 24, "train.mesh": "fsdp=3"},
        "last": {"model.history_window": 24},
    }
    return Sweep(base, points, then=("evaluate",))
"""


@pytest.fixture
def sweep(tmp_path) -> list[str]:
    (tmp_path / "four.py").write_text(SWEEP.replace("TEXT", str(TEXT_FILE)))
    return [f"--sweep={tmp_path}/four.py", f"--out={tmp_path}/out", f"--results={tmp_path}/results"]


def holder(workdir: pathlib.Path) -> int:
    """The process that trains there."""
    return int((workdir / ".lock").read_text().split()[1])


def wait_until(condition, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.05)


def gone(process: int) -> bool:
    try:
        return pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def times(folder: pathlib.Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.long
def test_a_sweep_that_is_killed_goes_on_where_it_was(sweep, tmp_path):
    out = tmp_path / "out"
    line, environment = command_line("sweep", *sweep)
    with subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: saved_steps(out / "long-seed0"))
        training = holder(out / "long-seed0")
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: gone(training), 20)
    assert [row["name"] for row in csv.DictReader((out / "sweep.csv").open())] == ["first-seed0"]
    assert not (out / "long-seed0" / "result.json").exists()
    saved = max(saved_steps(out / "long-seed0"))
    finished = times(out / "first-seed0")

    done = command("sweep", *sweep)
    assert done.returncode == 1, done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: 1 of 4 points failed: wrong-seed0 (status 2: ")
    assert "it is 3, and there is 1 device" in error
    assert "Traceback" not in done.stderr
    assert "point 1 of 4, first-seed0: already finished" in done.stderr
    assert times(out / "first-seed0") == finished
    assert f"continuing from step {saved} in {out}/long-seed0" in done.stderr
    result = read_result(out / "long-seed0" / "result.json")
    assert (result["attempts"], result["steps"]) == (2, 600)
    assert result["then"]["evaluate"]
    rows = {row["name"]: row for row in csv.DictReader((out / "sweep.csv").open())}
    assert list(rows) == ["first-seed0", "long-seed0", "last-seed0"]
    assert float(rows["long-seed0"]["validation.perplexity"]) == result["validation"]["perplexity"]
    table = (out / "sweep.md").read_text()
    assert table in done.stdout
    assert len(table.splitlines()) == 5
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [f"{name}.json" for name in sorted(rows)]
    assert {path.name for path in out.glob("*.png")} >= {"perplexity_speed.png", "perplexity_share.png"}

    # A job of an array, with another action: what is trained is not trained again.
    one = command("sweep", *sweep, "--then=evaluate,evaluate@64,samples", "--point=0", "--retries=0")
    assert one.returncode == 0, one.stderr
    assert "point 1 of 1, first-seed0: starting" in one.stderr
    assert f"continuing from step 4 in {out}/first-seed0" in one.stderr
    result = read_result(out / "first-seed0" / "result.json")
    trained, longer = result["then"]["evaluate"], result["then"]["evaluate@64"]
    assert trained["tokens"] == longer["tokens"]  # all but the first; training's own evaluation leaves out a rest
    assert trained["figures"]["loss"] == pytest.approx(result["validation"]["loss"], rel=2e-3)
    assert (trained["length"], longer["length"]) == (32, 64)
    assert longer["by_position"]["edges"] == list(range(65))
    means, tokens = longer["by_position"]["loss"], longer["by_position"]["tokens"]
    assert longer["figures"]["loss"] == pytest.approx(sum(map(operator.mul, means, tokens)) / sum(tokens), rel=1e-6)
    drawn = result["then"]["samples"]["samples"]
    texts = Generator.from_workdir(out / "first-seed0").generate(
        PROMPTS, max_new_tokens=SAMPLE_TOKENS, seed=0, **SAMPLING
    )
    assert drawn == [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, texts)]


@pytest.mark.parametrize("record", ["out/last-seed0/result.json", "results/last-seed0.json"])
def test_a_record_of_another_run_is_refused_before_a_job_of_an_array_trains(sweep, tmp_path, record):
    """It would be refused, or replaced, only after the training, when the tables of all points are written."""
    (tmp_path / record).parent.mkdir(parents=True)
    write_result(tmp_path / record, made_result("last-seed0", 20.0))
    done = command("sweep", *sweep, "--point=0", "--retries=0", f"--results={tmp_path}/results")
    check_refusal(done, f"{record}: belongs to another configuration")
    assert not (tmp_path / "out" / "first-seed0").exists()


@pytest.mark.slow
def test_a_training_that_dies_is_tried_again_and_two_sweeps_do_not_share_a_point(sweep, tmp_path):
    workdir = tmp_path / "out" / "long-seed0"
    line, environment = command_line("sweep", *sweep, "--point=1")
    with subprocess.Popen(line, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: saved_steps(workdir))
        training = holder(workdir)
        os.kill(training, signal.SIGSTOP)  # it keeps the directory as long as the second one looks
        second = command("sweep", *sweep, "--point=1", "--then=")
        os.kill(training, signal.SIGKILL)
        said = process.stderr.read()
    assert process.returncode == 0, said
    assert second.returncode == 1, second.stderr
    assert "long-seed0 (status 2: " in second.stderr
    assert "another run is training into it" in second.stderr
    assert "point 1 of 1, long-seed0: failed, ended by SIGKILL" in said
    assert "point 1 of 1, long-seed0: attempt 2 of 2" in said
    assert "continuing from step" in said
    assert read_result(workdir / "result.json")["attempts"] == 2


@pytest.mark.slow
def test_the_training_command_records_a_run_and_the_report_reads_it(tmp_path):
    small = ["--config=configs/tiny.py", *TEXT, "--config.model.d_model=24", "--config.model.num_blocks=1"]
    small += ["--config.train.steps=2", "--config.train.eval_every=0", "--config.train.log_every=1"]
    check_refusal(command("tlinformer_jax.main", *small, f"--workdir={tmp_path}/run", "--then=dance"), "'dance'")
    done = command("tlinformer_jax.main", *small, f"--workdir={tmp_path}/run", "--then=evaluate")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["name"] == "run"
    assert result["command"].startswith("python -m tlinformer_jax.main --config=configs/tiny.py")
    assert result["then"]["evaluate"]["figures"]["loss"] == pytest.approx(result["validation"]["loss"], rel=2e-3)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "run.json").write_bytes((tmp_path / "run" / "result.json").read_bytes())
    written = command("report", f"--results={tmp_path}/results", f"--out={tmp_path}/results.md")
    assert written.returncode == 0, written.stderr
    text = (tmp_path / "results.md").read_text()
    assert f"| {result['validation']['perplexity']:.2f} |" in text
    assert "## Loss by position" in text
