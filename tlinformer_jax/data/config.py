"""What to read and how: the `data` section of a run's configuration."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tlinformer_jax.errors import ConfigError
from tlinformer_jax.files import path_fault

TASKS = ("recall", "copy", "passkey")
DATASETS = ("pydoc", "text", "wikitext103", *TASKS)
SPLITS = ("train", "validation", "test")
DOCUMENT_PER = ("file", "line")
WIKITEXT_VARIANTS = ("v1", "raw-v1")
TOKENIZERS = ("bytes", "gpt2")  # those that are no files
FILES = ("train_files", "validation_files", "test_files")
PATHS = (*FILES, "tokenizer", "manual_dir", "cache_dir")
LIMITS = {"passkeys": 100, "questions": 100}  # as many keys as have different names
STAGE = re.compile(r"([0-9]+):([0-9]+)(?:@([0-9]*\.?[0-9]+))?")


class Stage(NamedTuple):
    """Updates of a curriculum on samples of one length.

    Attributes:
      length: tokens of a sample.
      updates: that it takes, or takes at most.
      accuracy: of the answers in training, at which it ends before; 0 where it always takes all its updates.
    """

    length: int
    updates: int
    accuracy: float = 0.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Text, tokenizer and sample length. Every field is a plain value, so that a flag can override it.

    Paths are made absolute, so that a stored configuration means the same files from any directory.

    Attributes:
      dataset: "pydoc" (79 articles that every CPython carries), "text" (your files), "wikitext103", or a task whose
        samples are made: "recall", "copy", "passkey"; see `data.recall`, `data.copying`, `data.passkey`.
      tokenizer: "bytes", "gpt2", or the path of a Hugging Face `tokenizer.json`; "numbers:V", ids 0 .. V - 1 as such,
        is for "recall" and "copy".
      end_of_text_token: the entry of a `tokenizer.json` that ends a text; "" looks for the usual names.
      sequence_length: N, tokens a sample.
      train_files: "text": comma-separated globs of .txt and .jsonl files, each also .gz, .xz or .zst. "passkey": the
        text that keys are hidden in, the same way; "" is that of "pydoc".
      validation_files: the same for the validation split.
      test_files: the same for the test split. "passkey": "" hides its test samples' keys in the validation text.
      text_field: "text": the field of a .jsonl line that holds the document.
      document_per: "text": a .txt holds one document a "file", or one a "line" (blank lines are skipped).
      wikitext_variant: "v1" (with <unk>, the paper's) or "raw-v1".
      manual_dir: "wikitext103": a directory that holds its zip or parquet files; "" downloads the zip.
      cache_dir: where prepared data and tokens are kept; "" is $XDG_CACHE_HOME/tlinformer_jax, or
        ~/.cache/tlinformer_jax.
      full_hash: identify files by a hash of their whole content, not of size, time, head and tail alone, and
        verify a token cache's whole content before use. Slower by one reading of the files.
      num_workers: processes that tokenise; 0 is one for each core. The tokens do not depend on it.
      train_examples: of a task: different samples of the training split; an epoch takes each once.
      validation_examples: of a task: samples of the validation split, and of the test split.
      pairs: "recall": of a key and a value in a sample; a shorter one has fewer in proportion, be it of a curriculum
        or of an evaluation.
      passkeys: "passkey": keys hidden in a sample.
      questions: "passkey": of them, those that a training sample asks for, one after the other; an evaluation's sample
        asks for one.
      curriculum: of a task: "LENGTH:UPDATES,..." trains the first UPDATES updates on samples of LENGTH tokens, as many
        more as keep an update's tokens, and so on; what is left on sequence_length. "LENGTH:UPDATES@ACCURACY" ends as
        soon as that share of the answers' tokens was right in the mean of 20 updates, after UPDATES at the latest;
        see `training.curriculum`. Evaluations take sequence_length.
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
    train_examples: int = 100_000
    validation_examples: int = 3_000
    pairs: int = 4
    passkeys: int = 1
    questions: int = 1
    curriculum: str = ""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in PATHS:
            for part in getattr(self, name).split(","):
                if fault := path_fault(part.strip()):
                    raise ConfigError(f"data.{name}", getattr(self, name), fault)
        for name, value in absolute_paths(vars(self), pathlib.Path()).items():
            object.__setattr__(self, name, value)
        _check_choice("data.dataset", self.dataset, DATASETS)
        _check_choice("data.document_per", self.document_per, DOCUMENT_PER)
        _check_choice("data.wikitext_variant", self.wikitext_variant, WIKITEXT_VARIANTS)
        if not self.tokenizer:
            raise ConfigError("data.tokenizer", self.tokenizer, "must be 'bytes', 'gpt2' or a tokenizer.json's path")
        if not self.text_field:
            raise ConfigError("data.text_field", self.text_field, "must name a field of the .jsonl lines")
        if not 1 <= self.sequence_length < 2**31:
            allowed = f"must be from 1 to {2**31 - 1}: positions are int32"
            raise ConfigError("data.sequence_length", self.sequence_length, allowed)
        if self.num_workers < 0:
            raise ConfigError("data.num_workers", self.num_workers, "must be 0 (one a core) or more")
        for name in ("train_examples", "validation_examples", "pairs", "passkeys", "questions"):
            if not 1 <= getattr(self, name) <= LIMITS.get(name, 2**31 - 1):
                limits = f"must be from 1 to {LIMITS.get(name, 2**31 - 1)}"
                raise ConfigError(f"data.{name}", getattr(self, name), limits)
        if self.questions > self.passkeys:
            raise ConfigError("data.questions", self.questions, f"must be at most data.passkeys = {self.passkeys}")
        if self.tokenizer.startswith("numbers:") and self.dataset not in ("recall", "copy"):
            raise ConfigError("data.tokenizer", self.tokenizer, "is for data.dataset = 'recall' and 'copy'")
        if self.curriculum and not self.is_task:
            allowed = f"must be '' where data.dataset is not one of {', '.join(map(repr, TASKS))}"
            raise ConfigError("data.curriculum", self.curriculum, allowed)
        _ = self.stages

    @property
    def is_task(self) -> bool:
        """Whether samples are made, and have answers."""
        return self.dataset in TASKS

    @property
    def stages(self) -> tuple[Stage, ...]:
        """`curriculum`: each stage before the last.

        Raises:
          ConfigError: if it is none.
        """
        allowed = (
            "must be LENGTH:UPDATES or LENGTH:UPDATES@ACCURACY, separated by commas: lengths that divide "
            "data.sequence_length and rise, updates above 0, accuracies above 0 and at most 1"
        )
        stages = []
        for part in self.curriculum.split(",") if self.curriculum else ():
            match = STAGE.fullmatch(part.strip())
            stage = Stage(int(match[1]), int(match[2]), float(match[3] or 0)) if match else Stage(0, 0)
            if not (match and stage.length and stage.updates and (match[3] is None or 0 < stage.accuracy <= 1)):
                raise ConfigError("data.curriculum", self.curriculum, allowed)
            stages.append(stage)
        lengths = [stage.length for stage in stages]
        if lengths != sorted(set(lengths)) or any(self.sequence_length % length for length in lengths):
            raise ConfigError("data.curriculum", self.curriculum, allowed)
        return tuple(stages)

    def samples_before(self, update: int, batch_size: int) -> int:
        """Samples that the first `update` updates of `batch_size` rows take, those of `stages` included, at most."""
        return stage_at(self.stages, self.sequence_length, batch_size, update)[1]

    @property
    def cache_path(self) -> pathlib.Path:
        """The directory that `cache_dir` stands for.

        Raises:
          ConfigError: if that is below a home directory that this user has not.
        """
        root = self.cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "tlinformer_jax")
        path = pathlib.Path(os.path.expanduser(root))
        if path.parts[:1] == ("~",):
            raise ConfigError(
                "data.cache_dir", self.cache_dir, "must name a directory: this user has no home directory"
            )
        return path


def absolute_paths(values: Mapping[str, Any], base: pathlib.Path) -> dict[str, Any]:
    """Fields of the data section with their paths made absolute; what cannot be a path stays as it is.

    Args:
      values: field -> value.
      base: the directory that relative paths start from, itself relative to the current one.

    Raises:
      ConfigError: naming the field, where a path cannot be made absolute.
    """
    changed = dict(values)
    for name in PATHS:
        value = values.get(name)
        if not isinstance(value, str) or not value or (name == "tokenizer" and _is_no_file(value)):
            continue
        if any(path_fault(part.strip()) for part in value.split(",")):
            continue  # it is refused as it was given
        try:
            here = os.path.abspath(base)
        except FileNotFoundError:
            raise ConfigError(f"data.{name}", value, "must be absolute: the current directory is gone") from None
        if name not in FILES:
            changed[name] = os.path.join(here, os.path.expanduser(value))
            continue
        patterns = [os.path.expanduser(part.strip()) for part in value.split(",") if part.strip()]
        if "," in here and not all(map(os.path.isabs, patterns)):
            raise ConfigError(f"data.{name}", value, f"must be absolute: {here} holds a comma, which separates files")
        changed[name] = ",".join(os.path.join(here, pattern) for pattern in patterns)
    return changed


def _is_no_file(tokenizer: str) -> bool:
    return tokenizer in TOKENIZERS or tokenizer.startswith("numbers:")


def stage_at(stages: tuple[Stage, ...], sequence_length: int, batch_size: int, update: int) -> tuple[int, int]:
    """Tokens of a sample of update `update` (from 0), and the samples of all updates before it.

    Args:
      stages: what comes first, on shorter samples, of which a row has as many as fit; each takes all its updates.
      sequence_length: N, of all updates after those.
      batch_size: rows of N tokens an update.
      update: which.
    """
    before = 0
    for length, updates, _ in stages:
        size = batch_size * (sequence_length // length)
        if update < updates:
            return length, before + update * size
        before, update = before + updates * size, update - updates
    return sequence_length, before + update * batch_size


def _check_types(config: DataConfig) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) is not field.type:
            raise ConfigError(f"data.{field.name}", value, f"must be of type {getattr(field.type, '__name__', '')}")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(name, value, f"must be one of {', '.join(map(repr, allowed))}")
