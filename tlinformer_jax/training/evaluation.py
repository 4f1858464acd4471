"""Evaluates a split: loss by position, a task's correct answers, figures made from both, and n-grams to beat."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tasks import DEPTHS, REGIONS, Split
from tlinformer_jax.models.model import LanguageModel
from tlinformer_jax.training.cross_entropy import (
    LOSS_CHUNK,
    AnswersOf,
    at_places,
    put_back,
    token_losses_and_hits,
    weighted_places,
)
from tlinformer_jax.training.step import DeviceBatch

CELLS = len(REGIONS) * DEPTHS
BYTES = 6  # most tokens of an n-gram's context if tokens are bytes
BYTE_VOCABULARY = 512  # tokens of a vocabulary up to this size count as bytes


# ---- On the device


def eval_step(
    params: Any, batch: DeviceBatch, *, model: LanguageModel, answers: AnswersOf | None = None
) -> dict[str, jax.Array]:
    """Returns sums over a batch by position: losses and weights; for a task also `answer_sums`."""
    length = batch["labels"].shape[1]
    # A model trained on a task may also be evaluated on a text, where all labels count.
    known = answers(length) if answers is not None and "starts" in batch else None
    start = 0 if known is None else known.first
    hidden: Any = model.apply(
        {"params": params},
        batch["inputs"],
        start=start,
        documents=batch.get("documents"),
        method=model.hidden_states,
    )
    labels, weights = batch["labels"][:, start:], batch["weights"]
    places = None if known is None else weighted_places(weights[:, start:], known.most)
    if places is not None:
        hidden, labels = at_places(hidden, places), at_places(labels, places)
    losses, hits = token_losses_and_hits(hidden, params["embedding"], labels, LOSS_CHUNK)
    if places is not None:
        losses, hits = put_back(losses, places, length - start, 0), put_back(hits, places, length - start, True)
    losses = jnp.pad(losses, ((0, 0), (start, 0)))
    sums = {"losses": jnp.sum(losses * weights, axis=0), "weights": jnp.sum(weights, axis=0)}
    if "starts" not in batch:
        return sums
    hits = jnp.pad(hits, ((0, 0), (start, 0)), constant_values=True)
    return sums | answer_sums(hits, batch["starts"], batch["cells"])


def answer_sums(
    hits: Bool[Array, "batch N"], starts: Int[Array, "batch N"], cells: Int[Array, "batch N"]
) -> dict[str, jax.Array]:
    """Counts correct and all answers of a batch, by position and by the cell (region and depth) of their source.

    An answer is correct if greedy decoding writes all of it. `hits` says whether greedy decoding picks the token after
    each position; `starts` come from `data.tasks.Samples`, `cells` from `data.tasks.answer_batches`.
    """
    misses = jnp.cumsum(~hits, axis=1, dtype=jnp.int32)
    before = jnp.pad(misses, ((0, 0), (1, 0)))
    ended = starts >= 0
    wrong = misses - jnp.take_along_axis(before, jnp.maximum(starts, 0), axis=1)
    right = ended & (wrong == 0)

    def by_cell(count: jax.Array) -> jax.Array:
        return jnp.zeros(CELLS, jnp.float32).at[cells].add(jnp.where(count, 1.0, 0.0), mode="drop")

    return {
        "right": jnp.sum(right, axis=0, dtype=jnp.float32),
        "answers": jnp.sum(ended, axis=0, dtype=jnp.float32),
        "right_cells": by_cell(right),
        "answer_cells": by_cell(ended),
    }


# ---- Sums over a split


@dataclasses.dataclass(frozen=True)
class Answers:
    """Counts of a task's correct answers and of all its answers, float64."""

    right: np.ndarray  # [N], by the position of an answer's last token
    answers: np.ndarray
    right_cells: np.ndarray  # [regions, DEPTHS], by region and depth of an answer's source
    answer_cells: np.ndarray
    chance: float  # see `data.tasks.Task`

    @classmethod
    def of(cls, sums: dict[str, np.ndarray], chance: float) -> "Answers":
        """Makes the counts from the summed `answer_sums`."""
        right, count = (sums[name].reshape(len(REGIONS), DEPTHS) for name in ("right_cells", "answer_cells"))
        return cls(sums["right"], sums["answers"], right, count, chance)

    def figures(self) -> dict[str, float]:
        """Returns accuracy over all answers and for each region, and the accuracy by chance."""
        asked = self.answers.sum()
        figures = {"accuracy": float(self.right.sum() / asked) if asked else math.nan}
        for region, right, count in zip(REGIONS, self.right_cells.sum(axis=1), self.answer_cells.sum(axis=1)):
            if count:
                figures[f"accuracy_{region}"] = float(right / count)
        return figures | {"chance": self.chance}

    def counts(self) -> dict[str, Any]:
        """Returns correct and all answers of each region by depth, for JSON."""
        return {
            region: {"right": right.astype(int).tolist(), "answers": count.astype(int).tolist()}
            for region, right, count in zip(REGIONS, self.right_cells, self.answer_cells)
        }


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sums over a split, by position in the sample."""

    losses: np.ndarray  # cross-entropy in nats, float64 [N]
    weights: np.ndarray  # tokens, float64 [N]
    answers: Answers | None = None  # None for a text

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return self.mean(0, len(self.losses))

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return int(self.weights.sum())

    def mean(self, start: int, stop: int) -> float:
        """Returns the mean loss over positions start .. stop - 1; NaN if there are none."""
        weight = self.weights[start:stop].sum()
        return float(self.losses[start:stop].sum() / weight) if weight else math.nan


def summary(result: Evaluation, stream: Split, generation_window: int) -> dict[str, float]:
    """Returns a split's figures: the loss, with those of `Answers` for a task or of `perplexities` for a text."""
    if not isinstance(stream, TokenStream):
        assert result.answers is not None
        return {"loss": result.loss, **result.answers.figures()}
    figures = {"loss": result.loss, **perplexities(float(result.losses.sum()), result.tokens, stream)}
    figures["loss_first_window"] = result.mean(0, generation_window)
    if len(result.losses) > generation_window:
        figures["loss_later_windows"] = result.mean(generation_window, len(result.losses))
    return figures


