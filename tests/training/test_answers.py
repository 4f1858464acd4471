"""Answers that are right: counted on the device against a count by hand, in training, and where they end a run."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import reference
from tlinformer_jax.analysis.flops import training_flops
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.run import RunConfig, run_config
from tlinformer_jax.data.batches import take_samples
from tlinformer_jax.data.tasks import DEPTHS, REGIONS, answer_batches
from tlinformer_jax.data.tokenizers import build_tokenizer
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.evaluation.report import EvaluationOptions, evaluate_run, evaluate_text
from tlinformer_jax.experiments.driver import run_job
from tlinformer_jax.experiments.job import Job
from tlinformer_jax.experiments.recipes import package_config
from tlinformer_jax.interop import params_to_reference
from tlinformer_jax.training import callbacks, loop
from tlinformer_jax.training.checkpoint import load_run
from tlinformer_jax.training.evaluation import CELLS, answer_sums, eval_step
from tlinformer_jax.training.loss import summed_loss
from tlinformer_jax.training.setup import TrainedRun, build_run, flops_per_token

SECTIONS = {
    "model": {
        "vocab_size": 12,
        "d_model": 16,
        "num_heads": 2,
        "num_blocks": 1,
        "hidden_depth": 0,
        "d_ff": 24,
        "history_window": 4,
        "generation_window": 4,
        "dtype": "float32",
    },
    "train": {
        "steps": 6,
        "batch_size": 16,
        "log_every": 2,
        "eval_every": 2,
        "warmup_steps": 1,
        "checkpoint_every": 2,
        "learning_rate": 1e-2,
    },
    "data": {
        "dataset": "recall",
        "tokenizer": "numbers:12",
        "sequence_length": 18,
        "num_items": 3,
        "examples": 210,
    },
}


def changed(**sections) -> RunConfig:
    return run_config({name: SECTIONS[name] | sections.get(name, {}) for name in SECTIONS})


def events(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_an_answer_is_right_if_all_of_its_tokens_are():
    hits = np.array([[1, 0, 1, 1, 1, 0, 1, 1], [0, 1, 1, 1, 0, 0, 1, 1]], bool)
    starts = np.array([[-1, -1, 1, -1, 3, -1, -1, 6], [-1, -1, -1, 1, -1, -1, 6, 7]])
    cells = np.where(starts >= 0, np.arange(16).reshape(2, 8), -1)
    sums = jax.tree.map(np.asarray, answer_sums(jnp.asarray(hits), jnp.asarray(starts), jnp.asarray(cells)))
    right, answers = np.zeros(8), np.zeros(8)
    by_cell = np.zeros((2, CELLS))
    for row, start in zip(hits, starts):
        for at in np.flatnonzero(start >= 0):
            answers[at] += 1
            right[at] += row[start[at] : at + 1].all()
    for row, start, cell in zip(hits, starts, cells):
        for at in np.flatnonzero(start >= 0):
            by_cell[0, cell[at]] += row[start[at] : at + 1].all()
            by_cell[1, cell[at]] += 1
    np.testing.assert_array_equal(sums["right"], right)
    np.testing.assert_array_equal(sums["answers"], answers)
    np.testing.assert_array_equal([sums["right_cells"], sums["answer_cells"]], by_cell)
    assert right.sum() == 5 < answers.sum() == 6


def test_accuracy_is_that_of_the_logits():
    run = build_run(changed(), build_tokenizer("numbers:12"))
    trained = TrainedRun(run, jax.tree.map(lambda leaf: leaf * 3, run.initial_state().params), 0)
    split = run.split("validation")
    samples = split.task.make(np.arange(21), 18)
    logits = jax.jit(run.model.apply)({"params": trained.params}, jnp.asarray(samples.tokens[:, :-1]))
    chosen = np.argmax(np.asarray(logits), -1)
    report = evaluate_run(trained, split, EvaluationOptions(by_position=True), split="validation")
    figures = report["figures"]
    counts = np.zeros((2, 3, DEPTHS), int)
    nats, by_end = [], np.zeros(18, int)
    for tokens, choices, row, ends in zip(samples.tokens, chosen, np.asarray(logits, float), samples.starts):
        for at in np.flatnonzero(ends >= 0):
            source = next(i for i in range(1, 6, 2) if tokens[i - 1] == tokens[at])
            begin = at // 4 * 4
            region = 0 if source >= begin else 1 if source >= begin - 4 else 2
            right = choices[at] == tokens[at + 1]
            counts[:, region, source * DEPTHS // 18] += (right, 1)
            by_end[at] += right
            nats.append(np.log(np.exp(row[at]).sum()) - row[at][tokens[at + 1]])
    assert counts[1].sum() == 63
    assert figures["accuracy"] == counts[0].sum() / 63
    assert figures["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert figures["chance"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    for number, region in enumerate(REGIONS):
        right, total = counts[:, number].sum(-1)
        assert figures.get(f"accuracy_{region}") == (right / total if total else None)
    assert report["answers"] == {
        region: {"right": counts[0, number].tolist(), "answers": counts[1, number].tolist()}
        for number, region in enumerate(REGIONS)
    }
    assert report["accuracy_by_position"]["right"] == by_end.tolist()


def test_the_states_of_a_word_are_its_labels():
    """Parity: loss, gradient's loss and accuracy are those of the number of ones so far, not of the next token."""
    data = {"dataset": "parity", "tokenizer": "numbers:4", "sequence_length": 18}
    run = build_run(changed(model={"vocab_size": 4}, data=data), build_tokenizer("numbers:4"))
    trained = TrainedRun(run, jax.tree.map(lambda leaf: leaf * 3, run.initial_state().params), 0)
    split = run.split("test")
    words = split.task.make(np.arange(21), 18).tokens[:, :-1]
    labels = 2 + np.cumsum(words, axis=1) % 2
    logits = np.asarray(jax.jit(run.model.apply)({"params": trained.params}, jnp.asarray(words)), float)
    losses = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, labels[..., None], -1)[..., 0]
    report = evaluate_run(trained, split, EvaluationOptions(by_position=True), split="test")
    right = logits.argmax(-1) == labels
    assert report["figures"]["accuracy"] == right.mean()
    assert report["figures"]["accuracy_own"] == right[:, :4].mean()  # the first window, which sees all tokens
    assert report["figures"]["accuracy_history"] == right[:, 8:].mean()
    assert report["figures"]["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert report["accuracy_by_position"]["right"] == right.sum(axis=0).tolist()
    batch = take_samples(split, 18, np.arange(21))
    options = {"model": run.model, "answers": run.answers}
    loss, beside = jax.jit(lambda params: summed_loss(params, batch, jax.random.key(0), **options))(trained.params)
    assert loss == pytest.approx(losses.sum(), rel=1e-5)
    assert beside == right.sum()


COPY = {"dataset": "copy", "tokenizer": "numbers:2048"}


# The whole sequence's readout, of 3 rows in 18; and window by window, of 3 rows in each 4. Of recall the first window
# has no answers, of copies the first two; row 9, the first that has one, is the second of its window.
@pytest.mark.parametrize(
    ("model", "data", "share"),
    [
        ({"memory": ExecutionPlan()}, {}, 0.7),
        pytest.param({"memory": ExecutionPlan(checkpointing=True)}, {}, 0.85, marks=pytest.mark.slow),
        pytest.param({"memory": ExecutionPlan(together=2)}, COPY, 0.7, marks=pytest.mark.slow),
        ({"memory": ExecutionPlan(checkpointing=True, segments=2)}, COPY, 0.85),
        ({"architecture": "transformer"}, COPY, 0.7),
    ],
    ids=["recall", "recall, one by one", "copy, two windows at once", "copy, one by one", "copy, attention"],
)
def test_what_no_answer_needs_is_left_out_and_loss_and_gradient_are_the_same(model, data, share):
    config = changed(model={"vocab_size": 2048, **model}, data={"tokenizer": "numbers:2048", **data})
    run = build_run(config, build_tokenizer("numbers:2048"))
    params = jax.tree.map(lambda leaf: leaf * 3, run.initial_state().params)
    batch = take_samples(run.split("train"), 18, np.array([3, 5, -1]))
    assert batch["weights"].sum() == 2 * run.answers(18).most
    weights = params_to_reference({"params": params}, config.model)
    chosen = np.argmax(reference.logits(weights, config.model, np.asarray(batch["inputs"])), -1)
    batch["labels"] = np.where(np.arange(3)[:, None] == 0, chosen, batch["labels"])  # one sample's answers are right

    def gradient(answers):
        def loss(params, batch):
            key = jax.random.key(0)
            return summed_loss(params, batch, key, model=run.model, answers=answers)

        return jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, batch).compile()

    every, read = gradient(None), gradient(run.answers)
    ((loss, beside), found), ((true_loss, same), truths) = read(params, batch), every(params, batch)
    for value, truth in zip(jax.tree.leaves((loss, found)), jax.tree.leaves((true_loss, truths)), strict=True):
        assert np.linalg.norm(value - truth) <= 1e-5 * np.linalg.norm(truth)
    # Right answers are counted along: those whose label has the greatest logit.
    assert beside == same == ((chosen == batch["labels"]) * batch["weights"]).sum() >= run.answers(18).most
    assert read.cost_analysis()["flops"] < share * every.cost_analysis()["flops"]


