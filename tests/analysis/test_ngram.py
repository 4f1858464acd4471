"""The n-gram floor: against a model of plain dictionaries, and its command on the embedded corpus."""

import collections
import math

import numpy as np
import pytest

from tests.support.commands import command
from tlinformer_jax.analysis.ngram import by_columns, kneser_ney_bits


def dictionary_bits(train: list[int], test: list[int], vocab_size: int, context: int) -> float:
    """Kneser-Ney by its definition, one probability at a time; contexts are tuples."""
    grams = {size: [tuple(train[i : i + size]) for i in range(len(train) - size + 1)] for size in range(1, context + 3)}
    counts: dict[int, dict[tuple[int, ...], int]] = {}
    for size in range(1, context + 2):
        longest = size == context + 1
        counts[size] = collections.Counter(grams[size] if longest else (gram[1:] for gram in set(grams[size + 1])))

    def discount(size: int, count: int) -> float:
        seen = [sum(other == times for other in counts[size].values()) for times in (1, 2, 3, 4)]
        if min(seen) == 0:
            return 0.5
        share, times = seen[0] / (seen[0] + 2 * seen[1]), min(count, 3)
        return min(max(times - (times + 1) * share * seen[times] / seen[times - 1], 0.01), times - 0.01)

    def probability(before: tuple[int, ...], token: int) -> float:
        lower = probability(before[1:], token) if before else 1 / vocab_size
        follow = {gram: count for gram, count in counts[len(before) + 1].items() if gram[:-1] == before}
        if not follow:
            return lower
        taken = {gram: discount(len(gram), count) for gram, count in follow.items()}
        own = follow.get((*before, token), 0) - taken.get((*before, token), 0)
        return (own + sum(taken.values()) * lower) / sum(follow.values())

    bits = [-math.log2(probability(tuple(test[max(0, i - context) : i]), test[i])) for i in range(1, len(test))]
    return sum(bits) / len(bits)


@pytest.mark.parametrize("length", [12, 300])
def test_the_floor_is_kneser_ney(length):
    rng = np.random.default_rng(0)
    # Skewed, so that all counts occur; the test has an id that training has not.
    train, test = rng.geometric(0.4, length).clip(1, 7) - 1, rng.integers(0, 8, 80)
    found = kneser_ney_bits(train, test, 8, 3)
    expected = [dictionary_bits(train.tolist(), test.tolist(), 8, context) for context in range(4)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_long_n_grams_of_large_vocabularies_are_not_confused():
    train = np.arange(200_000) % 199_999
    *_, longest = kneser_ney_bits(train, train[:1000], 200_000, 6)  # 7 ids of 18 bits fit no 64
    assert longest < 2


@pytest.mark.slow
def test_the_command_prints_every_order():
    found = command("tools.ngram_floor", "--config=configs/tiny.py", "--context=2", "--split=test")
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [f"{size} tokens of context" for size in range(3)]
    figures = [float(line.split()[-4]) for line in lines]
    assert figures == sorted(figures, reverse=True)
    task = command("tools.ngram_floor", "--config=configs/recall.py")
    assert (task.returncode, task.stderr) == (2, "error: data.dataset = 'recall': must be a text for n-grams\n")


def test_token_ids_have_no_bytes_to_count(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 9, 300, dtype=np.uint16)
    np.save(tmp_path / "ids.npy", tokens)
    files = [f"--config.data.{split}_files={tmp_path}/ids.npy" for split in ("train", "validation")]
    given = ("--config=tiny", "--config.data.dataset=tokens", "--config.data.tokenizer=ids:9", *files)
    found = command("tools.ngram_floor", *given, "--context=1")
    assert found.returncode == 0, found.stderr
    assert [line.partition(": perplexity ")[0] for line in found.stdout.splitlines()] == [
        "0 tokens of context",
        "1 tokens of context",
    ]
    assert found.stdout.count(" per token\n") == 2


def test_images_by_columns_have_the_pixel_above_before_each():
    assert by_columns(np.array([9, 1, 2, 3, 4, 5, 6, 7, 8, 0]), 2).tolist() == [9, 1, 3, 2, 4, 5, 7, 6, 8]
