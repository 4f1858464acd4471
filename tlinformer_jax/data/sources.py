"""Makes a split's token stream or task from a `DataConfig`: the one entry point of training and evaluation."""

import dataclasses
import functools
import hashlib
import itertools
import operator
import pathlib
import sys
import time
from collections.abc import Generator, Iterator, Sequence

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
from tlinformer_jax.data.files import check_patterns, find_files, read_documents
from tlinformer_jax.data.streams import Counts, Encoded, TokenStream, encode_documents, ranked_groups
from tlinformer_jax.data.tasks import AnswerPositions, Split, TaskSplit
from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.errors import ConfigError, DataError

REPORT_EVERY = 10.0  # seconds between two lines about the progress
SHINGLE = 13
# The split of the group of rank r is entry r mod 8; the largest group has rank 0.
SPLIT_BY_RANK = ("train", "train", "train", "train", "validation", "train", "test", "train")


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
    """Loads a split of a configuration that another person may have written, whose patterns may not search disks."""
    if config.dataset in (*TEXT_FILES, *SYMBOL_FILES, *NEEDLES) and split in SPLITS:
        field = config.field_of_files(split)
        check_patterns(getattr(config, field), f"data.{field}")
    return load_split(config, split, tokenizer)


def open_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> tuple[Split, bool]:
    """Returns `load_split`'s result, and whether an earlier run had already tokenised the split."""
    if split not in SPLITS:
        raise DataError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
    text, found = None, False
    if config.dataset == TOKENS:
        return given.load_token_file(config, split), True
    if identity := _identity(config, split, tokenizer):
        text, found = cached_tokens(identity, lambda: _checked(identity, config, split, tokenizer))
    return _split_of(text, config, split, tokenizer), found


def find_split(config: DataConfig, split: str, tokenizer: Tokenizer) -> Split | None:
    """Returns a split if that needs no writing, else None; raises the same errors as `load_split`."""
    if config.dataset == TOKENS:
        return given.load_token_file(config, split)
    identity = _identity(config, split, tokenizer)
    text = find_tokens(identity) if identity else None
    if identity and text is None:
        return None
    return _split_of(text, config, split, tokenizer)


def answer_positions(config: DataConfig, tokenizer: Tokenizer, length: int) -> AnswerPositions | None:
    """Returns the positions of the labels that count in a sample of `length` tokens; None for text, where all do."""
    if pair_size := PAIR_SIZES.get(config.dataset):
        pairs = tasks.pairs_of(length, config.num_items, config.sequence_length)
        return AnswerPositions(pair_size * pairs, pairs)
    if config.dataset == "copy":
        return AnswerPositions(length // 2, length // 2)
    if form := needles.FORMS.get(config.dataset):
        return needles.Phrases.of(tokenizer, form).answer_positions(length, config.num_items)
    return AnswerPositions(0, length) if config.is_task else None


# ---- Tokenised and cached text


def _identity(config: DataConfig, split: str, tokenizer: Tokenizer) -> Identity | None:
    """Returns all that a split's stored tokens depend on, as JSON; None if they are not stored."""
    if config.dataset.startswith(TFDS):
        found = tfds.identity(config, split)
    elif config.dataset in wikitext103.VARIANTS:
        found = wikitext103.identity(config, split)
    elif config.dataset in SYMBOL_FILES:
        found = domains.identity(config, split) | _file_identities(config, split)
    elif config.dataset in TEXT_FILES or config.hides_in_files:
        options = {"lines": config.dataset == "lines", "text_field": config.text_field}
        found = options | _file_identities(config, split)
    else:
        return None
    return {"tokenizer": tokenizer.name} | found


def _file_identities(config: DataConfig, split: str) -> Identity:
    return {"files": [file_identity(path) for path in _files(config, split)]}


def _checked(
    identity: Identity, config: DataConfig, split: str, tokenizer: Tokenizer
) -> Generator[Encoded, None, None]:
    """Yields the tokens of a split's text; raises a DataError if the whole text is not as expected."""
    total, published = Counts(), config.dataset in wikitext103.VARIANTS
    start = last = time.monotonic()
    for tokens, counts in _encoded(config, split, tokenizer):
        if published:  # each document is one line, even an empty one
            counts = dataclasses.replace(counts, num_lines=counts.num_documents)
        total += counts
        yield tokens, counts
        if (now := time.monotonic()) - last >= REPORT_EVERY:
            last, done = now, total.num_bytes / 1e6
            print(f"tokenising {split}: {done:,.1f} MB, {done / (now - start):.2f} MB/s", file=sys.stderr, flush=True)
    if published:
        wikitext103.check_counts(total, config, split)
    if not total.num_documents:
        where = getattr(config, config.field_of_files(split)) or config.dataset
        held_out = split in domains.held_out(config, split)
        share = f", of which this split gets every {domains.HELD_OUT_PERIOD}th document or family" if held_out else ""
        raise DataError(f"{split}: no text in {where}{share}")
    if _identity(config, split, tokenizer) != identity:
        raise DataError("a file of the text changed while it was read; prepare again when it is complete")


def _encoded(config: DataConfig, split: str, tokenizer: Tokenizer) -> Iterator[Encoded]:
    """Yields the tokens of a split's text in order, and counts."""
    if config.dataset in SYMBOL_FILES:
        documents = (document for path in _files(config, split) for document in domains.read_documents(path, config))
        return domains.encode(domains.documents_of_split(documents, config, split), config, tokenizer)
    if config.dataset.startswith(TFDS):
        pieces = tfds.read_documents(config, split)
    elif config.dataset in wikitext103.VARIANTS:
        pieces = wikitext103.read_documents(config, split)
    else:
        read = functools.partial(read_documents, dataset=config.dataset, text_field=config.text_field)
        pieces = itertools.chain.from_iterable(map(read, _files(config, split)))
    return encode_documents(pieces, tokenizer)


def _files(config: DataConfig, split: str) -> list[pathlib.Path]:
    field = config.field_of_files(split)
    return find_files(getattr(config, field), f"data.{field}", any_name=config.dataset in SYMBOL_FILES)


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
    return [article for rank, article in _ranked_topics() if SPLIT_BY_RANK[rank % len(SPLIT_BY_RANK)] == split]


@functools.cache
def _ranked_topics() -> list[tuple[int, str]]:
    from pydoc_data.topics import topics

    return ranked_articles([topics[key] for key in sorted(topics)])


def ranked_articles(articles: Sequence[str], size: int = SHINGLE) -> list[tuple[int, str]]:
    """Returns articles with the ranks of their groups, which share `size` consecutive words, by rank."""
    ids: dict[str, int] = {}
    words = [np.array([ids.setdefault(word, len(ids)) for word in article.split()], int) for article in articles]
    ranks = ranked_groups(words, size, [len(article) for article in articles]).tolist()
    return sorted(zip(ranks, articles), key=operator.itemgetter(0))