def test_model_flops_count_the_head_at_the_answers_alone():
    config = changed(model={"vocab_size": 2048}, data={"tokenizer": "numbers:2048"})
    run = build_run(config, build_tokenizer("numbers:2048"))
    text = training_flops(config.model, 18, first=6) / 18
    assert text - flops_per_token(run, 18) == pytest.approx(6 * 2048 * 16 * 15 / 18)


def same_sums(run, params, batch):
    """The evaluation's sums where what no answer needs is left out, compared with those where nothing is."""
    sums, whole = (
        jax.jit(functools.partial(eval_step, model=run.model, answers=answers))(params, batch)
        for answers in (run.answers, None)
    )
    for found, truth in zip(jax.tree.leaves(sums), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(found, truth, rtol=1e-5)
    return sums


@pytest.mark.parametrize("architecture", ["tlinformer", "transformer"])
def test_an_evaluation_that_leaves_windows_out_finds_the_same(architecture):
    config = changed(model={"architecture": architecture}, data={"dataset": "copy"})
    run = build_run(config, build_tokenizer("numbers:12"))
    split, params = run.split("validation"), jax.tree.map(lambda leaf: leaf * 3, run.initial_state().params)
    (batch,) = answer_batches(split, 18, 21, slice(None), 4, config.model.observed_rows)
    sums = same_sums(run, params, batch)
    assert 0 < sums["right"].sum() < sums["answers"].sum() == 21 * 9


PASSKEYS = {"dataset": "passkey", "tokenizer": "bytes", "sequence_length": 1400, "num_items": 1, "examples": 20}


def test_an_evaluation_asks_for_less_than_training_and_may_be_shorter_than_its_questions():
    data = PASSKEYS | {"num_items": 20, "sequence_length": 1800}
    run = build_run(changed(model={"vocab_size": 257}, data=data), build_tokenizer("bytes"))
    split, params = run.split("validation"), run.initial_state().params
    (batch,) = answer_batches(split, 800, 2, slice(None), 4, run.config.model.observed_rows)
    assert same_sums(run, params, batch)["answers"].sum() == 2
    assert run.answers(800).first == 0


def test_an_evaluation_runs_no_window_before_the_answers():
    """Which is what makes passkeys in a million tokens affordable; see configs/passkey.py."""
    model = {"vocab_size": 257, "history_window": 32, "generation_window": 32, "memory": ExecutionPlan()}
    run = build_run(changed(model=model, data=PASSKEYS), build_tokenizer("bytes"))
    split, params = run.split("test"), run.initial_state().params
    (batch,) = answer_batches(split, 1400, 2, slice(None), 32, run.config.model.observed_rows)
    read, every = (
        jax.jit(functools.partial(eval_step, model=run.model, answers=answers)).lower(params, batch).compile()
        for answers in (run.answers, None)
    )
    assert read.cost_analysis()["flops"] < 0.4 * every.cost_analysis()["flops"]


def test_a_run_of_a_task_is_evaluated_on_all_of_a_text():
    run = build_run(changed(model={"vocab_size": 257}, data=PASSKEYS), build_tokenizer("bytes"))
    trained = TrainedRun(run, run.initial_state().params, 0)
    text = "The quick brown fox jumps over the lazy dog. " * 40
    assert run.answers(1400).first > 1300
    report = evaluate_text(trained, text, EvaluationOptions(by_position=True), text_file="a.txt")
    assert report["tokens"] == sum(report["by_position"]["tokens"]) == len(text)
    assert min(report["by_position"]["loss"]) > 1


@pytest.mark.slow
def test_a_run_that_is_accurate_enough_is_finished(tmp_path, monkeypatch, capsys):
    """Also after an interruption between the evaluation and the save, and bit by bit the same."""
    config = changed(train={"steps": "100@0.01", "log_every": 100})
    (tmp_path / "whole").mkdir()
    result = run_job(Job("whole", config, tmp_path / "whole", "command"))
    said = capsys.readouterr().err
    assert "ends early at an accuracy of 0.01; evaluated every 2 updates\n" in said
    assert re.search(
        r"^step 2: the run ends, because its accuracy 0\.\d{4} has reached 0\.01 \(train.steps", said, re.M
    )
    assert (result["steps"], result["tokens"]) == (2, 2 * 16 * 18)
    assert result["target"] == {"accuracy": 0.01, "reached": True, "most_steps": 100}
    assert result["validation"]["accuracy"] > 0.01
    assert result["history"] == [[2, result["validation"]["loss"], result["validation"]["accuracy"]]]
    assert (result["then"]["evaluate"]["split"], result["then"]["evaluate"]["length"]) == ("test", 18)
    assert [event["step"] for event in events(tmp_path / "whole")] == [1, 2, 2]

    def crash(*_):
        raise RuntimeError("crash")

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.Checkpoints, "record_validation", crash)
        with pytest.raises(RuntimeError, match="crash"):
            loop.train_run(config, tmp_path / "parts")
    for _ in range(2):  # a finished run stays one
        again = loop.train_run(config, tmp_path / "parts")
        assert (again.step, again.figures) == (2, result["validation"])
        assert [event["step"] for event in events(tmp_path / "parts")] == [1, 2, 2]
    whole = load_run(tmp_path / "whole").params
    jax.tree.map(np.testing.assert_array_equal, whole, again.params)


