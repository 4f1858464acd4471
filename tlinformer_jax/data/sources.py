"""From a `DataConfig` to a split's token stream or task: the one entry point of training and evaluation."""

import dataclasses
import functools
import time
from collections.abc import Callable, Generator, Iterator

from tlinformer_jax.config.data import SPLITS, TEXT_FILES, TFDS, DataConfig
from tlinformer_jax.data import passkey, tfds, wikitext103
from tlinformer_jax.data.cache import Identity, cached_tokens, file_identity, find_tokens
from tlinformer_jax.data.draws import key_of
from tlinformer_jax.data.encoding import Counts, Encoded, encode_documents
from tlinformer_jax.data.files import TextPiece, check_patterns, find_files, progress, read_documents
from tlinformer_jax.data.pydoc import load_pydoc
from tlinformer_jax.data.recall import Recall, pairs_of
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tasks import AnswerPlaces, Copying, Split, Task, TaskSplit
from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.errors import ConfigError, DataError


@dataclasses.dataclass(frozen=True)
class OpenedSplit:
    """A split, whether an earlier run had tokenised it, and the seconds that opening (and tokenising) it took."""

    stream: Split
    found: bool
    seconds: float


@dataclasses.dataclass(frozen=True)
class Source:
    """The text of one split: all that it depends on, as JSON; its documents; a check of the counts of the whole.

    `row_per_document` says that each document is one line, an empty one too.
    """

    identity: Callable[[], Identity]
    documents: Callable[[], Iterator[TextPiece]]
    check: Callable[[Counts], None]
    row_per_document: bool


def available_splits(config: DataConfig) -> tuple[str, ...]:
    """The splits that `config` gives text of their own for."""
    if config.dataset in TEXT_FILES or (config.dataset == "passkey" and config.train_files):
        return tuple(split for split in SPLITS if getattr(config, f"{split}_files"))
    return SPLITS


def load_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> Split:
    """Returns the tokens of "train", "validation" or "test", with `end_of_text` after every document; or the task.

    Tokenises with all cores on the first call; later calls, of any process, map the cached result.

    Raises:
      DataError: for a split that is not there, or files, caches and downloads that cannot be used.
      ConfigError: for a missing package.
    """
    return open_split(config, split, tokenizer).stream


def load_stored_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> Split:
    """`load_split` for a configuration that somebody else may have written: writes in this user's own cache only.

    Tokens in the configuration's own cache are read all the same. Takes and raises what `load_split` does.
    """
    if config.dataset in (*TEXT_FILES, "passkey"):
        check_patterns(getattr(config, f"{split}_files", ""), f"data.{split}_files")
    found = find_split(config, split, tokenizer)
    if found is not None:
        return found
    return load_split(dataclasses.replace(config, cache_dir=""), split, tokenizer)


def open_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> OpenedSplit:
    """`load_split`, with what `prepare` reports."""
    if split not in SPLITS:
        raise DataError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
    start, found = time.monotonic(), False

    def open_text(source: Source, identity: Identity) -> TokenStream:
        nonlocal found
        stream, found = cached_tokens(config.cache_path, identity, lambda: _encoded(source, identity, tokenizer))
        return stream

    stream = _split(config, split, tokenizer, open_text)
    assert stream is not None
    return OpenedSplit(stream, found, time.monotonic() - start)


def find_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> Split | None:
    """A split if its tokens are at hand without writing anything, else None; raises what `load_split` does."""
    found = _split(config, split, tokenizer, lambda _, identity: find_tokens(config.cache_path, identity))
    if found is None and config.dataset in wikitext103.VARIANTS:
        wikitext103.check_manual_dir(config)
    return found


