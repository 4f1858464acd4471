"""Makes a split's token stream or task from a `DataConfig`: the one entry point of training and evaluation."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np

from tlinformer_jax.config.data import (
    NEEDLES,
    PAIR_SIZES,
    SPLITS,
    SYMBOL_FILES,
    TEXT_FILES,
    TFDS,
    TOKENS,
    DataConfig,
)
from tlinformer_jax.data import domains, given, needles, tasks, tfds, wikitext103
from tlinformer_jax.data.cache import Identity, cached_tokens, file_identity, find_tokens
from tlinformer_jax.data.files import TextPiece, check_patterns, find_files, progress, read_documents
from tlinformer_jax.data.streams import Counts, Encoded, TokenStream, encode_documents, groups_that_share
from tlinformer_jax.data.tasks import AnswerPlaces, Split, TaskSplit
from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.errors import ConfigError, DataError

SHINGLE = 13
# Of every 8 groups, from the largest to the smallest, one is held out for validation and one for testing.
DEAL = ("train", "train", "train", "train", "validation", "train", "test", "train")


@dataclasses.dataclass(frozen=True)
class Source:
    """The text of one split: everything it depends on, as JSON; its tokens; and where it is, for messages."""

    identity: Callable[[], Identity]
    encoded: Callable[[Tokenizer], Iterator[Encoded]]
    where: str


def available_splits(config: DataConfig) -> tuple[str, ...]:
    """Returns the splits for which `config` gives separate text."""
    if config.dataset in (*TEXT_FILES, TOKENS) or config.hides_in_files:
        return tuple(split for split in SPLITS if getattr(config, f"{split}_files"))
    if config.dataset in SYMBOL_FILES:
        return tuple(split for split in SPLITS if getattr(config, config.field_of_files(split)))
    return SPLITS


def load_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> Split:
    """Loads a split: its tokens, with `end_of_text` after every document, tokenised at the first call; or its task."""
    return open_split(config, split, tokenizer)[0]


def load_stored_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> Split:
    """Loads a split of a configuration that another person may have written: writes only to this user's own cache."""
    if config.dataset in (*TEXT_FILES, *SYMBOL_FILES, *NEEDLES) and split in SPLITS:
        field = config.field_of_files(split)
        check_patterns(getattr(config, field), f"data.{field}")
    found = find_split(config, split, tokenizer)
    return found or load_split(dataclasses.replace(config, cache_dir=""), split, tokenizer)


def open_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> tuple[Split, bool]:
    """Returns `load_split`'s result, and whether an earlier run had already tokenised the split."""
    if split not in SPLITS:
        raise DataError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
    text, found = None, False
    if config.dataset == TOKENS:
        return given.load_token_file(config, split), True
    if source := _source(config, split):
        identity = _identity(source, tokenizer)
        text, found = cached_tokens(
            config.cache_path, identity, lambda: _encoded(source, identity, config, split, tokenizer)
        )
    return _split_of(text, config, split, tokenizer), found


def find_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> Split | None:
    """Returns a split if that needs no writing, else None; raises the same errors as `load_split`."""
    if config.dataset == TOKENS:
        return given.load_token_file(config, split)
    source = _source(config, split)
    text = find_tokens(config.cache_path, _identity(source, tokenizer)) if source else None
    if source and text is None:
        return None
    return _split_of(text, config, split, tokenizer)


