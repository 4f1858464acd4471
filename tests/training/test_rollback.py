"""Rollbacks: after too many bad batches a run goes on past them from its last regular checkpoint."""

import functools
import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from tests.training.test_checkpoint import abstract, state_of
from tests.training.test_resume import events, run_config
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.batches import TrainingBatches
from tlinformer_jax.data.sources import load_split
from tlinformer_jax.data.tokenizers import ByteTokenizer
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.parallel.sharding import build_mesh
from tlinformer_jax.training import loop, setup
from tlinformer_jax.training.callbacks import Call, DivergedError
from tlinformer_jax.training.loop import train_and_evaluate
from tlinformer_jax.training.saving import Checkpoints


@pytest.fixture
def spoil(monkeypatch):
    """Makes batches (from 0) bad: one weight of theirs is NaN. One device, to be quick."""
    monkeypatch.setattr(setup, "build_mesh", lambda axes, _: build_mesh(axes, jax.devices()[:1]))
    plain, bad = TrainingBatches.batch, set()

    def batch(self, step, *arguments):
        found = plain(self, step, *arguments)
        if step in bad:
            found["weights"][-1, 2] = np.nan
        return found

    monkeypatch.setattr(TrainingBatches, "batch", batch)
    return lambda *steps: bad.clear() or bad.update(steps)


def last_state(config, workdir):
    run = setup.build_run(config, ByteTokenizer())
    with Checkpoints(workdir, 9) as checkpoints:
        return checkpoints.restore(run.abstract_state)[0]


SHORT = {"steps": 9, "log_every": 1, "eval_every": 0, "checkpoint_every": 3, "keep_checkpoints": 2}