def answer_places(config: DataConfig, tokenizer: Tokenizer, length: int) -> AnswerPlaces | None:
    """Where the labels of a task's sample of `length` tokens count; None for text, where all do.

    Raises:
      DataError: if the tokenizer cannot encode the task.
    """
    if config.dataset == "recall":
        pairs = pairs_of(length, config.num_items, config.sequence_length)
        return AnswerPlaces(2 * pairs, pairs)
    if config.dataset == "copy":
        return AnswerPlaces(length // 2, length // 2)
    if config.dataset == "passkey":
        return passkey.Sizes.of(tokenizer).places(length, config.questions)
    return None


def _split(
    config: DataConfig, split: str, tokenizer: Tokenizer, get: Callable[[Source, Identity], TokenStream | None]
) -> Split | None:
    """A split whose text, if it comes from files, is what `get` makes of them; None if that is None."""
    text = None
    if not config.is_task or config.dataset == "passkey":
        source = _source(config, split)
        text = get(source, _identity(source, tokenizer)) if source else load_pydoc(split, tokenizer)
        if text is None:
            return None
    return _task(config, split, tokenizer, text) if config.is_task else text


def _identity(source: Source, tokenizer: Tokenizer) -> Identity:
    return {"tokenizer": tokenizer.name} | source.identity()


def _encoded(source: Source, identity: Identity, tokenizer: Tokenizer) -> Generator[Encoded, None, None]:
    total = Counts()
    for tokens, counts in encode_documents(source.documents(), tokenizer):
        if source.row_per_document:
            counts = dataclasses.replace(counts, num_lines=counts.num_documents)
        total += counts
        yield tokens, counts
    source.check(total)
    if _identity(source, tokenizer) != identity:
        raise DataError("a file of the text changed while it was read; prepare again when it is complete")


def _source(config: DataConfig, split: str) -> Source | None:
    """Where a split's text comes from; None for the embedded corpus."""
    if config.dataset in wikitext103.VARIANTS:
        return _wikitext_source(config, split)
    if config.dataset.startswith(TFDS):
        return _tfds_source(config, split)
    if config.dataset in TEXT_FILES:
        return _files_source(config, split)
    if config.dataset == "passkey" and config.train_files:
        # Without test files, test samples hide other keys in the text of the validation.
        return _files_source(config, split if split != "test" or config.test_files else "validation")
    return None


def _files_source(config: DataConfig, split: str) -> Source:
    files = find_files(getattr(config, f"{split}_files"), f"data.{split}_files")

    def identity() -> Identity:
        options = {"lines": config.dataset == "lines", "text_field": config.text_field}
        return options | {"files": [file_identity(path) for path in files]}

    def documents() -> Iterator[TextPiece]:
        advance = progress(f"tokenising {split}", sum(path.stat().st_size for path in files))
        for path in files:
            yield from read_documents(path, config.dataset, config.text_field, advance)

    where = ", ".join(map(str, files))
    return Source(identity, documents, lambda counts: _check_some_text(counts, split, where), False)


def _check_some_text(counts: Counts, split: str, where: str) -> None:
    if not counts.num_documents:
        raise DataError(f"{split}: there is no text at all in {where}")


def _tfds_source(config: DataConfig, split: str) -> Source:
    identity = functools.partial(tfds.identity, config, split)
    documents = functools.partial(tfds.read_documents, config, split)
    return Source(identity, documents, lambda counts: _check_some_text(counts, split, config.dataset), False)


def _wikitext_source(config: DataConfig, split: str) -> Source:
    # Zip and parquet files hold the same published text, so the tokens are found without either.
    identity = {"dataset": config.dataset, "split": split, "sha256": wikitext103.VARIANTS[config.dataset].sha256}

    def documents() -> Iterator[TextPiece]:
        return ((row, True) for row in wikitext103.read_rows(config, split))

    return Source(lambda: identity, documents, lambda counts: wikitext103.check_counts(counts, config, split), True)


def _task(config: DataConfig, split: str, tokenizer: Tokenizer, text: TokenStream | None) -> TaskSplit:
    """The split of a task; raises a UserError if the samples cannot hold it."""
    key, trains = key_of(config.dataset, split), split == "train"
    task: Task
    if config.dataset == "recall":
        task = Recall(key, tokenizer.vocab_size, config.num_items, config.sequence_length)
    elif config.dataset == "copy":
        task = Copying(key, tokenizer.vocab_size)
    else:
        assert text is not None
        questions = config.questions if trains else 1
        task = passkey.Passkey(key, text, tokenizer, config.num_items, questions, in_turn=not trains)
    task.check(config.sequence_length)
    for length, *_ in config.stages:
        try:
            task.check(length)
        except ConfigError as error:
            allowed = f"has samples of {length} tokens, and {error.field} {error.allowed}"
            raise ConfigError("data.curriculum", config.curriculum, allowed) from None
    return TaskSplit(task, config.examples if trains else config.validation_examples)
