"""What to read and how: the `data` section of a run's configuration."""

import dataclasses
import os
import pathlib

from tlinformer_jax.errors import ConfigError

DATASETS = ("pydoc", "text", "wikitext103")
SPLITS = ("train", "validation", "test")
DOCUMENT_PER = ("file", "line")
WIKITEXT_VARIANTS = ("v1", "raw-v1")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer and sample length. Every field is a plain value, so that a flag can override it.

    Attributes:
      dataset: "pydoc" (79 articles that every CPython carries), "text" (your files) or "wikitext103".
      tokenizer: "bytes", "gpt2", or the path of a Hugging Face `tokenizer.json`.
      end_of_text_token: the entry of a `tokenizer.json` that ends a text; "" looks for the usual names.
      sequence_length: N, tokens a sample.
      train_files: "text": comma-separated globs of .txt and .jsonl files, each also .gz, .xz or .zst.
      validation_files: the same for the validation split.
      test_files: the same for the test split.
      text_field: "text": the field of a .jsonl line that holds the document.
      document_per: "text": a .txt holds one document a "file", or one a "line" (blank lines are skipped).
      wikitext_variant: "v1" (with <unk>, the paper's) or "raw-v1".
      manual_dir: "wikitext103": a directory that holds its zip or parquet files; "" downloads the zip.
      cache_dir: where prepared data and tokens are kept; "" is $XDG_CACHE_HOME/tlinformer_jax, or
        ~/.cache/tlinformer_jax.
      full_hash: identify files by a hash of their whole content, not of size, time, head and tail alone, and
        verify a token cache's whole content before use. Slower by one reading of the files.
      num_workers: processes that tokenise; 0 is one for each core. The tokens do not depend on it.
    """

    dataset: str = "pydoc"
    tokenizer: str = "bytes"
    end_of_text_token: str = ""
    sequence_length: int = 512
    train_files: str = ""
    validation_files: str = ""
    test_files: str = ""
    text_field: str = "text"
    document_per: str = "file"
    wikitext_variant: str = "v1"
    manual_dir: str = ""
    cache_dir: str = ""
    full_hash: bool = False
    num_workers: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        _check_choice("data.dataset", self.dataset, DATASETS)
        _check_choice("data.document_per", self.document_per, DOCUMENT_PER)
        _check_choice("data.wikitext_variant", self.wikitext_variant, WIKITEXT_VARIANTS)
        if not self.tokenizer:
            raise ConfigError("data.tokenizer", self.tokenizer, "must be 'bytes', 'gpt2' or a tokenizer.json's path")
        if not self.text_field:
            raise ConfigError("data.text_field", self.text_field, "must name a field of the .jsonl lines")
        if self.sequence_length < 1:
            raise ConfigError("data.sequence_length", self.sequence_length, "must be at least 1")
        if self.num_workers < 0:
            raise ConfigError("data.num_workers", self.num_workers, "must be 0 (one a core) or more")

    @property
    def cache_path(self) -> pathlib.Path:
        """The directory that `cache_dir` stands for."""
        if self.cache_dir:
            return pathlib.Path(self.cache_dir).expanduser()
        root = os.environ.get("XDG_CACHE_HOME", "")
        return (pathlib.Path(root) if root else pathlib.Path.home() / ".cache") / "tlinformer_jax"


def _check_types(config: DataConfig) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) is not field.type:
            raise ConfigError(f"data.{field.name}", value, f"must be of type {getattr(field.type, '__name__', '')}")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(name, value, f"must be one of {', '.join(map(repr, allowed))}")
