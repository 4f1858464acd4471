"""Perplexity per token, per word and bits per byte from one sum of nats."""

import math

import numpy as np
import pytest

from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.training.evaluation import perplexities


def stream_of(length, **counts):
    return TokenStream(np.zeros(length, np.uint16), **{"num_bytes": 0, "num_documents": 1} | counts)


def test_a_model_of_known_cost():
    """One bit a token: 1000 tokens spell 250 words in 50 lines and 2000 bytes."""
    stream = stream_of(1000, num_bytes=2000, num_words=250, num_lines=50)
    found = perplexities(1000 * math.log(2), 1000, stream)
    assert found == {
        "perplexity": pytest.approx(2),
        "perplexity_per_word": pytest.approx(2**4),
        "perplexity_per_word_with_eol": pytest.approx(2 ** (1000 / 300)),
        "bits_per_byte": pytest.approx(0.5),
    }


def test_what_was_not_evaluated_does_not_count_as_text():
    """The same cost a token over part of the stream gives the same figures."""
    stream = stream_of(1000, num_bytes=2000, num_words=250, num_lines=50)
    whole, part = (perplexities(count * 3.0, count, stream) for count in (1000, 512))
    assert part == pytest.approx(whole)


def test_figures_that_cannot_be_given():
    assert perplexities(20.0, 10, stream_of(10)) == {"perplexity": pytest.approx(math.exp(2))}
    assert "perplexity_per_word_with_eol" not in perplexities(20.0, 10, stream_of(10, num_words=5))
    assert perplexities(1e6, 10, stream_of(10, num_words=1))["perplexity_per_word"] == math.inf
