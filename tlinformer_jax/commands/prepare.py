"""Prepares a run's data without training: `python -m tlinformer_jax prepare --config=configs/wt103.py`.

Downloads what is needed, tokenises every split that the configuration names, and prints what each holds. A later
training run with the same data section finds the result in the cache.
"""

import dataclasses
from collections.abc import Iterator

from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.data.sources import available_splits, open_split
from tlinformer_jax.data.streams import check_token_ids
from tlinformer_jax.data.tasks import TaskSplit
from tlinformer_jax.data.tokenizers import build_tokenizer, check_vocab
from tlinformer_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class SplitReport:
    """What a prepared split holds.

    Attributes:
      split: "train", "validation" or "test".
      num_tokens: in the stream, end-of-text included.
      num_documents: in the stream.
      num_bytes: UTF-8 bytes of the text.
      seconds: that it took.
      found: whether an earlier run had tokenised it.
    """

    split: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    seconds: float
    found: bool

    def __str__(self) -> str:
        how = (
            f"found in the cache in {self.seconds:.2f} s"
            if self.found
            else f"tokenised in {self.seconds:.1f} s: {self.num_tokens / self.seconds:,.0f} tokens/s, "
            f"{self.num_bytes / 1e6 / self.seconds:.2f} MB/s"
        )
        return (
            f"{self.split}: {self.num_tokens:,} tokens, {self.num_documents:,} documents, {self.num_bytes:,} bytes, "
            f"{self.num_bytes / self.num_tokens:.3f} bytes per token, {how}"
        )


@dataclasses.dataclass(frozen=True)
class TaskReport:
    """A split of a task: its name, the task's, and the number of samples."""

    split: str
    dataset: str
    samples: int

    def __str__(self) -> str:
        return f"{self.split}: {self.samples:,} samples of {self.dataset!r}, made as they are read"


def prepare(config: DataConfig, vocab_size: int | None = None) -> Iterator[SplitReport | TaskReport]:
    """Prepares every split that `config` has text for; yields each split's report as soon as it is done.

    Args:
      config: the data section.
      vocab_size: of the model that is to be trained, to find out now that the tokenizer does not fit it.

    Raises:
      UserError: for whatever is wrong with the configuration, the files, the cache or the download.
    """
    tokenizer = build_tokenizer(config.tokenizer)
    if vocab_size is not None:
        check_vocab(tokenizer, vocab_size)
    splits = available_splits(config)
    if not splits:
        raise DataError("data.train_files = '': data.dataset = 'text' needs a path or glob of .txt or .jsonl files")
    for split in splits:
        opened = open_split(config, split, tokenizer)
        stream = opened.stream
        if isinstance(stream, TaskSplit):
            yield TaskReport(split, config.dataset, stream.count)
            continue
        check_token_ids(stream, tokenizer.vocab_size, split)
        yield SplitReport(
            split, len(stream.tokens), stream.num_documents, stream.num_bytes, max(opened.seconds, 1e-9), opened.found
        )


def main() -> None:
    """Prints a line a split."""

    from tlinformer_jax.commands.cli import config_values
    from tlinformer_jax.config.run import run_config

    config = run_config(config_values())
    for report in prepare(config.data, config.model.vocab_size):
        print(report, flush=True)


def define_flags() -> None:
    """Defines --config."""
    from tlinformer_jax.commands.cli import define_config_flag

    define_config_flag()
