"""The section `data` of a run's configuration: dataset, tokenizer and samples."""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from tlinformer_jax.errors import POSITIVE, ConfigError, check_fields, integer
from tlinformer_jax.files import path_fault

PAIR_SIZES = {"recall": 2, "recall-gap": 3}  # tokens per pair
NUMBER_TASKS = (*PAIR_SIZES, "copy", "parity", "s5")
NEEDLES = ("passkey", "niah-1", "niah-2", "niah-3")
TASKS = (*NUMBER_TASKS, *NEEDLES)
WIKITEXT = ("wikitext103", "wikitext103-raw")
TEXT_FILES = ("text", "lines")
TOKENS = "tokens"
SYMBOL_FILES = ("idx", "fasta", "wav")
IDS_256 = "ids:256"
LETTERS = "letters:"
# Tokenizers by prefix that are not for text, and the datasets that use them.
ONLY_FOR = {"numbers:": NUMBER_TASKS, "ids:": (TOKENS, "idx", "wav"), LETTERS: ("fasta",)}
DATASETS = ("pydoc", *TEXT_FILES, TOKENS, *SYMBOL_FILES, *WIKITEXT, *TASKS)
TFDS = "tfds:"  # prefix of datasets from TensorFlow Datasets
SPLITS = ("train", "validation", "test")
FILES = ("train_files", "validation_files", "test_files")
PATHS = (*FILES, "tokenizer")
MOST_NEEDLES = 100  # names of passkeys have two digits
STAGE = re.compile(r"([0-9]+):([0-9]+)(?:@([0-9]*\.?[0-9]+))?")


