"""From a `DataConfig` to the token stream of a split: the one entry point of training and evaluation."""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from tlinformer_jax.data import passkey
from tlinformer_jax.data.cache import cached_tokens, file_identity, find_tokens, smallest_dtype
from tlinformer_jax.data.config import SPLITS, DataConfig
from tlinformer_jax.data.copying import Copying
from tlinformer_jax.data.draws import key_of
from tlinformer_jax.data.files import check_patterns, file_kind, find_files, read_documents
from tlinformer_jax.data.pieces import cut_documents, group_pieces
from tlinformer_jax.data.progress import Progress
from tlinformer_jax.data.recall import Recall, pairs_of
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tasks import AnswerPlaces, Split, Task, TaskSplit
from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.data.workers import Encoded, encode_groups
from tlinformer_jax.errors import ConfigError, DataError

Documents = Iterator[tuple[str, bool]]


@dataclasses.dataclass(frozen=True)
class OpenedSplit:
    """A split and how it came about.

    Attributes:
      stream: the tokens; of a task, what makes its samples.
      found: whether they were tokenised by an earlier run.
      seconds: that opening (and tokenising) took.
    """

    stream: Split
    found: bool
    seconds: float


@dataclasses.dataclass(frozen=True)
class Source:
    """The files of one split and how to read them.

    Attributes:
      label: names the split in messages.
      files: that the documents come from.
      options: what else the tokens depend on, as JSON.
      documents: yields `(text, ends)`, and tells the bytes that each read took.
      row_per_line: whether each document is one line, an empty one too.
    """

    label: str
    files: list[pathlib.Path]
    options: dict[str, Any]
    documents: Callable[[Callable[[int], None]], Documents]
    row_per_line: bool = False


def available_splits(config: DataConfig) -> tuple[str, ...]:
    """The splits that `config` gives text of their own for."""
    if config.dataset == "text" or (config.dataset == "passkey" and config.train_files):
        return tuple(split for split in SPLITS if getattr(config, f"{split}_files"))
    return SPLITS


def load_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> Split:
    """Returns the tokens of "train", "validation" or "test", with `end_of_text` after every document; or the task.

    Tokenises with all cores on the first call; later calls, of any process, map the cached result.

    Raises:
      DataError: for a split that is not there, or files, caches and downloads that cannot be used; the message
        says which and why.
      ConfigError: for a missing package.
    """
    return open_split(config, split, tokenizer).stream


def load_stored_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> Split:
    """`load_split` for a configuration that somebody else may have written: writes in this user's own cache only.

    What the configuration's cache holds is read all the same. Takes and raises what `load_split` does.
    """
    if config.dataset in ("text", "passkey"):
        check_patterns(getattr(config, f"{split}_files", ""), f"data.{split}_files")
    found = find_split(config, split, tokenizer)
    if found is not None:
        return found
    return load_split(dataclasses.replace(config, cache_dir=""), split, tokenizer)


def open_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> OpenedSplit:
    """`load_split`, with what `prepare` reports."""
    if split not in SPLITS:
        raise DataError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
    start = time.monotonic()
    if config.is_task:
        text = None
        if config.dataset == "passkey":
            text = open_split(_haystack(config), _haystack_split(config, split), tokenizer)
        task = _task(config, split, tokenizer, None if text is None else text.stream)
        return OpenedSplit(task, text is not None and text.found, time.monotonic() - start)
    if config.dataset == "pydoc":
        from tlinformer_jax.data.pydoc import load_pydoc

        return OpenedSplit(load_pydoc(split, tokenizer), False, time.monotonic() - start)
    source = _text_source(config, split) if config.dataset == "text" else _wikitext_source(config, split)
    identity = _identity(source, config, tokenizer)

    def encode(scratch: pathlib.Path) -> Generator[Encoded, None, None]:
        yield from _encode(source, tokenizer, config.num_workers, scratch)
        if _identity(source, config, tokenizer) != identity:
            raise DataError(f"{source.label}: a file changed while it was read; prepare again when it is complete")

    stream, found = cached_tokens(config.cache_path, identity, tokenizer.vocab_size, encode, verify=config.full_hash)
    return OpenedSplit(stream, found, time.monotonic() - start)


