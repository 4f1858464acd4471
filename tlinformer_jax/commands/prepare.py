"""Prepares a run's data without training: `python -m tlinformer_jax prepare --config=configs/wt103.py`.

Downloads missing files, tokenises every split that the configuration names, and prints the size of each. A later
training with the same data section finds the result in the cache.
"""

import time
from collections.abc import Iterator

from tlinformer_jax.commands import cli
from tlinformer_jax.config.data import TOKENS, DataConfig
from tlinformer_jax.config.run import run_config
from tlinformer_jax.data.sources import available_splits, open_split
from tlinformer_jax.data.streams import check_token_ids
from tlinformer_jax.data.tasks import TaskSplit
from tlinformer_jax.data.tokenizers import build_tokenizer, check_vocab
from tlinformer_jax.errors import DataError


def prepare(config: DataConfig, vocab_size: int | None = None) -> Iterator[str]:
    """Prepares every split for which `config` has text; yields a line about each as soon as it is done.

    The tokenizer must fit `vocab_size`, the vocabulary of the model to train.
    """
    tokenizer = build_tokenizer(config.tokenizer)
    if vocab_size is not None:
        check_vocab(tokenizer, vocab_size)
    splits = available_splits(config)
    if not splits:
        kinds = "a .npy or .bin file" if config.dataset == TOKENS else "a path or glob of .txt or .jsonl files"
        raise DataError(f"data.train_files = '': data.dataset = {config.dataset!r} needs {kinds}")
    for split in splits:
        start = time.monotonic()
        stream, found = open_split(config, split, tokenizer)
        seconds = max(time.monotonic() - start, 1e-9)
        if isinstance(stream, TaskSplit):
            yield f"{split}: {stream.count:,} samples of {config.dataset!r}, generated as they are read"
            continue
        check_token_ids(stream, tokenizer.vocab_size, split)
        tokens = len(stream.tokens)
        if config.dataset == TOKENS:
            yield f"{split}: {tokens:,} tokens, read in place"
            continue
        speed = f"{tokens / seconds:,.0f} tokens/s, {stream.num_bytes / 1e6 / seconds:.2f} MB/s"
        how = f"found in the cache in {seconds:.2f} s" if found else f"tokenised in {seconds:.1f} s: {speed}"
        yield (
            f"{split}: {tokens:,} tokens, {stream.num_documents:,} documents, {stream.num_bytes:,} bytes, "
            f"{stream.num_bytes / tokens:.3f} bytes per token, {how}"
        )


def main() -> None:
    """Prints a line for each split."""
    config = run_config(cli.config_values())
    for line in prepare(config.data, config.model.vocab_size):
        cli.print_result(line)


# Not called on import: training imports `prepare`, and has its own flags.
define_flags = cli.define_config_flag
