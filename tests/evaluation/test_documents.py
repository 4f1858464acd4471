"""Losses by document, against what each token costs by the NumPy reference, with the documents' borders known."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.evaluation.runs import LENGTH, MODEL, costs, trained, weights
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.batches import label_documents
from tlinformer_jax.data.documents import MOST_DOCUMENTS, DocumentStream, document_numbers
from tlinformer_jax.data.given import given_loader
from tlinformer_jax.data.sources import load_split
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tokenizers import ByteTokenizer
from tlinformer_jax.evaluation.bootstrap import mean_interval
from tlinformer_jax.evaluation.report import EvaluationOptions, evaluate_run, lines
from tlinformer_jax.experiments.actions import run_action
from tlinformer_jax.interop import params_from_reference
from tlinformer_jax.training.setup import Run, TrainedRun, build_run

END = 256
# 57 tokens: at N = 12 no sample ends where a document does, one document has only its end-of-text, and one sample holds
# parts of four documents. 8 labels are left after the last whole sample.
SIZES = (17, 9, 0, 3, 23)
TEXTS = [np.random.default_rng(5).integers(0, END, size) for size in SIZES]
TOKENS = np.concatenate([np.append(text, END) for text in TEXTS]).astype(np.uint16)
OWNERS = np.repeat(np.arange(len(SIZES)), np.array(SIZES) + 1)
STREAM = TokenStream(TOKENS, num_bytes=sum(SIZES), num_documents=len(SIZES), sha256="a1")


def truth(length: int, rest: bool) -> tuple[list[float], list[int]]:
    """Losses and tokens of every document, token by token."""
    samples = costs(TOKENS, length)
    every = np.concatenate(samples if rest else [sample for sample in samples if len(sample) == length])
    owners = OWNERS[1 : len(every) + 1]
    return [every[owners == number].sum() for number in range(5)], [(owners == number).sum() for number in range(5)]


def check(part, length: int, rest: bool) -> None:
    losses, tokens = truth(length, rest)
    assert part["by_document"]["tokens"] == tokens
    assert sum(tokens) == part["tokens"]
    np.testing.assert_allclose(part["by_document"]["loss"], losses, rtol=1e-5)
    assert sum(part["by_document"]["loss"]) / sum(tokens) == pytest.approx(part["figures"]["loss"], rel=1e-6)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_each_token_counts_for_its_own_document(batch_size):
    """Also in batches of three, of which the last is padded with samples, and the last sample with tokens."""
    report = evaluate_run(trained(), STREAM, EvaluationOptions(lengths=(LENGTH, 5), batch_size=batch_size))
    check(report, LENGTH, rest=False)
    for part, length in zip(report["by_length"], (LENGTH, 5), strict=True):
        check(part, length, rest=True)
    assert report["by_document"]["tokens"] == [17, 10, 1, 4, 16], "the last 8 labels are in no whole sample"
    assert report["by_document"]["sha256"] == "a1"


@pytest.mark.parametrize("devices", [1, 2])
def test_devices_find_what_one_does(devices):
    """Two devices hold halves of a batch of four samples, of five."""
    run = trained().run
    run = build_run(run.config, ByteTokenizer(), devices=jax.devices()[:devices])
    params = params_from_reference(weights(MODEL), MODEL)["params"]
    params = jax.device_put(params, run.shardings.params)
    report = evaluate_run(TrainedRun(run, params, 7), STREAM, EvaluationOptions(length=LENGTH, batch_size=4))
    assert report["batch_size"] == 4
    assert run.mesh.size == devices
    check(report, LENGTH, rest=True)


def test_packed_documents_have_their_own_losses():
    """Under data.document_masking each document is alone: its tokens cost what they cost in samples of its own."""
    data = DataConfig(dataset="pydoc", tokenizer="bytes", sequence_length=LENGTH, document_masking=True)
    config = dataclasses.replace(MODEL, architecture="transformer", num_blocks=1)
    run = build_run(RunConfig(config, TrainConfig(batch_size=4), data), ByteTokenizer())
    params = jax.device_put(params_from_reference(weights(config), config)["params"], run.shardings.params)
    stream = run.checked("validation", STREAM)
    assert isinstance(stream, DocumentStream)
    owners, new = (next(label_documents(one, END, LENGTH, 8)) for one in (stream, DocumentStream.of(STREAM, END)))
    assert (owners == new).all(), "also of a split that was not packed before"
    result = run.evaluate(params, stream, rest=True).documents
    ends = np.flatnonzero(TOKENS == END)
    starts = [0, *ends[:-1]]
    expected = [np.concatenate(costs(TOKENS[start : end + 1], LENGTH, config)) for start, end in zip(starts, ends)]
    assert result.tokens.tolist() == [len(part) for part in expected] == [17, 10, 1, 4, 24]
    np.testing.assert_allclose(result.losses, [part.sum() for part in expected], rtol=1e-5)


def test_a_step_without_token_losses_needs_no_documents(monkeypatch):
    """To find the documents of a large text takes long."""
    monkeypatch.setattr("tlinformer_jax.data.batches.document_numbers", lambda *_: pytest.fail("searched the split"))
    sums = trained().run.sums_over(STREAM, lambda params, batch: {"weights": batch["weights"].sum(axis=0)}, {})
    assert sums.keys() == {"weights"}


def test_the_action_of_a_sweep_reports_them_too(monkeypatch):
    monkeypatch.setattr(Run, "split", lambda self, name, length=None: STREAM)
    for name, length in (("evaluate", LENGTH), ("evaluate@5", 5)):
        check(run_action(name, trained()), length, rest=True)


def test_the_documents_of_texts_are_known():
    data = DataConfig(dataset="pydoc", tokenizer="bytes")
    stream = load_split(data, "validation", ByteTokenizer())
    numbers = document_numbers(stream, END)
    assert 2 < stream.num_documents == numbers[-1] + 1
    assert (np.flatnonzero(np.diff(numbers)) == np.flatnonzero(stream.tokens == END)[:-1]).all()
    documents = [[1, 2, 3], [4], [5, 6]]
    given = given_loader({"train": documents, "validation": documents}, 257)(data, "validation", ByteTokenizer())
    assert document_numbers(given, END).tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize(
    "change",
    [
        {"num_documents": 0},
        {"num_documents": 4},
        {"tokens": TOKENS[:-1]},
        {"tokens": np.roll(TOKENS, 1)},
        {"tokens": np.append(np.full(MOST_DOCUMENTS + 1, END), TOKENS), "num_documents": MOST_DOCUMENTS + 6},
        {"tokens": TOKENS[:18], "num_documents": 1},
    ],
    ids=["unknown", "another number", "no end", "begins with an end", "too many", "one"],
)
def test_documents_that_are_not_known_are_left_out(change):
    stream = dataclasses.replace(STREAM, **change)
    assert document_numbers(stream, END) is None
    report = evaluate_run(trained(), stream)
    assert "by_document" not in report
    assert not any("documents" in line for line in lines(report))


def test_the_interval_is_of_the_mean_over_drawn_documents():
    """Against draws of whole documents with another generator."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(100, 5000, 12)
    losses = tokens * (4 + 0.2 * rng.standard_normal(12))
    drawn = rng.integers(0, 12, (100_000, 12))
    expected = np.quantile(losses[drawn].sum(1) / tokens[drawn].sum(1), [0.025, 0.975])
    count, *found = mean_interval([*losses, 0.0], [*tokens, 0])
    assert count == 12, "a document without tokens is none"
    np.testing.assert_allclose(found, expected, atol=0.01 * (expected[1] - expected[0]) + 0.005)
    assert mean_interval(losses, tokens) == (12, *found)
    # All documents alike: the mean is certain. Few documents: the interval is wide.
    np.testing.assert_allclose(mean_interval(4 * tokens, tokens)[1:], 4)
    few = mean_interval(losses[:3], tokens[:3])
    assert few[2] - few[1] > found[1] - found[0]
    assert np.isnan(mean_interval([3.0, 0.0], [2, 0])[1])
    assert np.isnan(mean_interval([3.0, None], [2, 1])[1])


def test_an_evaluation_prints_the_interval():
    report = evaluate_run(trained(), STREAM)
    count, low, high = mean_interval(*(report["by_document"][name] for name in ("loss", "tokens")))
    assert low < report["figures"]["loss"] < high
    assert f"  loss, 95% over {count} documents: {low:.5g} to {high:.5g}" in lines(report)
