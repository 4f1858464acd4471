"""Runs that differ are told apart from runs that repeat themselves."""

import pathlib

import pytest

from tests.support.commands import TEXT, check_refusal, command
from tests.training.test_resume import run_config
from tlinformer_jax.errors import UserError
from tlinformer_jax.training.loop import train_and_evaluate

SHRUNK = [
    "--config=tiny",
    *TEXT,
    "--config.model.d_model=16",
    "--config.model.num_heads=2",
    "--config.model.num_blocks=1",
]
SHRUNK += ["--config.data.sequence_length=32", "--config.train.batch_size=4", "--config.train.warmup_steps=3"]


@pytest.mark.slow
def test_a_difference_is_told_by_the_log_and_the_arrays(tmp_path, monkeypatch):
    from tools import repeatability

    def run(name: str, **train) -> repeatability.Run:
        config = run_config(tmp_path, dropout=0.1, steps=3, log_every=1, eval_every=0, **train)
        train_and_evaluate(config, tmp_path / name / "run")
        monkeypatch.setattr(repeatability.Run, "__init__", lambda self: None)
        found = repeatability.Run()
        found.workdir = tmp_path / name / "run"
        return found

    one, same, other = run("one"), run("same"), run("other", learning_rate=2e-2)
    assert repeatability.difference(one, same) is None
    told = repeatability.difference(one, other)
    assert "arrays differ; step 1: train/learning_rate 0.0099" in told


@pytest.mark.slow
def test_the_command_kills_resumes_compares_and_tells_the_cost(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = command("tools.repeatability", "--updates=60", *SHRUNK)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[2] == "| a second run | equal to the last bit |"
    assert lines[3].startswith("| killed and resumed from update ")
    assert lines[3].endswith("0 | equal to the last bit |")
    assert "without: it costs" in lines[5]
    assert not [path for path in pathlib.Path(tmp_path).iterdir() if path.name.startswith("repeatability-")]


@pytest.mark.slow
def test_what_a_run_refuses_is_told_in_its_words():
    check_refusal(
        command("tools.repeatability", *SHRUNK, "--config.train.batch_size=0"), "train.batch_size = 0: must be"
    )


def test_every_default_is_run_and_a_difference_in_one_ends_with_status_1(monkeypatch, tmp_path, capsys):
    from tools import repeatability

    ran = []
    monkeypatch.setattr(repeatability.sys, "argv", ["repeatability"])
    monkeypatch.setattr(repeatability.cli, "config_given", lambda: False)
    monkeypatch.setattr(repeatability.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.setattr(repeatability, "train", lambda root, config: ran.append(config) or {})
    monkeypatch.setattr(repeatability, "compare", lambda runs: len(ran) != 2)
    with pytest.raises(SystemExit, match="1"):
        repeatability.main()
    told = capsys.readouterr().out
    assert len(ran) == 3
    for name, config in zip(("tlinformer, dropout 0.0", "transformer, dropout 0.0", "tlinformer, dropout 0.1"), ran):
        assert f"\n{name}\n" in told
        architecture, _, dropout = name.replace(",", "").split()
        assert {f"--config.model.architecture={architecture}", f"--config.model.dropout={dropout}"} <= set(config)
    assert told.count("what the runs have left is in") == 1


def test_the_files_of_a_run_that_fails_are_named(monkeypatch, tmp_path, capsys):
    from tools import repeatability

    def fail(root, config):
        raise UserError("a run ended with status 2")

    monkeypatch.setattr(repeatability.sys, "argv", ["repeatability"])
    monkeypatch.setattr(repeatability.cli, "config_given", lambda: False)
    monkeypatch.setattr(repeatability.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.setattr(repeatability, "train", fail)
    with pytest.raises(UserError, match="status 2"):
        repeatability.main()
    assert f"what the runs have left is in {tmp_path}\n" in capsys.readouterr().out
