"""A run with its record and its actions, in this process."""

import dataclasses
import json
import os
import pathlib

import jax
import numpy as np
import pytest

from tests.support.commands import TEXT_FILE
from tlinformer_jax.config.model import ARCHITECTURES
from tlinformer_jax.config.run import run_config
from tlinformer_jax.decoding.cache import capacity_for, init_cache
from tlinformer_jax.decoding.memory import cache_bytes, cache_bytes_at
from tlinformer_jax.errors import UserError
from tlinformer_jax.experiments import actions, driver
from tlinformer_jax.experiments.actions import check_possible, checked_actions
from tlinformer_jax.experiments.driver import read_attempts, run_job, timed_attempt
from tlinformer_jax.experiments.job import Job, finished_result, read_result
from tlinformer_jax.models import ModelConfig, build_model

MODEL = {"vocab_size": 257, "d_model": 16, "num_heads": 2, "num_blocks": 1, "hidden_depth": 0, "d_ff": 24}
MODEL |= {"history_window": 8, "generation_window": 8, "dtype": "float32"}
CONFIG = run_config(
    {
        "model": MODEL,
        "train": {"steps": 4, "batch_size": 8, "log_every": 1, "eval_every": 2, "warmup_steps": 1, "seed": 5},
        "data": {"dataset": "text", "tokenizer": "bytes", "sequence_length": 32}
        | {f"{split}_files": str(TEXT_FILE) for split in ("train", "validation", "test")},
    }
)


def test_a_run_is_recorded_whole_and_only_once(tmp_path, monkeypatch):
    def counted(trained):
        found.append(sum(np.asarray(leaf, np.float64).sum() for leaf in jax.tree.leaves(trained.params)))
        return {"sum": found[-1], "bad": float("nan")}

    found: list[float] = []
    monkeypatch.setitem(actions.ACTIONS, "count", counted)
    job = Job("name", CONFIG, tmp_path, "the command", ("count",), point="a", overrides={"train.seed": 5})
    result = run_job(job)
    written = read_result(tmp_path / "result.json")
    assert written["then"] == {"count": {"sum": found[0], "bad": None}}
    assert {name: part for name, part in written.items() if name != "then"} == {
        name: json.loads(json.dumps(part)) for name, part in result.items() if name != "then"
    }
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {event["step"]: event["eval/loss"] for event in events if "eval/loss" in event}
    assert written["history"] == [[2, losses[2]], [4, losses[4]]]
    assert written["validation"]["loss"] == losses[4]
    speeds = sorted(event["train/tokens_per_second"] for event in events if "train/tokens_per_second" in event)
    assert written["speed"]["tokens_per_second"] == pytest.approx(np.median(speeds))
    assert (written["steps"], written["tokens"], written["seed"]) == (4, 4 * 8 * 32, 5)
    parameters = jax.eval_shape(build_model(ModelConfig(**MODEL)).init, jax.random.key(0), np.zeros((1, 8), np.int32))
    assert written["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(parameters))
    assert written["device"] == {"kind": jax.devices()[0].device_kind, "platform": "cpu", "count": 8}
    assert run_config(written["config"]) == CONFIG
    assert written["seconds"]["wall"] > 4 * 8 * 32 / max(speeds)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != ".result.lock"}
    run_job(job)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(found) == 1
    # Another action: the training is finished, its parameters come from the checkpoint.
    monkeypatch.setitem(actions.ACTIONS, "again", counted)
    again = run_job(dataclasses.replace(job, then=("again",)))
    assert found[1] == found[0]
    assert again["attempts"] == 2
    assert again["validation"]["loss"] == pytest.approx(losses[4], rel=1e-6)
    assert finished_result(dataclasses.replace(job, then=("again",))) is not None


def test_unknown_actions_are_refused_before_anything_runs(tmp_path):
    for name in ("dance", "evaluate@", "evaluate@0", "evaluate@x", "evaluate@-1", "evaluate@٣", "samples@3", ""):
        with pytest.raises(UserError, match=f"--then=evaluate,{name}: '{name}' must be one of evaluate, samples, hist"):
            checked_actions(["evaluate", name])
    assert checked_actions(["evaluate", "evaluate@8192", "evaluate"]) == ("evaluate", "evaluate@8192")
    with pytest.raises(UserError, match="dance"):
        run_job(Job("x", CONFIG, tmp_path, "", ("dance",)))
    assert not list(tmp_path.iterdir())


