"""prepare: what it reports, and that a second run finds everything."""

import re

import pytest

from tlinformer_jax.commands.prepare import prepare
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.errors import ConfigError, DataError


def test_every_split_that_has_text_is_reported_and_found_again(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 500)
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "three"}\n')
    config = DataConfig(
        dataset="text",
        train_files=str(tmp_path / "a.txt"),
        test_files=str(tmp_path / "b.jsonl"),
    )
    first, second = list(prepare(config)), list(prepare(config))
    train, test = first
    assert train.startswith("train: 1,001 tokens, 1 documents, 1,000 bytes, 0.999 bytes per token, tokenised in")
    assert test.startswith("test: 10 tokens, 2 documents, 8 bytes, 0.800 bytes per token, tokenised in")
    assert all("tokens/s" in line for line in first)
    assert all("found in the cache" in line for line in second)


def test_the_default_needs_nothing_but_python():
    lines = list(prepare(DataConfig()))
    assert [line.split(":")[0] for line in lines] == ["train", "validation", "test"]
    documents, sizes = (
        [int(re.search(rf"([\d,]+) {kind},", line)[1].replace(",", "")) for line in lines]
        for kind in ("documents", "bytes")
    )
    assert sum(documents) > 70
    assert sizes[0] > 5 * sum(sizes[1:]) > 0


def test_a_model_that_is_too_small_for_the_tokenizer_is_refused_at_once():
    with pytest.raises(ConfigError, match=r"model\.vocab_size = 256: must be at least 257"):
        next(prepare(DataConfig(), vocab_size=256))


def test_a_text_dataset_without_files_is_refused():
    with pytest.raises(DataError, match=r"data\.train_files = ''"):
        list(prepare(DataConfig(dataset="text")))


def test_the_end_of_text_entry_is_passed_on(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    model = tokenizers.models.WordLevel({"stop": 0, "a": 1, "?": 2}, unk_token="?")
    tokenizers.Tokenizer(model).save(str(path))
    with pytest.raises(ConfigError, match=r"data\.tokenizer = '.*json:': must name the entry that ends a text"):
        list(prepare(DataConfig(tokenizer=str(path))))
    assert len(list(prepare(DataConfig(tokenizer=f"{path}:stop")))) == 3
