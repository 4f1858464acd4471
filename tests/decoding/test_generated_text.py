"""Texts in and out of the generator: pieces, stop strings, the end of text."""

import pytest

from tests.decoding.test_generator import SMALL, TEXT, generator, text_of
from tlinformer_jax import build_model
from tlinformer_jax.data.tokenizers import ByteTokenizer
from tlinformer_jax.decoding import Generator
from tlinformer_jax.errors import ConfigError, UserError


def test_text_streams_in_pieces_that_join():
    model = generator(TEXT)
    stream = model.stream(["añ", "plain text"], max_new_tokens=40, temperature=2.0, chunk=3, stop_tokens=())
    shown, tokens = ["", ""], [[], []]
    for piece in stream:
        assert 1 <= len(piece.tokens) <= 3
        shown[piece.index] += piece.text
        tokens[piece.index] += piece.tokens
        assert (piece.finish_reason is None) == (len(tokens[piece.index]) < 40)
    assert tokens == [generation.tokens for generation in stream.generations]
    assert shown == [generation.text for generation in stream.generations]
    assert shown == model.generate(["añ", "plain text"], max_new_tokens=40, temperature=2.0, stop_tokens=())
    assert shown == [text_of(part) for part in tokens]
    assert any(ord(character) > 127 for character in shown[0])


def test_stop_strings_end_text_before_themselves_and_their_sequence_only():
    model = generator(TEXT)
    options = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3}
    full = model.run(["begin"] * 2, **options)
    stop = full[0].text[9:12]
    assert (full[0].text.find(stop), stop in full[1].text) == (9, False)
    cut, other = model.run(["begin"] * 2, stop_strings=[stop, "never"], **options)
    assert (cut.text, cut.finish_reason) == (full[0].text[:9], "stop_string")
    assert cut.tokens == full[0].tokens[: len(cut.tokens)]
    assert text_of(cut.tokens) == full[0].text[:12]
    assert (other.tokens, other.text, other.finish_reason) == (full[1].tokens, full[1].text, "length")
    shown = ["", ""]
    stream = model.stream(["begin"] * 2, stop_strings=[stop], chunk=1, **options)
    for piece in stream:
        shown[piece.index] += piece.text
    assert shown == [cut.text, other.text]
    assert [generation.hits for generation in stream.generations] == [len(cut.tokens) - 1, 39], (
        "stopped, it costs no more"
    )
    tokens = model.generate_tokens([list(b"begin")] * 2, stop_strings=[stop], **options)
    assert tokens == [cut.tokens, other.tokens]


def test_texts_end_at_the_end_of_text_and_tokens_do_not():
    model = generator(TEXT)
    options = {"max_new_tokens": 80, "temperature": 3.0, "seed": 10}
    free = model.generate_tokens([list(b"x")] * 2, **options)
    assert any(256 in tokens for tokens in free), "choose another seed"
    for tokens, generation in zip(free, model.run(["x"] * 2, **options)):
        assert generation.tokens == (tokens[: tokens.index(256) + 1] if 256 in tokens else tokens)
        assert generation.finish_reason == ("stop_token" if 256 in tokens else "length")


def test_texts_and_tokenizers_that_do_not_fit():
    with pytest.raises(UserError, match="prompt 0: must be text; it holds parts of characters"):
        generator(TEXT).generate(["\udcff"])
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 37: must be at least 257"):
        Generator(build_model(SMALL), {}, ByteTokenizer())
