"""prepare: what it reports, and that a second run finds everything."""

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
        cache_dir=str(tmp_path / "cache"),
    )
    first, second = list(prepare(config)), list(prepare(config))
    assert [(report.split, report.num_tokens, report.num_documents, report.num_bytes) for report in first] == [
        ("train", 1001, 1, 1000),
        ("test", 10, 2, 8),
    ]
    assert [report.found for report in first + second] == [False, False, True, True]
    line = str(first[0])
    assert line.startswith("train: 1,001 tokens, 1 documents, 1,000 bytes, 0.999 bytes per token, tokenised in")
    assert "tokens/s" in line
    assert "found in the cache" in str(second[0])


def test_the_default_needs_nothing_but_python():
    train, validation, test = prepare(DataConfig())
    assert train.num_documents + validation.num_documents + test.num_documents > 70
    assert train.num_bytes > 5 * (validation.num_bytes + test.num_bytes) > 0


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