class Stage(NamedTuple):
    """A stage of a curriculum: at most `updates` updates on samples of `length` tokens.

    The stage ends early when training reaches `accuracy`; 0 means never early.
    """

    length: int
    updates: int
    accuracy: float = 0.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Dataset, tokenizer and sample length. Names in brackets are the datasets that use a field.

    Paths are made absolute, so that a stored configuration names the same files from any directory. The environment
    variable TLINFORMER_CACHE names the folder for tokens and downloads, see `data.cache.cache_folder`.

    Attributes:
      dataset: "pydoc" (79 articles that are part of every CPython), "text" (your files), "lines" (the same, but every
        line of a .txt is a document), "tokens" (your own token ids, see `data.given`), "idx" (images), "fasta"
        (genomes, proteins), "wav" (sound; see `data.domains`), "wikitext103" (with <unk>, as in the paper),
        "wikitext103-raw", "tfds:NAME" (from TensorFlow Datasets), or a task with generated samples:
        "recall", "recall-gap", "copy", "parity", "s5" (see `data.tasks`), "passkey", "niah-1", "niah-2", "niah-3" (see
        `data.needles`).
      tokenizer: "bytes", "gpt2", or the path of a Hugging Face `tokenizer.json`, of a folder with such a file, or of a
        sentencepiece `.model`. FILE.json:ENTRY names the vocabulary's entry that ends a text; without it, a folder's
        `tokenizer_config.json` is read, or the usual names are tried. "numbers:V" is for tasks without text and has ids
        0 .. V - 1. "ids:V" is for "tokens" that are not text and has V ids, and one more that ends a document; "idx"
        and "wav" need "ids:256". "letters:ACGT" is for "fasta" and has an id for each letter, and one more that ends a
        document.
      sequence_length: N, tokens per sample.
      train_files: [text, lines] comma-separated globs of .txt and .jsonl files, each also .gz, .xz or .zst, and of
        .parquet and .arrow files. [passkey, niah-2, niah-3] the text to hide needles in, read as "text"; "" uses the
        text of "pydoc". [tokens] a .npy file, or a file of raw little-endian ids: FILE.bin (uint16) or FILE.bin:uint32.
        [idx, fasta, wav] files of any name; for idx and fasta also .gz, .xz or .zst.
      validation_files: the same for the validation split. [idx, fasta, wav] "" takes every 20th document of train_files
        out of the training split (a FASTA record or sound of more than 65,536 letters or samples counts as several).
      test_files: the same for the test split, with another 20th. [passkey, niah-2, niah-3] "" hides needles in the
        validation text.
      shingle: [fasta] number of letters, for validation_files or test_files "". Records that share this many
        consecutive letters, directly or through other records, are a family; the held-out split takes every 20th family
        instead of every 20th document, and no record is cut. 0 ignores families.
      text_field: [text, lines, tfds] the field of a .jsonl line or record, or the column, that contains the document.
      examples: [tasks] different samples in the training split; an epoch uses each once.
      num_items: [recall, recall-gap] pairs of a key and a value in a sample of N tokens; a shorter sample has
        proportionally fewer. [passkey, niah-1, niah-2, niah-3] needles hidden in a sample; training asks for all of
        them, one after the other, evaluation for one.
      curriculum: [tasks] "LENGTH:UPDATES,..." runs the first UPDATES updates on samples of LENGTH tokens (and more
        samples, so that an update has the same number of tokens), and so on; the rest use sequence_length.
        "LENGTH:UPDATES@ACCURACY" ends a stage as soon as this share of the answers' tokens was right in the mean of 20
        updates, after UPDATES at the latest; see `data.batches`. Evaluation always uses sequence_length.
      document_masking: whether to pack short documents whole into samples, in which a document does not see the others,
        in training and in evaluation; see `data.documents`. Not for tasks, nor for architectures with Gated DeltaNet.
        On NVIDIA GPUs attention then uses model.attention = 'xla'.
    """

    dataset: str = "pydoc"
    tokenizer: str = "bytes"
    sequence_length: int = 512
    train_files: str = ""
    validation_files: str = ""
    test_files: str = ""
    shingle: int = 0
    text_field: str = "text"
    examples: int = 100_000
    num_items: int = 4
    curriculum: str = ""
    document_masking: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is not field.type:
                raise ConfigError(f"data.{field.name}", value, f"must be of type {getattr(field.type, '__name__', '')}")
        for name in PATHS:
            if fault := _path_fault(name, getattr(self, name)):
                raise ConfigError(f"data.{name}", getattr(self, name), fault)
        for name, value in absolute_paths(vars(self), pathlib.Path()).items():
            object.__setattr__(self, name, value)
        if self.dataset not in DATASETS and not (self.dataset.startswith(TFDS) and self.dataset != TFDS):
            allowed = f"must be one of {', '.join(map(repr, DATASETS))}, '{TFDS}NAME'"
            raise ConfigError("data.dataset", self.dataset, allowed)
        if not self.tokenizer:
            raise ConfigError("data.tokenizer", self.tokenizer, "must be 'bytes', 'gpt2' or a tokenizer.json's path")
        for prefix, datasets in ONLY_FOR.items():
            if self.tokenizer.startswith(prefix) and self.dataset not in datasets:
                allowed = f"is only for data.dataset = {', '.join(map(repr, datasets))}"
                raise ConfigError("data.tokenizer", self.tokenizer, allowed)
        if self.dataset in ("idx", "wav") and self.tokenizer != IDS_256:
            allowed = f"must be {IDS_256!r} for data.dataset = {self.dataset!r}"
            raise ConfigError("data.tokenizer", self.tokenizer, allowed)
        if not self.text_field:
            raise ConfigError("data.text_field", self.text_field, "must name a field of the .jsonl lines")
        items = integer(1, MOST_NEEDLES) if self.dataset in NEEDLES else POSITIVE
        rules = {"sequence_length": POSITIVE, "examples": POSITIVE, "num_items": items, "shingle": integer(0)}
        check_fields("data", self, rules)
        if self.shingle and self.dataset != "fasta":
            raise ConfigError("data.shingle", self.shingle, f"must be 0 for data.dataset = {self.dataset!r}")
        if self.curriculum and not self.is_task:
            allowed = f"must be '' unless data.dataset is one of {', '.join(map(repr, TASKS))}"
            raise ConfigError("data.curriculum", self.curriculum, allowed)
        if self.document_masking and self.is_task:
            allowed = f"must be False for data.dataset = {self.dataset!r}, each sample of which is one document"
            raise ConfigError("data.document_masking", True, allowed)
        _ = self.stages

    @property
    def is_task(self) -> bool:
        """Whether samples are generated and have answers."""
        return self.dataset in TASKS

    @property
    def hides_in_files(self) -> bool:
        """Whether needles are hidden in the user's own text."""
        return self.dataset in NEEDLES and self.dataset != "niah-1" and bool(self.train_files)

    @property
    def letters(self) -> str:
        """[fasta] The letters of a tokenizer "letters:ACGT"; "" for another tokenizer."""
        return self.tokenizer.removeprefix(LETTERS) if self.tokenizer.startswith(LETTERS) else ""

    def field_of_files(self, split: str) -> str:
        """Returns the name of the field with the files of a split, which may be the field of another split."""
        if not getattr(self, f"{split}_files"):
            if self.dataset in SYMBOL_FILES:
                return "train_files"
            if self.hides_in_files and split == "test":
                return "validation_files"  # other needles are hidden in the same text
        return f"{split}_files"

    @property
    def validation_examples(self) -> int:
        """[tasks] Number of samples in the validation split, and in the test split."""
        return max(1, min(200 if self.dataset in NEEDLES else 3_000, self.examples // 10))

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of `curriculum`, all before the last one, which uses sequence_length."""
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
        """Returns the samples that the first `update` updates of `batch_size` rows use if no stage ends early."""
        return stage_at(self.stages, self.sequence_length, batch_size, update)[1]


def absolute_paths(values: Mapping[str, Any], base: pathlib.Path) -> dict[str, Any]:
    """Returns the fields of the data section with relative paths made absolute from `base`; other values stay."""
    changed = dict(values)
    for name in PATHS:
        value = values.get(name)
        if not isinstance(value, str) or not value or _path_fault(name, value):
            continue
        if name == "tokenizer" and (value in ("bytes", "gpt2") or value.startswith(tuple(ONLY_FOR))):
            continue
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


def split_tokenizer(name: str) -> tuple[str, str]:
    """Splits a tokenizer PATH:ENTRY into the path and the entry that ends a text; "" if no entry is named."""
    match = re.fullmatch(r"(.+\.json):(.+)", name, re.DOTALL)
    return (match[1], match[2]) if match else (name, "")


def stage_at(stages: tuple[Stage, ...], sequence_length: int, batch_size: int, update: int) -> tuple[int, int]:
    """Returns the tokens per sample in update `update` (from 0), and the number of samples in all updates before."""
    before = 0
    for length, updates, _ in stages:
        size = batch_size * (sequence_length // length)
        if update < updates:
            return length, before + update * size
        before, update = before + updates * size, update - updates
    return sequence_length, before + update * batch_size


def _path_fault(name: str, value: str) -> str | None:
    """Returns the rule that the value of a path field breaks; None if the value can be used."""
    parts = value.split(",") if name in FILES else [split_tokenizer(value)[0]]
    return next(filter(None, (path_fault(part.strip()) for part in parts)), None)
