"""Stages: when they end by competence, what is read then, resumed runs, and the windows that they train."""

import functools
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_model import golden_scale
from tests.training.test_answers import changed
from tests.training.test_resume import events
from tlinformer_jax.config.data import DataConfig, Stage
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.data.batches import LAG, StagedReader, TrainingBatches, take_samples
from tlinformer_jax.data.sources import load_split
from tlinformer_jax.data.tokenizers import NumberTokenizer, build_tokenizer
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.parallel.sharding import UNSPLIT
from tlinformer_jax.training import loop
from tlinformer_jax.training.setup import Run, build_run, flops_per_token
from tlinformer_jax.training.step import WINDOW, batch_gradient, initial_competence, record_accuracy

# The accuracy of update u (from 0) is (u % 50) / 50. Of stage 1 the mean of 20 updates, u - 9.5, first reaches 0.5
# after update 35; stage 2 has no goal; in stage 3 the mean never reaches 0.9.
CURRICULA = {"4:100@0.5,8:3,16:40@0.9": Stage(8, 3), "4:100@0.5,4/2:3,16:40@0.9": Stage(4, 3, window=2)}
FIRST = 35 + 1 + LAG


def simulated(curriculum: str, step: int, competence):
    """Runs updates from `step` on until 10 of the last stage; returns lengths, samples, states, ended stages."""
    data = DataConfig(
        dataset="recall",
        tokenizer="numbers:64",
        sequence_length=32,
        num_items=8,
        examples=2000,
        curriculum=curriculum,
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
            number = reader.batches.stage(update)
            if number < len(stages) and stages[number].accuracy:
                accuracy = jnp.float32(update % 50 / 50)
                competence = record(competence, number, stages[number].accuracy, accuracy, jnp.int32(update))
                metrics["stage_ends"] = competence.ends
            states.append(competence)
            reader.after(metrics)
            if stage := reader.ended():
                ended[update + 1] = stage
    return lengths, samples, states, ended


@pytest.mark.parametrize(("curriculum", "second"), CURRICULA.items())
def test_a_stage_ends_a_fixed_number_of_updates_after_its_goal_was_reached(curriculum, second):
    start = initial_competence(DataConfig(dataset="recall", sequence_length=32, curriculum=curriculum).stages)
    lengths, samples, states, ended = simulated(curriculum, 0, start)
    assert lengths == [4] * FIRST + [second.length] * 3 + [16] * 40 + [32] * 10
    assert ended == {
        FIRST: Stage(4, FIRST, 0.5),
        FIRST + 3: second,
        FIRST + 43: Stage(16, 40, 0.9),
    }
    # No sample twice, none left out, whatever was read ahead for the stage that ended.
    order = np.concatenate(samples).tolist()
    assert len(order) == FIRST * 16 + 3 * 64 // second.length + 40 * 4 + 10 * 2 == len(set(order))
    # Taken up again anywhere, also between the announcement and the end, it is the same.
    for step in (1, WINDOW, 35, 36, 37, FIRST - 1, FIRST, FIRST + 1, FIRST + 20):
        rest, again, after, found = simulated(curriculum, step, states[step])
        assert rest == lengths[step:], step
        np.testing.assert_array_equal(np.concatenate(again), np.concatenate(samples[step:]))
        jax.tree.map(np.testing.assert_array_equal, after[-1], states[-1])
        assert found == {end: stage for end, stage in ended.items() if end > step}


ACCURACIES = ["6:9@", "6:9@0", "6:9@1.1", "6:9@x", "6:0@0.5", "6:9@-1", "6:9,6:9@0.5", "6:9@0.5@1"]
WINDOWS = ["6/:9", "6/0:9", "6/x:9", "6/2/2:9", "/2:9", "6:9/2", "6/2:9,6/2:9", "9/2:9,6/2:9"]


@pytest.mark.parametrize("text", ACCURACIES + WINDOWS)
def test_what_is_no_curriculum_is_refused_in_one_line(text):
    with pytest.raises(ConfigError, match=r"data\.curriculum = .*: must be LENGTH:UPDATES, LENGTH/WINDOW:UPD") as told:
        changed(data={"curriculum": text}, train={"steps": 100})
    assert "\n" not in str(told.value)


def test_a_stage_of_open_end_needs_the_number_of_updates():
    assert changed(data={"curriculum": "6:5@.5"}).data.stages == (Stage(6, 5, 0.5),)
    with pytest.raises(ConfigError, match=r"'6:5@.5': must have no @ACCURACY if train.steps is in epochs"):
        changed(data={"curriculum": "6:5@.5"}, train={"steps": "3epochs"})


@pytest.mark.parametrize(("text", "overlap"), [("6/3:9", 0), ("6/8:9", 0), ("6/2:9", 2), ("6/4:9,6/1:9", 1)])
def test_a_windows_size_fits_those_of_the_model(text, overlap):
    assert changed(data={"curriculum": "6/4:3,6/2:2@1"}).data.stages == (Stage(6, 3, window=4), Stage(6, 2, 1, 2))
    allowed = "must have windows that divide model.generation_window = 4 and are longer than model.window_overlap"
    with pytest.raises(ConfigError, match=rf"data\.curriculum = '{text}': {allowed} = {overlap}$"):
        changed(data={"curriculum": text}, model={"window_overlap": overlap}, train={"steps": 100})


def test_the_history_shrinks_like_the_window():
    def sizes(history: int | str, window: int) -> tuple[int | str, int]:
        found = ModelConfig(history_window=history, generation_window=256).with_window(window)
        return found.history_window, found.generation_window

    assert sizes(256, 64) == (64, 64)
    assert sizes(96, 64) == (24, 64)
    assert sizes(2, 64) == (1, 64)
    assert sizes("auto", 64) == ("auto", 64)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["tlinformer", "sliding_window", "transformer"])
