"""The moving average of the parameters: its values, and who uses it."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from tests.training.test_resume import events, run_config
from tests.training.test_skips import MODEL
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.tokenizers import ByteTokenizer
from tlinformer_jax.models import build_model
from tlinformer_jax.training import setup
from tlinformer_jax.training.checkpoint import load_params
from tlinformer_jax.training.loop import train_and_evaluate
from tlinformer_jax.training.optimizer import Horizon
from tlinformer_jax.training.saving import Checkpoints
from tlinformer_jax.training.step import init_state, train_step

RECIPE = {"optimizer": "muon", "learning_rate": 0.05, "schedule": "wsd:0.5", "z_loss": 1e-3, "ema": 0.9}


def test_it_follows_the_parameters_and_skipped_updates_leave_it():
    """Its decay is bounded by (1 + n) / (10 + n), of n updates that counted."""
    config = TrainConfig(ema=0.15, max_skipped_updates=2, warmup_steps=0, schedule="constant", learning_rate=0.1)
    model = build_model(MODEL)
    step = jax.jit(lambda state, batch: train_step(state, batch, model=model, config=config, horizon=Horizon(9, 9)))
    tokens = np.random.default_rng(0).integers(0, 11, (2, 9)).astype(np.int32)
    batch = {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": np.ones((2, 8), np.float32)}
    state = init_state(jax.random.key(0), model, config, Horizon(9, 9))
    mean = np.asarray(state.params["embedding"], np.float64)
    for decay in (1 / 10, None, 0.15, 0.15):
        weights = np.full((2, 8), 1 if decay else np.nan, np.float32)
        state, _ = step(state, {**batch, "weights": weights})
        if decay:
            mean = decay * mean + (1 - decay) * np.asarray(state.params["embedding"], np.float64)
        assert state.ema["embedding"].dtype == np.float32
        np.testing.assert_allclose(state.ema["embedding"], mean, atol=1e-6)
        np.testing.assert_array_equal(state.evaluated["embedding"], state.ema["embedding"])
    assert np.abs(mean - np.asarray(state.params["embedding"], np.float64)).max() > 1e-3


def last_state(config, workdir):
    run = setup.build_run(config, ByteTokenizer())
    with Checkpoints(workdir, 9) as checkpoints:
        return run, checkpoints.restore(run.abstract_state)[0]


@pytest.mark.slow
def test_evaluations_and_readers_of_checkpoints_use_it_and_a_run_with_every_recipe_goes_on_exactly(tmp_path):
    often = {"log_every": 1, "eval_every": 0, "checkpoint_every": 2, "keep_checkpoints": 9}
    config = run_config(tmp_path, dropout=0.1, steps=4, **often, **RECIPE)
    whole, part, tuned = tmp_path / "whole", tmp_path / "part", tmp_path / "tuned"
    figures = train_and_evaluate(config, whole)
    run, state = last_state(config, whole)
    read = load_params(whole, config.model)[1]
    jax.tree.map(np.testing.assert_array_equal, read, state.ema)
    assert np.abs(np.asarray(read["embedding"]) - np.asarray(state.params["embedding"])).max() > 1e-3
    split = run.split("validation")
    assert run.evaluate(state.ema, split).loss == pytest.approx(figures["loss"], rel=1e-6)
    assert run.evaluate(state.params, split).loss != pytest.approx(figures["loss"], rel=1e-4)

    # What a run that was stopped after step 2 has left.
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints" / "4")
    train_and_evaluate(config, part)
    jax.tree.map(np.testing.assert_array_equal, last_state(config, part)[1], state)
    assert events(part)[-1] == events(whole)[-1]

    # Another run from its parameters; both the parameters and their average begin with them.
    train_and_evaluate(dataclasses.replace(config, train=dataclasses.replace(config.train, seed=1)), tuned, None, whole)
    for step in (2, 4):
        shutil.rmtree(tuned / "checkpoints" / str(step), ignore_errors=True)
    start = last_state(config, tuned)[1]
    assert int(start.step) == 0
    jax.tree.map(np.testing.assert_array_equal, (start.params, start.ema), (state.ema, state.ema))
