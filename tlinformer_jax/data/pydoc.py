"""The embedded corpus: the Python language reference, which every CPython carries (`pydoc_data.topics`).

Some articles repeat passages of others word for word. Articles that share a run of SHINGLE words, directly or through
others, form one group, and a group is in one split: no run of SHINGLE words is both trained on and held out.
"""

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from tlinformer_jax.data.encoding import Counts, encode_documents
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tokenizers import Tokenizer

SHINGLE = 13
# Of every 8 groups, from the largest to the smallest, one is held out for validation and one for the test.
DEAL = ("train", "train", "train", "train", "validation", "train", "test", "train")


def pydoc_articles(split: str) -> list[str]:
    """Articles of the split 'train', 'validation' or 'test', the groups with most text first."""
    return [article for place, group in enumerate(_groups()) if DEAL[place % len(DEAL)] == split for article in group]


def load_pydoc(split: str, tokenizer: Tokenizer) -> TokenStream:
    """The split as a token stream, an end-of-text after every article."""
    encoded = list(encode_documents(((article, True) for article in pydoc_articles(split)), tokenizer))
    tokens = np.concatenate([part for part, _ in encoded])
    counts = sum((counts for _, counts in encoded), Counts())
    return TokenStream(tokens, **vars(counts), sha256=hashlib.sha256(tokens.tobytes()).hexdigest())


def group_by_shingles(articles: Sequence[str], size: int = SHINGLE) -> list[list[str]]:
    """The connected components of articles that share `size` consecutive words; those with most characters first."""
    groups: list[tuple[list[int], set[tuple[str, ...]]]] = []
    for number, article in enumerate(articles):
        words = article.split()
        members, shingles = [number], set(zip(*(words[start:] for start in range(size))))
        apart = []
        for group in groups:
            if shingles.isdisjoint(group[1]):
                apart.append(group)
            else:
                members, shingles = group[0] + members, shingles | group[1]
        groups = [*apart, (sorted(members), shingles)]
    found = []
    for members in sorted(members for members, _ in groups):
        found.append([articles[number] for number in members])
    return sorted(found, key=lambda group: -sum(map(len, group)))


@functools.cache
def _groups() -> list[list[str]]:
    from pydoc_data.topics import topics

    return group_by_shingles([topics[key] for key in sorted(topics)])