def test_a_stages_loss_and_gradient_are_those_of_the_model_with_its_windows(architecture):
    """A transformer ignores them."""
    model = {"architecture": architecture, "num_blocks": 2}
    whole = model | {"history_window": 24, "generation_window": 16}
    scaled = model | {"history_window": 12, "generation_window": 8}
    data = {"sequence_length": 36, "num_items": 5}
    run = build_run(changed(model=whole, data=data | {"curriculum": "36/8:2"}), NumberTokenizer(12))
    small = build_run(changed(model=scaled, data=data), NumberTokenizer(12))
    params = golden_scale(run.config.model)["params"]
    batch = take_samples(run.split("train"), 36, np.arange(4))

    def gradient(run: Run):
        fixed = {"model": run.model, "config": run.config.train, "split": UNSPLIT, "answers": run.answers}
        return jax.jit(functools.partial(batch_gradient, **fixed))(batch, params, jnp.float32(1), jnp.int32(0))

    stage = run.in_stage(0)
    found, expected, other = map(gradient, (stage, small, run))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert (float(found[0]) == float(other[0])) == (architecture == "transformer")
    assert flops_per_token(stage, 36) == flops_per_token(small, 36)


@pytest.mark.slow
def test_a_stage_trains_its_windows_and_evaluations_have_the_models(tmp_path):
    """Two updates are those of a run with small windows, the third and the evaluation in between are not."""
    train = {"steps": 3, "log_every": 1, "eval_every": 2}
    data, small = {"curriculum": "18/2:2"}, {"history_window": 2, "generation_window": 2}
    loop.train_run(changed(train=train, data=data), tmp_path / "stage")
    loop.train_run(changed(train=train, model=small), tmp_path / "small")

    def seen(name: str) -> tuple[list[float], list[float]]:
        logged = events(tmp_path / name)
        return tuple([event[key] for event in logged if key in event] for key in ("train/loss", "eval/loss"))

    (losses, evaluations), (others, again) = seen("stage"), seen("small")
    assert len(losses) == 3
    assert losses[:2] == others[:2]
    assert losses[2] != others[2]
    assert evaluations[0] != again[0]


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 4])
def test_a_run_interrupted_in_and_after_such_a_stage_is_bit_by_bit_the_one_that_was_not(
    before, tmp_path, monkeypatch, capfd
):
    """After `before` updates of a stage with the same length but other windows, and without a goal."""
    config = changed(
        train={"steps": 90, "log_every": 7, "eval_every": 0, "checkpoint_every": 0, "accumulation": 2},
        data={"curriculum": f"6:{before},6/2:76@0.5" if before else "6:80@0.5", "examples": 90 * 48},
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
    stage = f"the stage on samples of 6 tokens{' in windows of 2' * bool(before)} ends after {end - before} updates"
    assert f"step {end}: {stage}: training accuracy has reached" in told
    accuracies = {
        event["step"]: event["train/accuracy"] for event in events(tmp_path / "whole") if "train/accuracy" in event
    }
    assert (min(accuracies) > before, max(accuracies)) == (True, end)

    lengths.clear()
    for stop in (end // 2, end - 2, end - 1, end + 4):
        assert run("parts", stop).figures is None
    parts = run("parts")
    assert lengths == [6] * end + [18] * (90 - end)
    assert capfd.readouterr().err.count("the stage on samples") == 1 + bool(before)
    jax.tree.map(np.testing.assert_array_equal, whole.params, parts.params)
    assert events(tmp_path / "parts") == events(tmp_path / "whole")