def find_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> Split | None:
    """A split as far as its tokens are at hand without writing anything, else None.

    Raises:
      DataError: for files that are not there; the message says which.
    """
    if config.is_task:
        text = None
        if config.dataset == "passkey":
            text = find_split(_haystack(config), _haystack_split(config, split), tokenizer)
            if text is None:
                return None
        return _task(config, split, tokenizer, text)
    if config.dataset == "pydoc":
        return open_split(config, split, tokenizer).stream  # holds no cache
    if config.dataset == "wikitext103":
        from tlinformer_jax.data.wikitext103 import prepared

        if not prepared.is_prepared(config):
            return None
    source = _text_source(config, split) if config.dataset == "text" else _wikitext_source(config, split)
    return find_tokens(config.cache_path, _identity(source, config, tokenizer), config.full_hash)


def answer_places(config: DataConfig, tokenizer: Tokenizer, length: int) -> AnswerPlaces | None:
    """Where the labels of a sample of `length` tokens count, that of a task; None where all do.

    Raises:
      DataError: if the task cannot be written by the tokenizer.
    """
    if config.dataset == "recall":
        pairs = pairs_of(length, config.pairs, config.sequence_length)
        return AnswerPlaces(2 * pairs, pairs)
    if config.dataset == "copy":
        return AnswerPlaces(length // 2, length // 2)
    if config.dataset == "passkey":
        return passkey.Sizes.of(tokenizer).places(length, config.questions)
    return None


def _haystack(config: DataConfig) -> DataConfig:
    """Where the text of the passkeys comes from."""
    dataset = "text" if config.train_files else "pydoc"
    return dataclasses.replace(config, dataset=dataset, curriculum="")


def _haystack_split(config: DataConfig, split: str) -> str:
    """The split of that text: without test files, test samples hide other keys in the text of the validation."""
    return "validation" if split == "test" and config.train_files and not config.test_files else split


def _task(config: DataConfig, split: str, tokenizer: Tokenizer, text: Split | None) -> TaskSplit:
    """The split of a task.

    Raises:
      UserError: if the samples cannot hold it.
    """
    key = key_of(config.dataset, split)
    task: Task
    if config.dataset == "recall":
        task = Recall(key, tokenizer.vocab_size, config.pairs, config.sequence_length)
    elif config.dataset == "copy":
        task = Copying(key, tokenizer.vocab_size)
    else:
        assert isinstance(text, TokenStream)
        trains = split == "train"
        questions = config.questions if trains else 1
        task = passkey.Passkey(key, text, tokenizer, config.passkeys, questions, in_turn=not trains)
    task.check(config.sequence_length)
    for length, *_ in config.stages:
        try:
            task.check(length)
        except ConfigError as error:
            allowed = f"has samples of {length} tokens, and {error.field} {error.allowed}"
            raise ConfigError("data.curriculum", config.curriculum, allowed) from None
    return TaskSplit(task, config.train_examples if split == "train" else config.validation_examples)


def _identity(source: Source, config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that the tokens of a source depend on, as JSON."""
    return {
        "tokenizer": tokenizer.name,
        "options": source.options,
        "files": [file_identity(path, config.full_hash) for path in source.files],
    }


def _encode(
    source: Source, tokenizer: Tokenizer, num_workers: int, scratch: pathlib.Path
) -> Generator[Encoded, None, None]:
    progress = Progress(f"tokenising {source.label}", sum(path.stat().st_size for path in source.files))
    groups = group_pieces(cut_documents(source.documents(progress.advance), tokenizer.safe_cut))
    dtype = smallest_dtype(tokenizer.vocab_size)
    found = False
    for tokens, counts in encode_groups(groups, tokenizer, dtype, num_workers, scratch):
        found = found or len(tokens) > 0
        yield tokens, dataclasses.replace(counts, num_lines=counts.num_documents) if source.row_per_line else counts
    progress.finish()
    if not found:
        names = ", ".join(map(str, source.files))
        raise DataError(f"{source.label}: there is no text at all in {names}")


def _text_source(config: DataConfig, split: str) -> Source:
    field = f"data.{split}_files"
    files = find_files(getattr(config, f"{split}_files"), field)
    kinds = {file_kind(path) for path in files}
    options = {"document": "text"}
    if "jsonl" in kinds:
        options["text_field"] = config.text_field
    if "txt" in kinds:
        options["document_per"] = config.document_per

    def documents(on_read: Callable[[int], None]) -> Documents:
        for path in files:
            yield from read_documents(path, config.text_field, config.document_per, on_read)

    return Source(split, files, options, documents)


def _wikitext_source(config: DataConfig, split: str) -> Source:
    from tlinformer_jax.data.wikitext103 import prepared

    files = prepared.prepared_files(config, split)

    def documents(on_read: Callable[[int], None]) -> Documents:
        return ((row, True) for row in prepared.read_rows(config, split, on_read))

    return Source(f"wikitext103 {config.wikitext_variant} {split}", files, {"document": "row"}, documents, True)
