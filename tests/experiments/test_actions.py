"""The action `evaluate`: what it counts, and on which splits; the actions of a model without windows."""

import dataclasses

import numpy as np
import pytest

from tests.evaluation.runs import LENGTH, costs, trained
from tests.evaluation.test_report import STREAM
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.experiments.actions import evaluated_splits, possible_actions, run_action
from tlinformer_jax.models import ModelConfig
from tlinformer_jax.training.setup import Run

OTHER = dataclasses.replace(STREAM, tokens=STREAM.tokens[:30])
SPLITS = {"validation": STREAM, "test": OTHER}


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The splits that were asked for."""
    names: list[str] = []
    monkeypatch.setattr(Run, "split", lambda self, name, length=None: names.append(name) or SPLITS[name])
    return names


def test_evaluations_at_all_lengths_count_the_same_tokens(asked):
    run = trained()
    parts = [run_action(name, run) for name in ("evaluate", "evaluate@8", "evaluate@20")]
    assert [part["tokens"] for part in parts] == [len(STREAM.tokens) - 1] * 3
    assert [part["length"] for part in parts] == [LENGTH, 8, 20]
    assert asked == [part["split"] for part in parts] == ["validation"] * 3
    assert not any("test" in part for part in parts)


def test_a_text_with_test_files_is_evaluated_on_them_too(asked):
    run = trained()
    config = run.run.config
    own = dataclasses.replace(config, data=dataclasses.replace(config.data, test_files="/books/test.txt"))
    result = run_action("evaluate@8", dataclasses.replace(run, run=dataclasses.replace(run.run, config=own)))
    assert asked == ["validation", "test"]
    for part, split in ((result, "validation"), (result["test"], "test")):
        nats = np.concatenate(costs(SPLITS[split].tokens, 8))
        assert (part["split"], part["length"], part["tokens"]) == (split, 8, len(nats))
        assert part["figures"]["loss"] == pytest.approx(nats.mean(), abs=1e-5)
        assert part["by_position"]["loss"][0] == pytest.approx(nats[::8].mean(), abs=1e-5)


def test_splits_that_are_evaluated():
    task = {"dataset": "recall", "tokenizer": "numbers:64"}
    text = {"dataset": "text", "train_files": "a.txt", "validation_files": "b.txt"}
    assert evaluated_splits(DataConfig(**task)) == ("test",)
    assert evaluated_splits(DataConfig(**text)) == ("validation",)
    assert evaluated_splits(DataConfig(**text, test_files="c.txt")) == ("validation", "test")


@pytest.mark.parametrize(
    ("length", "window", "left_out"), [(64, 32, ()), (64, 64, ("history", "history@64")), (65, 64, ("history@64",))]
)
def test_history_is_for_samples_of_several_windows(length, window, left_out):
    names = ("evaluate", "history", "evaluate@64", "history@64", "samples")
    config = RunConfig(ModelConfig(generation_window=window), TrainConfig(), DataConfig(sequence_length=length))
    assert possible_actions(names, config) == tuple(name for name in names if name not in left_out)