def answer_places(config: DataConfig, tokenizer: Tokenizer, length: int) -> AnswerPlaces | None:
    """Returns the positions of the labels that count in a sample of `length` tokens; None for text, where all do."""
    if pair_size := PAIR_SIZES.get(config.dataset):
        pairs = tasks.pairs_of(length, config.num_items, config.sequence_length)
        return AnswerPlaces(pair_size * pairs, pairs)
    if config.dataset == "copy":
        return AnswerPlaces(length // 2, length // 2)
    if form := needles.FORMS.get(config.dataset):
        return needles.Phrases.of(tokenizer, form).places(length, config.num_items)
    return AnswerPlaces(0, length) if config.is_task else None


# ---- Tokenised and cached text


def _identity(source: Source, tokenizer: Tokenizer) -> Identity:
    return {"tokenizer": tokenizer.name} | source.identity()


def _encoded(
    source: Source, identity: Identity, config: DataConfig, split: str, tokenizer: Tokenizer
) -> Generator[Encoded, None, None]:
    """Yields the tokens of a source; raises a DataError if the whole text is not as expected."""
    total, published = Counts(), config.dataset in wikitext103.VARIANTS
    for tokens, counts in source.encoded(tokenizer):
        if published:  # each document is one line, even an empty one
            counts = dataclasses.replace(counts, num_lines=counts.num_documents)
        total += counts
        yield tokens, counts
    if published:
        wikitext103.check_counts(total, config, split)
    if not total.num_documents:
        raise DataError(f"{split}: no text in {source.where}")
    if _identity(source, tokenizer) != identity:
        raise DataError("a file of the text changed while it was read; prepare again when it is complete")


def _source(config: DataConfig, split: str) -> Source | None:
    """Returns the source of a split's text; None for the embedded corpus, and for tasks without text."""
    if config.dataset.startswith(TFDS) or config.dataset in wikitext103.VARIANTS:
        module = tfds if config.dataset.startswith(TFDS) else wikitext103
        identity, documents = (
            functools.partial(part, config, split) for part in (module.identity, module.read_documents)
        )
        return Source(identity, lambda tokenizer: encode_documents(documents(), tokenizer), config.dataset)
    if config.dataset in TEXT_FILES or config.hides_in_files:
        return _text_source(config, split)
    return _symbol_source(config, split) if config.dataset in SYMBOL_FILES else None


def _text_source(config: DataConfig, split: str) -> Source:
    field = config.field_of_files(split)
    files = find_files(getattr(config, field), f"data.{field}")

    def identity() -> Identity:
        options = {"lines": config.dataset == "lines", "text_field": config.text_field}
        return options | {"files": [file_identity(path) for path in files]}

    def documents() -> Iterator[TextPiece]:
        advance = progress(f"tokenising {split}", sum(path.stat().st_size for path in files))
        for path in files:
            yield from read_documents(path, config.dataset, config.text_field, advance)

    return Source(identity, lambda tokenizer: encode_documents(documents(), tokenizer), ", ".join(map(str, files)))


def _symbol_source(config: DataConfig, split: str) -> Source:
    """Returns the source of images, records or sounds, see `data.domains`."""
    field = config.field_of_files(split)
    files = find_files(getattr(config, field), f"data.{field}", any_name=True)
    held_out = [other for other in domains.PLACES if config.field_of_files(other) == field == "train_files"]

    def identity() -> Identity:
        options: Identity = {"dataset": config.dataset, "split": split if held_out else "", "held_out": held_out}
        if config.shingle and held_out:
            options["shingle"] = config.shingle
        return options | {"files": [file_identity(path) for path in files]}

    def encoded(tokenizer: Tokenizer) -> Iterator[Encoded]:
        advance = progress(f"reading {split}", sum(path.stat().st_size for path in files))
        documents = (document for path in files for document in domains.read_documents(path, config, advance))
        return domains.encode(domains.deal(documents, split, held_out, config.shingle), config, tokenizer)

    what = "family" if config.shingle else "document"
    dealt = f", of which this split gets every {domains.EVERY}th {what}" if split in held_out else ""
    return Source(identity, encoded, ", ".join(map(str, files)) + dealt)


# ---- Splits


def _split_of(text: TokenStream | None, config: DataConfig, split: str, tokenizer: Tokenizer) -> Split:
    """Returns the text, from files or the embedded corpus, or the task that the configuration makes from it."""
    if config.dataset == "niah-1":
        text = TokenStream(np.resize(tokenizer.encode(needles.NOISE), needles.NOISE_TOKENS), 0, 1)
    elif text is None and config.dataset in ("pydoc", *NEEDLES):
        parts = list(encode_documents(((article, True) for article in pydoc_articles(split)), tokenizer))
        tokens = np.concatenate([part for part, _ in parts])
        counts = sum((counts for _, counts in parts), Counts())
        text = TokenStream(tokens, **vars(counts), sha256=hashlib.sha256(tokens.tobytes()).hexdigest())
    if not config.is_task:
        assert text is not None
        return text
    key, trains = tasks.key_of(config.dataset, split), split == "train"
    task: tasks.Task
    if pair_size := PAIR_SIZES.get(config.dataset):
        task = tasks.Recall(key, tokenizer.vocab_size, config.num_items, config.sequence_length, pair_size)
    elif config.dataset == "copy":
        task = tasks.Copying(key, tokenizer.vocab_size)
    elif group := tasks.GROUPS.get(config.dataset):
        task = tasks.StateTracking(key, tokenizer.vocab_size, group)
    else:
        assert text is not None
        form, questions = needles.FORMS[config.dataset], config.num_items if trains else 1
        task = needles.Needles(key, form, text, tokenizer, config.num_items, questions, in_turn=not trains)
    task.check(config.sequence_length)
    for length, *_ in config.stages:
        try:
            task.check(length)
        except ConfigError as error:
            allowed = f"has samples of {length} tokens, and {error.field} {error.allowed}"
            raise ConfigError("data.curriculum", config.curriculum, allowed) from None
    return TaskSplit(task, config.examples if trains else config.validation_examples)


# ---- The embedded corpus
# It is the Python language reference, part of every CPython. Some articles repeat passages of others word for word.
# Articles that share SHINGLE consecutive words, directly or through others, form a group, and a group belongs to one
# split: no SHINGLE consecutive words are both trained on and held out.


def pydoc_articles(split: str) -> list[str]:
    """Returns the articles of the split 'train', 'validation' or 'test', the groups with the most text first."""
    return [article for place, group in enumerate(_groups()) if DEAL[place % len(DEAL)] == split for article in group]


@functools.cache
def _groups() -> list[list[str]]:
    from pydoc_data.topics import topics

    return group_by_shingles([topics[key] for key in sorted(topics)])


def group_by_shingles(articles: Sequence[str], size: int = SHINGLE) -> list[list[str]]:
    """Returns groups of articles that share `size` consecutive words, the group with the most text first."""
    ids: dict[str, int] = {}
    words = [np.array([ids.setdefault(word, len(ids)) for word in article.split()], int) for article in articles]
    found: dict[int, list[str]] = {}
    for article, number in zip(articles, groups_that_share(words, size).tolist()):
        found.setdefault(number, []).append(article)
    return sorted(found.values(), key=lambda group: -sum(map(len, group)))
