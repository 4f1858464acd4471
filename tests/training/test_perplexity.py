"""Perplexity per token, per word and bits per byte from one sum of nats."""

import math

import numpy as np
import pytest

from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.training.evaluation import perplexity


def stream_of(length, **counts):
    return TokenStream(np.zeros(length, np.uint16), **{"num_bytes": 0, "num_documents": 1} | counts)


def test_a_model_of_known_cost():
    """One bit a token: 1000 tokens spell 250 words in 50 lines and 2000 bytes."""
    stream = stream_of(1000, num_bytes=2000, num_words=250, num_lines=50)
    found = perplexity(1000 * math.log(2), 1000, stream)
    assert found.per_token == pytest.approx(2)
    assert found.per_word == pytest.approx(2**4)
    assert found.per_word_with_eol == pytest.approx(2 ** (1000 / 300))
    assert found.bits_per_byte == pytest.approx(0.5)


def test_what_was_not_evaluated_does_not_count_as_text():
    """The same cost a token over part of the stream gives the same figures."""
    stream = stream_of(1000, num_bytes=2000, num_words=250, num_lines=50)
    whole, part = (perplexity(count * 3.0, count, stream) for count in (1000, 512))
    for name in ("per_token", "per_word", "per_word_with_eol", "bits_per_byte"):
        assert getattr(part, name) == pytest.approx(getattr(whole, name))


def test_figures_that_cannot_be_given():
    found = perplexity(20.0, 10, stream_of(10))
    assert found.per_word is None
    assert found.per_word_with_eol is None
    assert math.isnan(found.bits_per_byte)
    assert perplexity(20.0, 10, stream_of(10, num_words=5)).per_word_with_eol is None
    assert perplexity(1e6, 10, stream_of(10, num_words=1)).per_word == math.inf
    for count in (0, 11):
        with pytest.raises(ValueError, match=f"evaluated_tokens = {count}"):
            perplexity(1.0, count, stream_of(10))
