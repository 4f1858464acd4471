"""Documents to tokens: pieces, counts, threads, and what a tokenizer cannot take."""

import contextlib
import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from tests.support.corpus import config_for, tokenizer_named, write_corpus
from tlinformer_jax.data import streams
from tlinformer_jax.data.sources import load_split
from tlinformer_jax.data.streams import ASCII_SPACE, Counts, cut_documents, encode_pieces, group_pieces, smallest_dtype
from tlinformer_jax.data.tokenizers import ByteTokenizer, NumberTokenizer
from tlinformer_jax.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")
BYTES = ByteTokenizer()


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_the_smallest_type_that_fits(vocab_size, dtype):
    assert smallest_dtype(vocab_size) == np.dtype(dtype)


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_cutting_into_pieces_changes_nothing(size, name):
    tokenizer = tokenizer_named(name)
    texts = ["one  two\u00a0three\n\n four's 😀字 " * 5, "x" * 300, "\n", "", " a\u2003b "]
    blocks = [(text[i : i + 5], False) for text in texts for i in range(0, len(text), 5)]
    ends = np.cumsum([-(-len(text) // 5) for text in texts])
    for position in reversed(ends):
        blocks.insert(position, ("", True))
    groups = list(group_pieces(cut_documents(blocks, tokenizer.safe_cut, size), size))
    encoded = [encode_pieces(group, tokenizer, np.dtype(np.uint16)) for group in groups]
    expected = [np.append(tokenizer.encode(text), tokenizer.end_of_text) for text in texts]
    np.testing.assert_array_equal(np.concatenate([tokens for tokens, _ in encoded]), np.concatenate(expected))
    words = sum(len([word for word in _ascii_split(text) if word]) for text in texts)
    lines = sum(text.count("\n") + (text[-1:] not in ("", "\n")) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert sum((counts for _, counts in encoded), Counts()) == Counts(num_bytes, len(texts), words, lines)
    if size < 100:
        assert len(groups) > 1


def _ascii_split(text: str) -> list[str]:
    for space in ASCII_SPACE:
        text = text.replace(space, " ")
    return text.split(" ")


def test_a_long_document_is_cut_and_an_uncuttable_one_is_whole():
    pieces = list(cut_documents([("word " * 1000, True)], tokenizer_named("gpt2").safe_cut, 100))
    assert len(pieces) > 40
    assert max(len(piece.text) for piece in pieces) <= 100
    pieces = list(cut_documents([("word " * 1000, True)], lambda text: 0, 100))
    assert [len(piece.text) for piece in pieces] == [5000]


def test_an_endless_document_that_cannot_be_cut_is_not_held_whole(monkeypatch):
    monkeypatch.setattr(streams, "LARGEST_UNCUT", 1000)
    endless = (("word ", False) for _ in itertools.count())
    with pytest.raises(DataError, match=r"the document with 'word word .*' has more than 1,000 characters without"):
        list(cut_documents(endless, lambda text: 0, 100))


@pytest.mark.parametrize("name", ["bytes", "gpt2"])
def test_tokens_do_not_depend_on_the_number_of_threads(tmp_path, monkeypatch, name):
    texts = write_corpus(tmp_path / "a.jsonl", documents=60)
    tokenizer = tokenizer_named(name)
    expected = np.concatenate([np.append(tokenizer.encode(text), tokenizer.end_of_text) for text in texts])
    for cores in (1, 2, 8):
        monkeypatch.setattr(streams, "available_cores", lambda cores=cores: cores)
        monkeypatch.setenv("TLINFORMER_CACHE", str(tmp_path / f"cache{cores}"))
        stream = load_split(config_for(tmp_path), "train", tokenizer)
        np.testing.assert_array_equal(stream.tokens, expected)
        assert stream.num_words == 60 * 2000


def test_no_more_is_read_ahead_than_keeps_the_threads_busy(monkeypatch):
    monkeypatch.setattr(streams, "available_cores", lambda: 2)
    read = []
    documents = ((read.append(number) or "word " * 30_000, True) for number in range(100))
    with contextlib.closing(streams.encode_documents(documents, BYTES)) as encoded:
        for taken in range(1, 20):
            next(encoded)
            assert len(read) <= 2 * (taken + 2 * 2 + 1)  # a document makes about one group of pieces


def test_reading_and_tokenising_import_no_jax(tmp_path):
    """Nor anything else that costs memory and time."""
    code = """
        import sys
        import tlinformer_jax.data.sources, tlinformer_jax.data.batches
        heavy = {"jax", "flax", "tensorflow", "clu", "ml_collections", "pyarrow"}
        sys.exit(" ".join(heavy & set(sys.modules)))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], stderr=subprocess.PIPE, text=True)
    assert run.stderr.strip() == ""


class PanicException(BaseException):
    """As the libraries in Rust name theirs."""


@pytest.mark.parametrize("error", [ValueError("stack size"), PanicException("stack size")])
def test_a_document_that_a_library_cannot_take_is_named(tmp_path, monkeypatch, error):
    def fail(self, text):
        raise error

    (tmp_path / "a.jsonl").write_text('{"text": "A table of 5"}\n')
    monkeypatch.setattr(ByteTokenizer, "encode", fail)
    with pytest.raises(DataError, match=r"12 characters of a document that begin with 'A table of 5' \(stack size\)"):
        load_split(config_for(tmp_path), "train", BYTES)


def test_what_is_wrong_with_a_late_document_reaches_the_caller():
    documents = (("1 2 3 " * 20_000 if number < 30 else "1 word", True) for number in range(40))
    with pytest.raises(DataError, match="'word' must be a number"):
        list(streams.encode_documents(documents, NumberTokenizer(10)))
