"""Perplexity of any text, against the NumPy reference on samples cut by hand."""

import json
import math

import numpy as np
import pytest

from tests.evaluation.runs import LENGTH, costs, trained
from tlinformer_jax import text_perplexity
from tlinformer_jax.errors import UserError
from tlinformer_jax.evaluation.report import EvaluationOptions, evaluate_text, text_source

LONG = "Größe is a word.\nSo is this one, said he.\n"  # 44 bytes
SHORT = "two words"


def expected(text: str, length: int) -> np.ndarray:
    """Nats of every byte of the text, the first one predicted from the end-of-text."""
    return np.concatenate(costs(np.array([256, *text.encode()]), length))


@pytest.mark.parametrize(
    ("text", "length", "words"),
    [(LONG, None, 10), (LONG, 7, 10), (SHORT, None, 2), (SHORT, 10**9, 2), ("a", None, 1)],
    ids=["long", "samples of 7", "shorter than a sample", "much shorter", "one byte"],
)
def test_figures_are_those_of_hand(text, length, words):
    found = text_perplexity(trained(), text, length)
    nats = expected(text, length or LENGTH)
    assert (found.tokens, found.bytes, found.words) == (len(nats), len(text.encode()), words)
    assert found.loss == pytest.approx(nats.mean(), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats.mean()), rel=1e-4)
    assert found.perplexity_per_word == pytest.approx(math.exp(nats.sum() / words), rel=1e-3)
    assert found.bits_per_byte == pytest.approx(nats.sum() / math.log(2) / len(text.encode()), rel=1e-5)


def test_a_text_without_words():
    found = text_perplexity(trained(), "\n \n")
    assert found.perplexity_per_word is None
    assert found.loss == pytest.approx(expected("\n \n", LENGTH).mean(), rel=1e-5)


def test_every_token_of_a_text_counts_at_every_length():
    options = EvaluationOptions(by_position=True, lengths=(7,))
    report = evaluate_text(trained(), LONG, options, text_file="a.txt", command=["x"])
    assert "split" not in report
    assert (report["text_file"], report["tokens"], report["step"]) == ("a.txt", 44, 7)
    assert [sum(part["by_position"]["tokens"]) for part in (report, *report["by_length"])] == [44, 44]
    assert report["by_length"][0]["figures"]["loss"] == pytest.approx(expected(LONG, 7).mean(), rel=1e-5)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    short = evaluate_text(trained(), SHORT, EvaluationOptions(by_position=True), text_file="b.txt")
    assert short["by_position"]["edges"] == list(range(len(SHORT) + 1))
    np.testing.assert_allclose(short["by_position"]["loss"], expected(SHORT, LENGTH), rtol=1e-5)


def test_texts_that_cannot_be_evaluated():
    for text, says in (("", "text: must hold some text"), ("a\udcff", "text: must be text")):
        with pytest.raises(UserError, match=says):
            text_perplexity(trained(), text)
    with pytest.raises(UserError, match="text: must be a str, not list"):
        text_perplexity(trained(), [1, 2])
    with pytest.raises(UserError, match=r"evaluation\.length = 0"):
        text_perplexity(trained(), "a", length=0)
    with pytest.raises(UserError, match=r"evaluation\.lengths = 99: must be at most 9 for b.txt"):
        evaluate_text(trained(), SHORT, EvaluationOptions(lengths=(99,)), text_file="b.txt")


def test_a_long_text_is_tokenised_whole():
    text = "word " * 100_000
    source = text_source(text, trained().run.tokenizer)
    assert (source.stream.tokens[0], len(source.stream.tokens)) == (256, len(text) + 1)
    assert bytes(source.counted.tokens.astype(np.uint8)).decode() == text
    assert source.counted.num_words == 100_000
