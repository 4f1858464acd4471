"""Updates that are not finite: left out as if they had not been, counted, and the end of the run when too many."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_resume import run_config
from tlinformer_jax.config.train import OPTIMIZERS, TrainConfig
from tlinformer_jax.models import ModelConfig, build_model
from tlinformer_jax.training import setup
from tlinformer_jax.training.callbacks import DivergedError
from tlinformer_jax.training.loop import train_and_evaluate
from tlinformer_jax.training.optimizer import Horizon
from tlinformer_jax.training.step import Skips, count_skips, init_state, train_step

MODEL = ModelConfig(
    vocab_size=11,
    d_model=8,
    num_heads=2,
    num_blocks=1,
    hidden_depth=0,
    d_ff=8,
    history_window=4,
    generation_window=4,
    dtype="float32",
    architecture="transformer",
)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_batch_leaves_everything_but_the_step_and_the_next_update_is_the_one_it_would_have_been(optimizer):
    recipe = {"optimizer": optimizer, "warmup_steps": 0, "schedule": "constant", "learning_rate": 0.1}
    config = TrainConfig(max_skipped_updates=2, **recipe)
    model = build_model(MODEL)
    step = jax.jit(lambda state, batch: train_step(state, batch, model=model, config=config, horizon=Horizon(9, 9)))
    tokens = np.random.default_rng(0).integers(0, 11, (2, 9)).astype(np.int32)
    good = {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": np.ones((2, 8), np.float32)}
    bad = {**good, "weights": np.where(np.arange(8) == 3, np.nan, good["weights"]).astype(np.float32)}
    start = init_state(jax.random.key(0), model, config, Horizon(9, 9))
    straight, _ = step(start, good)
    skipped, metrics = step(start, bad)
    assert (int(skipped.step), int(metrics["skips"].total), int(metrics["skips"].in_a_row)) == (1, 1, 1)
    jax.tree.map(np.testing.assert_array_equal, (skipped.params, skipped.opt_state), (start.params, start.opt_state))
    after, metrics = step(skipped, good)
    assert (int(after.step), int(after.skips.total), int(after.skips.in_a_row)) == (2, 1, 0)
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (straight.params, straight.opt_state))
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), straight.params, start.params)
    assert changed["embedding"]

    # Three in a row are one too many: from then on nothing changes, whatever the batch.
    for batch in (bad, bad, bad, good, bad):
        after, metrics = step(after, batch)
    assert (int(after.step), int(after.skips.total), int(after.skips.in_a_row)) == (5, 4, 3)
    assert int(metrics["step"]) == 5
    jax.tree.map(np.testing.assert_array_equal, after.params, straight.params)


@pytest.mark.parametrize(
    ("loss", "grads", "first", "number"),
    [
        (1.0, [[1.0, 2.0], [3.0]], None, 0),
        (NAN, [[1.0, 2.0], [3.0]], -1, 0),
        (1.0, [[1.0, 2.0], [INF]], 1, 1),
        (INF, [[1.0, NAN], [-INF]], 0, 2),
        (1.0, [[1e30, 0.0], [0.0]], 0, 1),  # its norm overflows
    ],
)
def test_what_is_not_finite_is_found(loss, grads, first, number):
    good, stopped, skips = count_skips(Skips(), jnp.float32(loss), [jnp.asarray(leaf) for leaf in grads], 0)
    assert bool(good) == (first is None)
    assert not stopped
    if first is not None:
        assert (int(skips.in_a_row), int(skips.first_nonfinite), int(skips.nonfinite)) == (1, first, number)


def test_a_run_names_the_step_and_the_parameters_and_keeps_its_last_checkpoint(tmp_path, monkeypatch):
    """Update 3 on, one bias's gradient is NaN; what is logged only every 4 steps is found all the same."""
    config = run_config(tmp_path, steps=8, log_every=4, eval_every=0, checkpoint_every=2, max_skipped_updates=1)
    whole = setup.jit_train_step

    def poisoned(*shardings, **settings):
        step = whole(*shardings, **settings)

        def run(state, batch):
            if int(state.step) == 2:
                spoilt = state.params["blocks_0"]["restore"]
                state.params["blocks_0"]["restore"] = {**spoilt, "qkv_bias": spoilt["qkv_bias"] * jnp.nan}
            return step(state, batch)

        run.lower = step.lower
        return run

    monkeypatch.setattr(setup, "jit_train_step", poisoned)
    message = r"at step 4 the .* not finite.*train\.max_skipped_updates = 1 before it were skipped"
    with pytest.raises(DivergedError, match=message):
        train_and_evaluate(config, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert (lines[-1]["train/skipped_updates"], lines[-1]["train/loss"]) == (2, None)
