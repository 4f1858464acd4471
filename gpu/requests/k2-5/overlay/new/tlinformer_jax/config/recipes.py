"""Functions for config files: the rows of the paper's Table 1 by name, and this project's recipe.

Row `base-N` is a causal transformer on sequences of N tokens. Row `N-T-r` is a TLinFormer on sequences of N tokens; its
history and generation window have T tokens together, of which the share r is the history window. N and T are plain
numbers, or multiples of 1024 such as `2k`.
"""

import re
from typing import TYPE_CHECKING

from tlinformer_jax.errors import ConfigError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

TABLE_1 = (
    "base-512",
    "512-512-0.382",
    "512-512-0.5",
    "512-512-0.618",
    "base-1k",
    "1k-512-0.5",
    "1k-1k-0.5",
    "base-2k",
    "2k-512-0.5",
    "2k-2k-0.5",
)
GRAMMAR = "must be base-N or N-T-r: lengths such as 512 or 2k, and the history window's share 0 < r < 1 of the window T"

TOKENS_PER_UPDATE = 131_072
# The paper's number of updates at N = 512 on WikiText-103: ten epochs of 908.
UPDATES = 9_080


def set_row(config: "ConfigDict", row: str) -> None:
    """Sets architecture, vocabulary, windows and sequence length; the rest of the model is the 41M default."""
    config.model.vocab_size = 50257  # GPT-2's vocabulary without padding, as in the paper
    if base := re.fullmatch(r"base-(\d+k?)", row):
        config.model.architecture = "transformer"
        config.data.sequence_length = _length(row, base[1])
        return
    windows = re.fullmatch(r"(\d+k?)-(\d+k?)-(0\.\d+)", row)
    if not windows:
        raise ConfigError("variant", row, GRAMMAR)
    window = _length(row, windows[2])
    history = round(float(windows[3]) * window)
    if not 0 < history < window:
        raise ConfigError("variant", row, GRAMMAR)
    config.model.architecture = "tlinformer"
    config.model.history_window = history
    config.model.generation_window = window - history
    config.data.sequence_length = _length(row, windows[1])


def set_books(config: "ConfigDict") -> None:
    """Sets the data to books (any corpus of JSON lines with one document per line) in GPT-2 tokens."""
    config.data.update(
        dataset="text",
        tokenizer="gpt2",
        train_files="data/books/train-*.jsonl.xz",
        validation_files="data/books/valid.jsonl.xz",
    )


def set_own_recipe(config: "ConfigDict", row: str) -> None:
    """Sets row `row` with this project's recipe, so that any two rows can be compared.

    Every row has 131,072 tokens per update, the same number of updates and dropout; the rest is as in the paper.
    """
    set_row(config, row)
    length = config.data.sequence_length
    if TOKENS_PER_UPDATE % length:
        raise ConfigError("variant", row, f"must have an N that divides the {TOKENS_PER_UPDATE:,} tokens of an update")
    config.model.dropout = 0.1
    config.train.update(
        steps=UPDATES,
        batch_size=TOKENS_PER_UPDATE // length,
        learning_rate=3e-4,
        warmup_steps=2000,
        schedule="cosine",
        weight_decay=0.06,
        clip_norm=1.0,
        eval_every=UPDATES // 10,
        checkpoint_every=500,
    )


def set_small(config: "ConfigDict", length: int, window: int, tokens: int, batch: int) -> None:
    """Sets a model of 6 layers with W_oh = W_og = `window`, and training on `tokens` tokens.

    An update has `batch` samples of `length` tokens; the number of updates is rounded down.
    """
    updates = tokens // (batch * length)
    config.model.update(
        architecture="tlinformer",
        d_model=256,
        num_heads=4,
        num_blocks=2,
        hidden_depth=1,
        history_window=window,
        generation_window=window,
        dropout=0.1,
    )
    config.train.update(
        steps=updates,
        batch_size=batch,
        learning_rate=1e-3,
        warmup_steps=updates // 10,
        schedule="cosine",
        weight_decay=0.1,
        eval_every=-(-updates // 10),
    )
    config.data.sequence_length = length


def _length(row: str, text: str) -> int:
    length = int(text.removesuffix("k")) * (1024 if text.endswith("k") else 1)
    if length < 1:
        raise ConfigError("variant", row, GRAMMAR)
    return length
