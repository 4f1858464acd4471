"""Evaluates a split: the loss by position and by document, a task's correct answers, and the figures made from them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tlinformer_jax.data.documents import MOST_DOCUMENTS
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tasks import DEPTHS, REGIONS, Split, TaskSplit
from tlinformer_jax.models.model import LanguageModel
from tlinformer_jax.training.loss import (
    LOSS_CHUNK,
    AnswersOf,
    at_positions,
    put_back,
    token_losses_and_hits,
    weighted_positions,
)
from tlinformer_jax.training.step import DeviceBatch

DIGITS = 6  # decimals of a loss; float32 losses have no more
CELLS = len(REGIONS) * DEPTHS


# ---- On the device


def eval_step(
    params: Any, batch: DeviceBatch, *, model: LanguageModel, answers: AnswersOf | None = None
) -> dict[str, jax.Array]:
    """Returns sums over a batch by position: losses and weights.

    For a task also `answer_sums`; for a text also token_losses, the loss of every token, float32 [batch, N].
    """
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
    positions = None if known is None else weighted_positions(weights[:, start:], known.most)
    if positions is not None:
        hidden, labels = at_positions(hidden, positions), at_positions(labels, positions)
    losses, hits = token_losses_and_hits(hidden, params["embedding"], labels, LOSS_CHUNK)
    if positions is not None:
        losses, hits = put_back(losses, positions, length - start, 0), put_back(hits, positions, length - start, True)
    losses = jnp.pad(losses, ((0, 0), (start, 0)))
    sums = {"losses": jnp.sum(losses * weights, axis=0), "weights": jnp.sum(weights, axis=0)}
    if "starts" not in batch:
        return sums | {"token_losses": losses}
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


def document_sums(losses: Float[np.ndarray, "batch N"], documents: Int[np.ndarray, "batch N"]) -> dict[str, np.ndarray]:
    """Sums a batch's losses and counts its labels by the document they belong to; -1 is padding.

    The host does this, in float64: a device would add up all tokens of a document in float32, a GPU in any order.
    """
    real = documents >= 0
    owners = documents[real]
    return {
        "document_losses": np.bincount(owners, losses[real], MOST_DOCUMENTS),
        "document_tokens": np.bincount(owners, minlength=MOST_DOCUMENTS),
    }


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
class Documents:
    """Sums over each document of a split, in the order of the split, float64 [documents]."""

    losses: np.ndarray  # cross-entropy in nats
    tokens: np.ndarray  # predicted tokens; 0 for a document after the last whole sample

    @classmethod
    def of(cls, sums: dict[str, np.ndarray], count: int) -> "Documents":
        """Takes the sums of a split's `count` documents from the summed `document_sums`."""
        return cls(sums["document_losses"][:count], sums["document_tokens"][:count])

    def sums(self) -> dict[str, Any]:
        """Returns loss and tokens of each document, for JSON."""
        return {"loss": self.losses.round(DIGITS).tolist(), "tokens": self.tokens.astype(int).tolist()}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sums over a split, by position in the sample."""

    losses: np.ndarray  # cross-entropy in nats, float64 [N]
    weights: np.ndarray  # tokens, float64 [N]
    answers: Answers | None = None  # None for a text
    documents: Documents | None = None  # None where `data.documents.document_numbers` does not know them

    @classmethod
    def of(cls, sums: dict[str, np.ndarray], stream: Split, length: int) -> "Evaluation":
        """Makes a split's evaluation in samples of `length` tokens from the sums of `eval_step` over its batches."""
        answers = Answers.of(sums, stream.task.chance(length)) if isinstance(stream, TaskSplit) else None
        documents = None
        if isinstance(stream, TokenStream) and "document_tokens" in sums:
            documents = Documents.of(sums, stream.num_documents)
        return cls(sums["losses"], sums["weights"], answers, documents)

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
