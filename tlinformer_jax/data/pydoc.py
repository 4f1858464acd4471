"""The embedded corpus: the Python language reference, which every CPython carries (`pydoc_data.topics`)."""

import hashlib
from collections.abc import Sequence

import numpy as np

from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tokenizers import Tokenizer

HELD_OUT_EVERY = 10


def pydoc_articles(split: str) -> list[str]:
    """Articles of a split, in key order: every tenth is held out for 'validation', which also serves as 'test'."""
    from pydoc_data.topics import topics

    articles = [topics[key] for key in sorted(topics)]
    held_out = [index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 for index in range(len(articles))]
    return [article for article, out in zip(articles, held_out) if out == (split != "train")]


def load_pydoc(split: str, tokenizer: Tokenizer) -> TokenStream:
    """The split as a token stream, an end-of-text after every article."""
    return stream_of(pydoc_articles(split), tokenizer)


def stream_of(documents: Sequence[str], tokenizer: Tokenizer) -> TokenStream:
    """Joins documents that fit in memory into one stream, an end-of-text after each."""
    end = np.array([tokenizer.end_of_text], np.int32)
    pieces = [part for text in documents for part in (tokenizer.encode(text), end)]
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    tokens = np.concatenate(pieces).astype(dtype)
    return TokenStream(
        tokens=tokens,
        num_bytes=sum(len(text.encode("utf-8")) for text in documents),
        num_documents=len(documents),
        num_words=sum(len(text.split()) for text in documents),
        num_lines=sum(text.count("\n") for text in documents),
        sha256=hashlib.sha256(tokens.tobytes()).hexdigest(),
    )