@pytest.mark.slow
def test_where_the_cap_binds_the_record_says_so(tmp_path):
    result = run_job(Job("run", changed(train={"steps": "6@1"}), tmp_path, "command"))
    assert (result["steps"], result["target"]["reached"], result["target"]["most_steps"]) == (6, False, 6)


@pytest.mark.slow
def test_a_curriculum_trains_on_longer_and_longer_samples(tmp_path, monkeypatch, capsys):
    data = {"dataset": "passkey", "tokenizer": "bytes", "sequence_length": 512, "curriculum": "256:3"}
    config = changed(
        model={"vocab_size": 257, "architecture": "transformer"},
        train={"steps": 5, "eval_every": 0, "batch_size": 8, "checkpoint_every": 4},
        data=data | {"examples": 80, "num_items": 1},
    )
    shapes = []
    put_batch = loop.put_batch

    def seen(batch, mesh):
        shapes.append(batch["inputs"].shape)
        return put_batch(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", seen)
    loop.train_run(config, tmp_path / "whole")
    assert shapes == [(16, 256)] * 3 + [(8, 512)] * 2
    assert "first 3 updates on samples of 256 tokens\n" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chance"), [("niah", 1e-7), ("state", 0.5)])
def test_tiny_settings_of_the_memory_suite_train(name, chance, tmp_path):
    config = package_config(name)("tiny")
    config.data.curriculum = ""
    config.train.update(steps=2, warmup_steps=1, eval_every=1)
    result = run_job(Job("tiny", run_config(config), tmp_path, "command", study="retrieval"))
    (first, loss, _), (last, later, accuracy) = result["history"]
    assert (first, last) == (1, 2)
    assert later < loss
    assert accuracy == result["validation"]["accuracy"]
    assert result["then"]["evaluate"]["figures"]["chance"] == chance


def test_what_has_no_answers_cannot_wait_for_them():
    grown = {"dataset": "passkey", "tokenizer": "bytes", "curriculum": "256:3", "sequence_length": 512}
    with pytest.raises(ConfigError, match=r"train\.steps = '9@0.5': must have no @ACCURACY for data.dataset = 'pydoc'"):
        run_config({"train": {"steps": "9@0.5"}})
    with pytest.raises(ConfigError, match=r"train\.steps = '9@2': must be an integer >= 1, epochs such as"):
        changed(train={"steps": "9@2"})
    with pytest.raises(ConfigError, match=r"data\.curriculum = '256:3': must be '' for train\.schedule = 'paper'"):
        changed(train={"schedule": "paper", "steps": "1epoch"}, data=grown)
    with pytest.raises(ConfigError, match=r"data\.curriculum = '256:3': must end before train.steps = 3, but has 3"):
        changed(train={"steps": 3}, data=grown)
