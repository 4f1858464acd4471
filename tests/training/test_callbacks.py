"""Callbacks: when they are called, what they see, and what becomes of a run that one of them ends."""

import dataclasses
import importlib.util
import json
import sys
import types

import jax
import numpy as np
import pytest

from tests.support.optional import need_modules
from tests.training.test_resume import assert_same_parameters, events, run_config
from tlinformer_jax.errors import UserError
from tlinformer_jax.training import callbacks as module
from tlinformer_jax.training.callbacks import Call, Callback, as_callbacks
from tlinformer_jax.training.checkpoint import load_params
from tlinformer_jax.training.loop import train_and_evaluate, train_run
from tlinformer_jax.training.metrics import Throughput
from tlinformer_jax.training.wandb import WandB


@dataclasses.dataclass
class Recorder(Callback):
    """Keeps what it sees."""

    every: int | str = 2
    seen: list = dataclasses.field(default_factory=list)
    finished: list = dataclasses.field(default_factory=list)

    def __call__(self, view):
        params = jax.tree.map(np.array, view.params)
        self.seen.append((view.step, view.metrics["loss"], view.evaluation.get("step"), params))

    def finish(self, view):
        self.finished.append((view.step, view.evaluation["step"]))


def test_a_callback_sees_each_update_that_is_due_and_what_was_logged_and_saved(tmp_path):
    config, recorder, steps = run_config(tmp_path, log_every=1, eval_every=3), Recorder(), []
    given = (recorder, lambda view: steps.append(view.step), Call(lambda view: None, every=0))
    train_and_evaluate(config, tmp_path / "run", callbacks=given)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [(step, evaluated) for step, _, evaluated, _ in recorder.seen] == [(2, None), (4, 3), (6, 3)]
    assert recorder.finished == [(6, 6)]
    losses = {event["step"]: event["train/loss"] for event in events(tmp_path / "run") if "train/loss" in event}
    for step, loss, _, params in recorder.seen:
        assert loss == losses[step]
        if step == 6:  # the others are not kept
            jax.tree.map(np.testing.assert_array_equal, params, load_params(tmp_path / "run", config.model)[1])


@pytest.mark.slow
def test_a_run_that_a_callbacks_error_has_ended_keeps_its_checkpoints_and_goes_on_bit_by_bit(tmp_path):
    config = run_config(tmp_path, log_every=1, eval_every=0, checkpoint_every=2, keep_checkpoints=2)

    def fails(view):
        if view.step == 5:
            raise ValueError("no such thing")

    train_and_evaluate(config, tmp_path / "whole")
    with pytest.raises(ValueError, match="no such thing"):
        train_and_evaluate(config, tmp_path / "parts", callbacks=[fails])
    assert sorted(path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()) == ["2", "4"]
    train_and_evaluate(config, tmp_path / "parts")
    assert events(tmp_path / "parts") == events(tmp_path / "whole")
    assert_same_parameters(config, tmp_path / "whole", tmp_path / "parts")


def test_a_callback_can_end_the_run_which_is_then_saved_and_evaluated(tmp_path):
    trained = train_run(
        run_config(tmp_path, eval_every=0), tmp_path / "run", callbacks=[Call(lambda view: np.bool(view.step == 2))]
    )
    assert trained.step == 2
    assert trained.figures["loss"] > 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]


def test_a_run_that_ends_while_it_is_traced_keeps_the_trace(tmp_path, capfd):
    """Updates 4 to 6 are traced. A trace that still runs would make the next one in this process fail."""
    config = run_config(tmp_path, eval_every=0)
    stop = Call(lambda view: view.step == 5)
    train_run(config, tmp_path / "run", profile=tmp_path / "ends", callbacks=[stop])
    assert list((tmp_path / "ends").rglob("*.xplane.pb"))
    assert "traced steps 4 to 5 into" in capfd.readouterr().err
    # A run that would end after update 3.
    view = types.SimpleNamespace(step=3, outputs=())
    with module.Trace(tmp_path / "begins", 0, 6, Throughput(6, 1.0, None)) as trace:
        assert trace.is_due(view.step)
        trace(view)
        trace.finish(view)
    assert list((tmp_path / "begins").rglob("*.xplane.pb"))
    assert "traced no steps into" in capfd.readouterr().err
    with pytest.raises(ZeroDivisionError):
        train_run(config, tmp_path / "fails", profile=tmp_path / "trace", callbacks=[lambda view: 1 / (view.step - 5)])
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


