"""The embedded corpus: what is held out stands nowhere in training."""

import itertools
from pydoc_data.topics import topics

import pytest

from tlinformer_jax.data.sources import pydoc_articles, ranked_articles

SPLITS = ("train", "validation", "test")


def runs_of_words(articles: list[str], size: int = 13) -> set[str]:
    """All runs of `size` words, told by a plain loop."""
    found = set()
    for words in (article.split() for article in articles):
        for start in range(len(words) - size + 1):
            found.add(" ".join(words[start : start + size]))
    return found


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(SPLITS, 2)))
def test_no_thirteen_words_stand_in_two_splits(one, other):
    assert not runs_of_words(pydoc_articles(one)) & runs_of_words(pydoc_articles(other))


def test_every_article_is_in_one_split_and_each_split_is_worth_evaluating():
    by_split = [pydoc_articles(split) for split in SPLITS]
    assert sorted(itertools.chain(*by_split)) == sorted(topics.values())
    train, *held_out = (sum(map(len, articles)) for articles in by_split)
    assert all(0.04 < size / (train + sum(held_out)) < 0.15 for size in held_out)


def test_groups_join_through_a_third_article():
    chain = ["a b c d", "x c d e", "d e f", "c q", "e f"]
    joined = ["a b c d", "x c d e", "d e f", "e f"]
    assert ranked_articles(chain, 2) == [*((0, article) for article in joined), (1, "c q")]
    assert ranked_articles(chain, 3) == list(enumerate(chain))
    assert ranked_articles(chain[::-1], 3) == [(0, chain[1]), (1, chain[0]), (2, "d e f"), (3, "e f"), (4, "c q")]
