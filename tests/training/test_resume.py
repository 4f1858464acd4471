"""A run that is interrupted in every way is, bit by bit, the run that never was."""

import json
import os
import pathlib
import signal

import jax
import numpy as np
import pytest

from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.tokenizers import ByteTokenizer
from tlinformer_jax.models import ModelConfig
from tlinformer_jax.training import callbacks, loop, setup
from tlinformer_jax.training.checkpoint import restore_params
from tlinformer_jax.training.loop import train_and_evaluate

SPEED = {f"train/{name}" for name in ("tokens_per_second", "tflops", "mfu", "input_wait", "save_wait")}


def run_config(folder: pathlib.Path, dropout: float = 0.0, **train) -> RunConfig:
    """Accumulation, shuffling; epochs of 60 samples, so that the fourth update of 16 straddles two. Dropout takes half
    of a step's compilation, so only runs whose bits must not depend on its draws have it."""
    rng = np.random.default_rng(0)
    for name, size in (("train", 60 * 8 + 5), ("validation", 8 * 16 * 3)):
        (folder / f"{name}.txt").write_bytes(rng.integers(97, 123, size, np.uint8).tobytes())
    return RunConfig(
        model=ModelConfig(
            vocab_size=257,
            d_model=16,
            num_heads=2,
            num_blocks=1,
            hidden_depth=0,
            d_ff=32,
            history_window=4,
            generation_window=4,
            dropout=dropout,
            dtype="float32",
        ),
        train=TrainConfig(
            **{
                "steps": 6,
                "batch_size": 16,
                "accumulation": 2,
                "learning_rate": 1e-2,
                "warmup_steps": 2,
                "log_every": 3,
                "eval_every": 3,
                "checkpoint_every": 5,
                "keep_checkpoints": "2+1",
                **train,
            }
        ),
        data=DataConfig(
            dataset="text",
            tokenizer="bytes",
            sequence_length=8,
            train_files=str(folder / "train.txt"),
            validation_files=str(folder / "validation.txt"),
        ),
    )


def events(workdir: pathlib.Path) -> list[dict[str, float]]:
    """All that was logged, without what depends on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in SPEED} for line in lines]


def assert_same_parameters(config: RunConfig, one: pathlib.Path, other: pathlib.Path) -> None:
    """Both runs have reached step 6 with the same bits."""
    abstract = setup.build_run(config, ByteTokenizer()).abstract_state.params
    (step, params), (again, others) = restore_params(one, abstract), restore_params(other, abstract)
    assert step == again == 6
    jax.tree.map(np.testing.assert_array_equal, params, others)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.slow
def test_interrupted_and_uninterrupted_runs_are_bit_identical(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("tlinformer_jax.config.train.EVALUATION_TOKENS", 1)  # an evaluation has several batches
    config = run_config(tmp_path, dropout=0.1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    figures = train_and_evaluate(config, whole)
    handler = signal.getsignal(signal.SIGTERM)

    # A signal while step 3 is evaluated.
    batches = setup.evaluation_batches

    def interrupted(*arguments):
        for number, batch in enumerate(batches(*arguments)):
            if number == 1:
                terminate()
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(setup, "evaluation_batches", interrupted)
        assert train_and_evaluate(config, parts) == {}
    assert "stopped after step 3" in capfd.readouterr().err
    assert [event["step"] for event in events(parts)] == [1, 3]

    # It is made up for; then a signal in step 4, which nothing else would log or save.
    put_batch = loop.put_batch

    def terminated(*arguments):
        terminate()
        return put_batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "put_batch", terminated)
        assert train_and_evaluate(config, parts) == {}
    assert "stopped after step 4" in capfd.readouterr().err

    # A crash after step 6, past the last checkpoint; a kill tears the line it was writing.
    log_step = callbacks.log_step

    def crashing(log, step, *rest):
        log_step(log, step, *rest)
        if step == 6:
            raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(callbacks, "log_step", crashing)
        with pytest.raises(RuntimeError, match="crash"):
            train_and_evaluate(config, parts)
    with open(parts / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "eva')
    # And damage to the newest checkpoint.
    assert sorted(path.name for path in (parts / "checkpoints").iterdir()) == ["3", "4", "5"]
    data = parts / "checkpoints" / "5" / "state" / "_METADATA"
    data.write_bytes(data.read_bytes()[:-1])
    assert train_and_evaluate(config, parts) == figures
    told = capfd.readouterr().err
    assert "_METADATA has" in told
    assert "continuing from step 4" in told

    assert signal.getsignal(signal.SIGTERM) is handler
    assert events(parts) == events(whole)
    assert [event["step"] for event in events(whole)] == [1, 3, 3, 5, 6, 6]
    assert_same_parameters(config, whole, parts)

    # Starting a finished run again evaluates again, and doubles nothing.
    assert train_and_evaluate(config, parts) == figures
    assert events(parts) == events(whole)