def perplexities(nats: float, tokens: int, stream: TokenStream) -> dict[str, float]:
    """Returns perplexity per token, per word and per word with line ends, and bits per byte, of `tokens` tokens.

    The stream's words, lines and bytes are scaled by the fraction of its tokens that were predicted. A figure is left
    out if the stream has no bytes, words or lines to count, or if their number is unknown.
    """
    share, words, lines = tokens / len(stream.tokens), stream.num_words, stream.num_lines
    figures = {"perplexity": _exp(nats / tokens)}
    if words:
        figures["perplexity_per_word"] = _exp(nats / (share * words))
    if words and lines is not None:
        figures["perplexity_per_word_with_eol"] = _exp(nats / (share * (words + lines)))
    if stream.num_bytes:
        figures["bits_per_byte"] = nats / math.log(2) / (share * stream.num_bytes)
    return figures


def _exp(value: float) -> float:
    """Returns exp(value), or infinity if a float cannot hold the result."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


# ---- N-grams, whose loss a trained model must beat (`python -m tools.ngram_floor` prints it)
#
# Smoothing is interpolated Kneser-Ney with separate discounts for counts of 1, 2, and more (Chen and Goodman, 1998).


@dataclasses.dataclass(frozen=True)
class _Level:
    """The n-grams of one length, of the training tokens and of the tokens to predict."""

    contexts: np.ndarray  # number of each n-gram's context, ascending
    counts: np.ndarray  # how often each n-gram occurs
    preceded: np.ndarray  # how many different tokens occur before each n-gram
    asked: np.ndarray  # number of the n-gram that ends in each token to predict; -1 if it does not occur in training
    asked_contexts: np.ndarray  # likewise, the number of its context


def kneser_ney_bits(train: np.ndarray, test: np.ndarray, vocab_size: int, context: int) -> list[float]:
    """Returns mean bits per token of n-grams with 0, 1, ... `context` tokens of context, fitted on `train`.

    The mean is over all tokens of `test` but the first. A context that training has not seen is shortened.
    """
    bits = []
    lower = np.full(len(test) - 1, 1.0 / vocab_size)
    for level in _levels(train.astype(np.int64), test.astype(np.int64), vocab_size, context):
        # The longest n-grams are weighted by their counts, shorter ones by the number of tokens that precede them.
        bits.append(float(-np.log2(_mixed(level, level.counts, lower)).mean()))
        lower = _mixed(level, level.preceded, lower)
    return bits


def _levels(train: np.ndarray, test: np.ndarray, vocab_size: int, context: int) -> Iterator[_Level]:
    """Yields the n-grams with 0, 1, ... `context` tokens of context.

    An n-gram's number is its rank among the sorted pairs of its context's number and its last token, so that numbers of
    any length fit into 64 bits.
    """
    ends, test_ends = np.zeros(len(train) + 1, np.int64), np.zeros(len(test) + 1, np.int64)
    level = None
    for size in range(context + 2):
        # Both arrays hold numbers of n-grams of `size` tokens; token i + size (in `test`: i) follows the one at i.
        pairs = ends[:-1] * vocab_size + train[size:]
        # Computes the same as np.unique, several times faster.
        order = np.argsort(pairs)
        ordered = pairs[order]
        starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        keys, counts = ordered[starts], np.diff(starts, append=len(pairs))
        numbers = np.empty_like(order)
        numbers[order] = np.repeat(np.arange(len(keys)), counts)
        if level is not None:
            suffixes = ends[1:][order[starts]]
            yield dataclasses.replace(level, preceded=np.bincount(suffixes, minlength=len(level.counts)))
        asked = test_ends[:-1] * vocab_size + test
        place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
        found = np.where((test_ends[:-1] >= 0) & (keys[place] == asked), place, -1)
        level = _Level(keys // vocab_size, counts, counts, found[1:], test_ends[1:-1])
        ends, test_ends = numbers, np.append(-1, found)


def _mixed(level: _Level, counts: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Returns the probabilities of the tokens to predict; `lower` are those with one token less of context."""
    taken = _discounts(counts)[np.minimum(counts, 3)]
    total, left = np.bincount(level.contexts, counts), np.bincount(level.contexts, taken)
    place = np.where(level.asked_contexts < len(total), level.asked_contexts, -1)
    known = (place >= 0) & (total[place] > 0)
    own = np.where(level.asked >= 0, (counts - taken)[level.asked], 0.0)
    return np.where(known, (own + left[place] * lower) / np.maximum(total[place], 1), lower)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """Returns the discounts for counts of 0, 1, 2, and 3 or more; half if they cannot be estimated."""
    seen = np.bincount(np.minimum(counts, 5), minlength=6)[1:5].astype(np.float64)
    if not seen.all():
        return np.array([0.0, 0.5, 0.5, 0.5])
    times = np.arange(1, 4)
    taken = times - (times + 1) * seen[0] / (seen[0] + 2 * seen[1]) * seen[1:] / seen[:-1]
    return np.append(0.0, np.clip(taken, 0.01, times - 0.01))


def byte_floor(train: np.ndarray, test: np.ndarray, vocab_size: int) -> tuple[float, int]:
    """Returns bits per token of the best model with 1 to BYTES tokens of context, and its number of tokens."""
    bits = kneser_ney_bits(train, test, vocab_size, BYTES)[1:]
    return min((value, size) for size, value in enumerate(bits, 1))


def by_columns(tokens: np.ndarray, width: int) -> np.ndarray:
    """Reorders square images so that the pixels of a column are adjacent, keeping the first token in front."""
    images = tokens[1 : 1 + (len(tokens) - 1) // width**2 * width**2].reshape(-1, width, width)
    return np.append(tokens[:1], images.swapaxes(1, 2))
