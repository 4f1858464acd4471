"""Stages that end by competence: when, what is read then, and that interrupted runs change stage at the same update."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_answers import changed
from tests.training.test_resume import events
from tlinformer_jax.config.data import DataConfig, Stage
from tlinformer_jax.data.batches import LAG, StagedReader, TrainingBatches
from tlinformer_jax.data.sources import load_split
from tlinformer_jax.data.tokenizers import build_tokenizer
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.training import loop
from tlinformer_jax.training.step import WINDOW, initial_competence, record_accuracy

# The accuracy of update u (from 0) is (u % 50) / 50. Of stage 1 the mean of 20 updates, u - 9.5, first reaches 0.5
# after update 35; stage 2 has no goal; in stage 3 the mean never reaches 0.9.
CURRICULUM = "4:100@0.5,8:3,16:40@0.9"
FIRST = 35 + 1 + LAG


def simulated(step: int, competence):
    """Runs updates from `step` on until 10 of the last stage; returns lengths, samples, states, ended stages."""
    data = DataConfig(
        dataset="recall",
        tokenizer="numbers:64",
        sequence_length=32,
        num_items=8,
        examples=2000,
        curriculum=CURRICULUM,
    )
    stages, split = data.stages, load_split(data, "train", build_tokenizer(data.tokenizer))
    batches = TrainingBatches(split, 32, 2, seed=0, stages=stages)
    record = jax.jit(record_accuracy, static_argnums=(1, 2))
    lengths, samples, states, ended = [], [], [competence], {}
    with StagedReader(batches, competence.ends, step, slice(None)) as reader:
        for update in range(step, FIRST + 3 + 40 + 10):
            batch = next(reader)
            lengths.append(batch["inputs"].shape[1])
            samples.append(reader.batches.indices(update))
            metrics = {}
            number = {4: 0, 16: 2}.get(lengths[-1])
            if number is not None:
                accuracy = jnp.float32(update % 50 / 50)
                competence = record(competence, number, stages[number].accuracy, accuracy, jnp.int32(update))
                metrics["stage_ends"] = competence.ends
            states.append(competence)
            reader.after(metrics)
            if stage := reader.ended():
                ended[update + 1] = stage
    return lengths, samples, states, ended


def test_a_stage_ends_a_fixed_number_of_updates_after_its_goal_was_reached():
    start = initial_competence(DataConfig(dataset="recall", sequence_length=32, curriculum=CURRICULUM).stages)
    lengths, samples, states, ended = simulated(0, start)
    assert lengths == [4] * FIRST + [8] * 3 + [16] * 40 + [32] * 10
    assert ended == {
        FIRST: Stage(4, FIRST, 0.5),
        FIRST + 3: Stage(8, 3),
        FIRST + 43: Stage(16, 40, 0.9),
    }
    # No sample twice, none left out, whatever was read ahead for the stage that ended.
    order = np.concatenate(samples).tolist()
    assert len(order) == FIRST * 16 + 3 * 8 + 40 * 4 + 10 * 2 == len(set(order))
    # Taken up again anywhere, also between the announcement and the end, it is the same.
    for step in (1, WINDOW, 35, 36, 37, FIRST - 1, FIRST, FIRST + 1, FIRST + 20):
        rest, again, after, found = simulated(step, states[step])
        assert rest == lengths[step:], step
        np.testing.assert_array_equal(np.concatenate(again), np.concatenate(samples[step:]))
        jax.tree.map(np.testing.assert_array_equal, after[-1], states[-1])
        assert found == {end: stage for end, stage in ended.items() if end > step}


@pytest.mark.parametrize("text", ["6:9@", "6:9@0", "6:9@1.1", "6:9@x", "6:0@0.5", "6:9@-1", "6:9,6:9@0.5", "6:9@0.5@1"])
def test_what_is_no_curriculum_is_refused_in_one_line(text):
    with pytest.raises(
        ConfigError, match=r"data\.curriculum = .*: must be LENGTH:UPDATES or LENGTH:UPDATES@AC"
    ) as told:
        changed(data={"curriculum": text}, train={"steps": 100})
    assert "\n" not in str(told.value)


def test_a_stage_of_open_end_needs_the_number_of_updates():
    assert changed(data={"curriculum": "6:5@.5"}).data.stages == (Stage(6, 5, 0.5),)
    with pytest.raises(ConfigError, match=r"'6:5@.5': must have no @ACCURACY if train.steps is in epochs"):
        changed(data={"curriculum": "6:5@.5"}, train={"steps": "3epochs"})


@pytest.mark.slow
def test_a_run_interrupted_in_and_after_such_a_stage_is_bit_by_bit_the_one_that_was_not(tmp_path, monkeypatch, capfd):
    config = changed(
        train={"steps": 90, "log_every": 7, "eval_every": 0, "checkpoint_every": 0, "accumulation": 2},
        data={"curriculum": "6:80@0.5", "examples": 90 * 48},
    )
    lengths, put_batch = [], loop.put_batch

    def run(name: str, last: int | None = None):
        """Trains; asks for a stop in the update after `last` updates of this call."""

        def put(batch, mesh):
            lengths.append(batch["inputs"].shape[1])
            if last is not None and len(lengths) > last:
                os.kill(os.getpid(), signal.SIGTERM)
            return put_batch(batch, mesh)

        monkeypatch.setattr(loop, "put_batch", put)
        return loop.train_run(config, tmp_path / name)

    whole = run("whole")
    end, told = lengths.count(6), capfd.readouterr().err
    assert WINDOW + LAG < end < 80, "the stage ended neither at once nor by the calendar"
    assert lengths == [6] * end + [18] * (90 - end)
    assert f"step {end}: the stage on samples of 6 tokens ends after {end} updates: training accuracy has rea" in told
    accuracies = {
        event["step"]: event["train/accuracy"] for event in events(tmp_path / "whole") if "train/accuracy" in event
    }
    assert max(accuracies) == end

    lengths.clear()
    for stop in (end // 2, end - 2, end - 1, end + 4):
        assert run("parts", stop).figures is None
    parts = run("parts")
    assert lengths == [6] * end + [18] * (90 - end)
    assert capfd.readouterr().err.count("the stage on samples") == 1
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
    assert events(tmp_path / "parts") == events(tmp_path / "whole")