@pytest.mark.parametrize("result", [True, np.float32(1) < 2, jax.numpy.float32(1) < 2], ids=["Python", "NumPy", "JAX"])
def test_true_of_any_kind_ends_a_run(result):
    assert module.asks_to_end(result) is True


@pytest.mark.parametrize("result", [False, np.bool_(0), None, 7, "text", np.int32(1), jax.numpy.float32(2)])
def test_what_a_function_happens_to_return_ends_no_run(result):
    assert module.asks_to_end(result) is False


@pytest.mark.parametrize("every", [-1, 1.5, True, "soon", "10", None])
def test_what_is_no_interval_is_refused_in_one_line(every):
    with pytest.raises(UserError, match=r"^callbacks\[1\]\.every = .*: must be an integer >= 0, or a time such as"):
        as_callbacks([print, Call(print, every=every)])


def test_what_is_no_callback_is_refused_before_anything_is_written(tmp_path):
    one, several = "must be a Callback or a function", "must be a list of Callbacks or functions"
    for given, message in ((["log"], one), ([Recorder], one), (print, several), (None, several), ("log", several)):
        with pytest.raises(UserError, match=rf"^callbacks.* = .*: {message}$"):
            train_and_evaluate(run_config(tmp_path), tmp_path / "run", callbacks=given)
    assert not (tmp_path / "run").exists()


# ---- Weights & Biases


class FakeRun:
    def __init__(self, **settings):
        self.settings, self.logged, self.finished = settings, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def runs(monkeypatch):
    """The runs that a module in the place of wandb has started."""
    fake, started = types.ModuleType("wandb"), []
    fake.__spec__ = importlib.util.spec_from_loader("wandb", loader=None)

    def init(**settings):
        started.append(FakeRun(**settings))
        return started[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return started


@pytest.mark.slow
def test_weights_and_biases_gets_what_metrics_jsonl_has_and_goes_on_in_the_same_run(tmp_path, runs):
    config = run_config(tmp_path, log_every=1)
    with pytest.raises(RuntimeError, match="stop here"):
        train_and_evaluate(config, tmp_path / "run", callbacks=[WandB("mine", every=1), stop_here])
    train_and_evaluate(config, tmp_path / "run", callbacks=[WandB("mine", every=1, settings={"group": "g"})])
    first, second = runs
    assert (first.settings["id"], first.settings["project"]) == (second.settings["id"], "mine")
    assert (second.settings["group"], second.settings["resume"], second.settings["name"]) == ("g", "allow", "run")
    assert first.settings["config"] == config.to_dict()
    assert second.finished
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = {line["step"]: line for line in lines if "train/loss" in line}
    for step, values in second.logged:
        assert values["train/loss"] == expected[step]["train/loss"]
        assert values["train/learning_rate"] == expected[step]["train/learning_rate"]
    sent = {values["eval/step"]: values["eval/loss"] for _, values in second.logged if "eval/loss" in values}
    assert sent == {line["step"]: line["eval/loss"] for line in lines if line.get("eval/loss") and line["step"] > 4}


def stop_here(view):
    if view.step == 6:
        raise RuntimeError("stop here")


def test_without_wandb_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'^WandB: needs the package wandb; pip install "tlinformer-jax\[wandb\]"$'):
        WandB("mine")


@pytest.mark.slow
def test_wandb_itself_takes_it_offline(tmp_path, monkeypatch):
    need_modules("wandb", extra="wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_and_evaluate(run_config(tmp_path), tmp_path / "run", callbacks=[WandB("mine", every=2)])
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert folder.name.endswith((tmp_path / "run" / "wandb_id.txt").read_text())
    assert list(folder.glob("*.wandb"))