PASSKEY = {"dataset": "passkey", "tokenizer": "bytes", "sequence_length": 256, "num_items": 1, "examples": 40}


def test_a_task_is_always_evaluated_on_its_test_split():
    text, task = (
        Job("x", run_config({"model": MODEL, "data": data}), pathlib.Path(), "", ("evaluate@512", "history"))
        for data in ({}, PASSKEY)
    )
    assert text.actions == ("evaluate@512", "history")
    assert task.actions == ("evaluate", "evaluate@512", "history")
    for named in ("evaluate", "evaluate@256"):
        assert dataclasses.replace(task, then=(named,)).actions == (named,)


def test_a_length_that_the_test_text_cannot_fill_is_refused_before_the_training(tmp_path):
    job = Job("x", run_config({"model": MODEL, "data": PASSKEY}), tmp_path, "", ("evaluate@1048576",))
    least = "evaluate@1048576: data.sequence_length = 1048576: the text to hide needles in has only [0-9]+ tokens$"
    with pytest.raises(UserError, match=least):
        run_job(job)
    assert not list(tmp_path.iterdir())


def test_a_split_without_a_sample_of_the_actions_length_is_refused_before_the_training(tmp_path, own_cache):
    """Training does not read the test split, and needs no longer samples of the validation split than its own."""
    short = tmp_path / "short.txt"
    short.write_text("of 14 bytes. \n")
    for then, files, says in (
        ("evaluate@1048576", "", "^evaluate@1048576: data.sequence_length = 1048576: the validation split has only"),
        ("evaluate@64", short, "^evaluate@64: data.sequence_length = 64: the test split has only"),
        ("evaluate", tmp_path / "none.txt", "^data.test_files: no file matches"),
    ):
        config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, test_files=str(files)))
        with pytest.raises(UserError, match=says):
            run_job(Job("x", config, tmp_path / "run", "", (then,)))
    assert not (tmp_path / "run").exists()
    check_possible(("evaluate", "evaluate@64"), CONFIG)


def test_time_is_that_of_all_attempts(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(driver.time, "time", lambda: now[0])
    monkeypatch.setattr(driver.time, "perf_counter", lambda: now[0] - 500)
    with timed_attempt(tmp_path):
        now[0] += 7
    assert read_attempts(tmp_path) == [[1000.0, 1007.0]]

    # As a kill leaves it: the attempt is open, the last metrics are of 4 seconds after its start.
    (tmp_path / "attempts.json").write_text("[[1000, 1007], [2000, 0]]")
    (tmp_path / "metrics.jsonl").write_text("")
    os.utime(tmp_path / "metrics.jsonl", (2004, 2004))
    assert read_attempts(tmp_path)[1] == [2000.0, 2004.0]
    now[0] = 3000.0
    with timed_attempt(tmp_path):
        now[0] += 5
        os.utime(tmp_path / "metrics.jsonl", (3009, 3009))
    assert read_attempts(tmp_path) == [[1000.0, 1007.0], [2000.0, 2004.0], [3000.0, 3005.0]]
    for damaged in ("{", '{"count": 2}', "[[3]]", "7"):
        (tmp_path / "attempts.json").write_text(damaged)
        assert read_attempts(tmp_path) == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bytes_of_a_cache_are_those_of_one_that_is_made(architecture):
    config = ModelConfig(**MODEL, architecture=architecture)
    found = cache_bytes_at(config, 32)
    made = init_cache(config, 1, capacity_for(config, 32))
    assert found.allocated == sum(leaf.nbytes for leaf in jax.tree.leaves(made))
    assert found == cache_bytes(config, made, [32])
    # Keys and values of 16 features, 4 bytes each, of 2 layers; a sliding window keeps 15 positions.
    if not config.windowed:
        rows = {"transformer": 2 * 32, "sliding_window": 2 * 15, "gated_deltanet_hybrid": 32}.get(architecture, 0)
        # A state of 2 heads by 8 by 8, and three rows of queries, keys and values.
        states = {"gated_deltanet": 2, "gated_deltanet_hybrid": 1}.get(architecture, 0)
        assert found.used == 2 * 16 * 4 * rows + states * 4 * (2 * 8 * 8 + 3 * 3 * 16) + 4