@pytest.mark.slow
def test_a_rollback_leaves_out_what_came_after_the_checkpoint_and_goes_on_past_the_bad_batches(
    tmp_path, spoil, monkeypatch, capfd
):
    config = run_config(tmp_path, dropout=0.1, **SHORT, max_skipped_updates="1+2")
    # Updates 6 and 7 are bad; the checkpoint of 6 is none to go back to. What follows has the state of step 3:
    # as if updates 4 to 7 had been skipped, by which a run without rollbacks is told what to expect.
    spoil(3, 4, 5, 6)
    plain = run_config(tmp_path, dropout=0.1, **SHORT, max_skipped_updates=9)
    train_and_evaluate(plain, tmp_path / "skipped")
    expected = last_state(plain, tmp_path / "skipped")
    capfd.readouterr()

    spoil(5, 6)
    train_and_evaluate(config, tmp_path / "whole")
    told = capfd.readouterr().err
    samples = TrainingBatches(load_split(config.data, "train", ByteTokenizer()), 8, 16, 0).indices(6)
    named = ", ".join(map(str, samples[:8]))
    assert "at step 7 the gradient of blocks_0/" in told
    going_on = "continuing from the parameters of step 3, with batches after 7"
    assert f"; its batch holds samples {named} and 8 more of the train split; {going_on}" in told
    state = last_state(config, tmp_path / "whole")
    assert int(state.skips.rollbacks) == 1
    assert int(state.skips.total) == int(expected.skips.total) == 4
    # The limit of skipped updates is part of the compiled step, so the two runs may round differently.
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-5)  # Adam enlarges what rounding does
    jax.tree.map(close, (state.params, state.opt_state), (expected.params, expected.opt_state))
    logged = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in logged] == [*range(1, 10), 9]
    assert [event.get("train/rollbacks", 0) for event in logged] == [0, 0, 0, 0, 0, 0, 0, 1, 1, 0]
    straight = events(tmp_path / "skipped")
    found = events(tmp_path / "whole")
    for mine, other in zip(found[:3] + found[7:], straight[:3] + straight[7:], strict=True):
        mine.pop("train/rollbacks", None)
        assert mine.keys() == other.keys()
        for name, value in other.items():
            assert mine[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name

    # Stopped between the two bad updates, where it saves, at a regular step even; and after the rollback.
    put_batch, count = loop.put_batch, iter(range(99))

    def terminated(*arguments):
        if next(count) in (5, 7):
            os.kill(os.getpid(), signal.SIGTERM)
        return put_batch(*arguments)

    monkeypatch.setattr(loop, "put_batch", terminated)
    while not train_and_evaluate(config, tmp_path / "parts"):
        pass
    assert "stopped after step 6" in (told := capfd.readouterr().err)
    assert told.count(going_on) == 1
    assert events(tmp_path / "parts") == events(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, last_state(config, tmp_path / "parts"), state)


@pytest.mark.slow
def test_when_no_rollback_is_left_it_stops_and_the_first_may_go_to_the_beginning(tmp_path, spoil, capfd):
    config = run_config(tmp_path, **{**SHORT, "log_every": 4}, max_skipped_updates="0+1")
    spoil(1, 4)
    with pytest.raises(DivergedError, match=r"at step 5 .* holds samples .*, after 1 rollbacks; lower train\.learning"):
        train_and_evaluate(config, tmp_path / "run")
    assert "continuing from the parameters of step 0, with batches after 3" in capfd.readouterr().err
    # The steps that came after it, before it was noticed, changed nothing and are not logged.
    assert [event["step"] for event in events(tmp_path / "run")] == [1, 4]
    # What was noticed at a regular step was rolled back before that was saved.
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["0", "3"]

    # Where the checkpoint is lost, the run does not begin anew on its own.
    def lose(view):
        folder = view.workdir / "checkpoints" / "0"
        while not folder.exists():  # it is written while training goes on
            time.sleep(0.01)
        shutil.rmtree(folder)

    with pytest.raises(DivergedError, match=r"; no checkpoint at a multiple of train\.checkpoint_every = 3 is left"):
        train_and_evaluate(config, tmp_path / "lost", callbacks=[Call(lose, every=2)])


def test_rollbacks_need_checkpoints():
    said = (
        r"^train\.max_skipped_updates = '0\+1': must have no '\+' unless train.checkpoint_every is a number .*; it is "
    )
    with pytest.raises(ConfigError, match=said + "'10min'"):
        TrainConfig(max_skipped_updates="0+1")
    with pytest.raises(ConfigError, match=said + "0"):
        TrainConfig(max_skipped_updates="0+1", checkpoint_every=0)
    with pytest.raises(ConfigError, match=r"train\.max_skipped_updates = '0\+': must be an integer >= 0, or e.g."):
        TrainConfig(max_skipped_updates="0+")


def test_the_last_regular_checkpoint_is_kept(tmp_path):
    with Checkpoints(tmp_path, keep=1, regular=10) as checkpoints:
        for step in (0, 10, 13, 15):
            checkpoints.save(state_of(step))
        assert int(checkpoints.restore(abstract(state_of(0)), regular=True)[0].step) == 10
        assert int(checkpoints.restore(abstract(state_of(0)))[0].step) == 15
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["10", "15"]


@pytest.mark.slow
def test_a_rollback_takes_up_muons_state_and_the_average_of_the_parameters_too(tmp_path, spoil):
    recipe = {"steps": 3, "checkpoint_every": 2, "optimizer": "muon", "ema": 0.5}
    config = run_config(tmp_path, **{**SHORT, **recipe, "keep_checkpoints": 9}, max_skipped_updates="0+1")
    spoil(2)
    train_and_evaluate(config, tmp_path / "run")
    after = last_state(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "3")
    before = last_state(config, tmp_path / "run")
    assert (int(before.step), int(after.step), int(after.skips.rollbacks)) == (2, 3, 1)
    for one, other in zip((before.params, before.opt_state, before.ema), (after.params, after.opt_state, after.ema)):
        jax.tree.map(np.testing.assert_array_equal, one, other)
