"""Evaluation of a split: loss by position, answers of a task that are right, and the figures made of them."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tlinformer_jax.config.run import TrainConfig
from tlinformer_jax.data.batches import Batch
from tlinformer_jax.data.streams import TokenStream
from tlinformer_jax.data.tasks import DEPTHS, REGIONS, Split
from tlinformer_jax.models.model import LanguageModel
from tlinformer_jax.parallel.sharding import EVALUATION_AXES, put_batch, replicated
from tlinformer_jax.training.cross_entropy import (
    LOSS_CHUNK,
    AnswersOf,
    at_places,
    put_back,
    token_losses,
    token_losses_and_hits,
    weighted_places,
)
from tlinformer_jax.training.step import DeviceBatch, compiler_options

CELLS = len(REGIONS) * DEPTHS


# ---- On the device


def eval_step(
    params: Any, batch: DeviceBatch, *, model: LanguageModel, answers: AnswersOf | None = None
) -> dict[str, jax.Array]:
    """Sums of a batch by position: losses (nats) and weights, each float32 [N].

    Of a task's batch also what `answer_sums` says; `answers` are as `train_step` takes them.
    """
    length = batch["labels"].shape[1]
    # A run of a task can be evaluated on a text as well, all of whose labels count.
    known = answers(length) if answers is not None and "starts" in batch else None
    start = 0 if known is None else known.first
    hidden: Any = model.apply({"params": params}, batch["inputs"], start=start, method=model.hidden_states)
    labels, weights, sums = batch["labels"][:, start:], batch["weights"], {}
    if "starts" in batch:
        places = None if known is None else weighted_places(weights[:, start:], known.most)
        if places is not None:
            hidden, labels = at_places(hidden, places), at_places(labels, places)
        losses, hits = token_losses_and_hits(hidden, params["embedding"], labels, LOSS_CHUNK)
        if places is not None:
            losses, hits = put_back(losses, places, length - start, 0), put_back(hits, places, length - start, True)
        losses = jnp.pad(losses, ((0, 0), (start, 0)))
        hits = jnp.pad(hits, ((0, 0), (start, 0)), constant_values=True)
        sums = answer_sums(hits, batch["starts"], batch["cells"])
    else:
        losses = token_losses(hidden, params["embedding"], labels, LOSS_CHUNK)
    return {"losses": jnp.sum(losses * weights, axis=0), "weights": jnp.sum(weights, axis=0), **sums}


def jit_eval_step(
    model: LanguageModel,
    config: TrainConfig,
    param_shardings: Any,
    batch_sharding: Any,
    answers: AnswersOf | None = None,
) -> Any:
    """`eval_step`, compiled for the shardings of its arguments; every process gets the whole sums."""
    return jax.jit(
        functools.partial(eval_step, model=model, answers=answers),
        in_shardings=(param_shardings, batch_sharding),
        out_shardings=replicated(batch_sharding.mesh),
        compiler_options=compiler_options(config),
    )


def answer_sums(hits: jax.Array, starts: jax.Array, cells: jax.Array) -> dict[str, jax.Array]:
    """Right and all answers of a batch, by where they are asked and by where their sources lie.

    An answer is right if greedy decoding writes all of it: each token is the one chosen after those before it.

    Args:
      hits: whether the token after each position is chosen, bool [batch, N].
      starts: see `data.tasks.Samples`, int32 [batch, N].
      cells: see `data.tasks.answer_batches`, int32 [batch, N].

    Returns:
      right and answers, by the position of the answer's last token, float32 [N]; right_cells and answer_cells,
      float32 [CELLS].
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
    """Answers of a task, float64: those that are right, and all.

    Attributes:
      right: by the position of the answer's last token, [N].
      answers: the same.
      right_cells: by region and depth of their sources, [regions, DEPTHS].
      answer_cells: the same.
      chance: see `data.tasks.Task`.
    """

    right: np.ndarray
    answers: np.ndarray
    right_cells: np.ndarray
    answer_cells: np.ndarray
    chance: float

    @classmethod
    def of(cls, sums: dict[str, np.ndarray], chance: float) -> "Answers":
        """From the summed `answer_sums`."""
        right, count = (sums[name].reshape(len(REGIONS), DEPTHS) for name in ("right_cells", "answer_cells"))
        return cls(sums["right"], sums["answers"], right, count, chance)

    def figures(self) -> dict[str, float]:
        """accuracy, the share of answers that are right; accuracy_REGION where there are answers; chance."""
        asked = self.answers.sum()
        figures = {"accuracy": float(self.right.sum() / asked) if asked else math.nan}
        for region, right, count in zip(REGIONS, self.right_cells.sum(axis=1), self.answer_cells.sum(axis=1)):
            if count:
                figures[f"accuracy_{region}"] = float(right / count)
        return figures | {"chance": self.chance}

    def counts(self) -> dict[str, Any]:
        """Right and all answers of each region by depth, as JSON: REGION -> {right, answers}, integers [DEPTHS]."""
        return {
            region: {"right": right.astype(int).tolist(), "answers": count.astype(int).tolist()}
            for region, right, count in zip(REGIONS, self.right_cells, self.answer_cells)
        }


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Sums over a split, by position in the sample.

    Attributes:
      losses: summed cross-entropy in nats, float64 [N].
      weights: number of tokens, float64 [N].
      answers: of a task; else None.
    """

    losses: np.ndarray
    weights: np.ndarray
    answers: Answers | None = None

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return self.mean(0, len(self.losses))

    @property
    def tokens(self) -> int:
        """Tokens that were predicted."""
        return int(self.weights.sum())

    def mean(self, start: int, stop: int) -> float:
        """Mean cross-entropy in nats per token over positions start .. stop - 1; NaN if there are none."""
        weight = self.weights[start:stop].sum()
        return float(self.losses[start:stop].sum() / weight) if weight else math.nan


def evaluate_split(
    step: Callable[[Any, Any], Any], params: Any, batches: Iterator[Batch], mesh: Mesh, chance: float | None = None
) -> Evaluation:
    """Runs the jitted evaluation step over all batches of a split; `chance` is that of a task, else None."""
    totals: dict[str, np.ndarray] = {}
    for batch in batches:
        sums = step(params, put_batch(batch, mesh, EVALUATION_AXES))
        for name, part in sums.items():
            totals[name] = totals.get(name, 0.0) + np.asarray(part, np.float64)
    answers = None if chance is None else Answers.of(totals, chance)
    return Evaluation(totals["losses"], totals["weights"], answers)


def summary(result: Evaluation, stream: Split, generation_window: int) -> dict[str, float]:
    """The figures of a split.

    Returns:
      loss (nats per token), perplexity (per token), perplexity_per_word and perplexity_per_word_with_eol where
      words and lines were counted, bits_per_byte, loss_first_window, and loss_later_windows where the samples are
      longer than one window; `Perplexity` defines the denominators. Of a task: loss (nats per token of the
      answers), and what `Answers.figures` returns.
    """
    if not isinstance(stream, TokenStream):
        assert result.answers is not None
        return {"loss": result.loss, **result.answers.figures()}
    texts = perplexity(float(result.losses.sum()), result.tokens, stream)
    figures = {
        "loss": result.loss,
        "perplexity": texts.per_token,
        "perplexity_per_word": texts.per_word,
        "perplexity_per_word_with_eol": texts.per_word_with_eol,
        "bits_per_byte": texts.bits_per_byte if stream.num_bytes else None,
        "loss_first_window": result.mean(0, generation_window),
    }
    if len(result.losses) > generation_window:
        figures["loss_later_windows"] = result.mean(generation_window, len(result.losses))
    return {name: value for name, value in figures.items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """The figures of one evaluation, from one sum of nats.

    A perplexity per token depends on the tokenizer and on how many easy end-of-text tokens the stream holds, so it
    compares only with itself. Per word and per byte the same nats are shared out over the text, whatever cut it into
    tokens. All of them depend on the context length and on the stride (here N: samples do not overlap).

    Words are what stands between white space. Words, lines and bytes are scaled by the share of the stream's tokens
    that were predicted: the first token and the dropped remainder are not. None where a stream's were not counted, or
    it has none.
    """

    per_token: float  # exp(nats / evaluated tokens), end-of-text tokens included
    per_word: float | None  # exp(nats / words)
    per_word_with_eol: float | None  # exp(nats / (words + lines)), as in word-level results on WikiText-103
    bits_per_byte: float  # nats / ln 2 / UTF-8 bytes of the text


def perplexity(total_nats: float, evaluated_tokens: int, stream: TokenStream) -> Perplexity:
    """Returns the figures for `total_nats`, the summed cross-entropy of `evaluated_tokens` tokens of `stream`."""
    length = len(stream.tokens)
    if not 0 < evaluated_tokens <= length:
        raise ValueError(f"evaluated_tokens = {evaluated_tokens}: must be 1 to {length}, the stream's length")
    share = evaluated_tokens / length
    words, lines = stream.num_words or None, stream.num_lines
    return Perplexity(
        per_token=_exp(total_nats / evaluated_tokens),
        per_word=None if words is None else _per(total_nats, share * words),
        per_word_with_eol=None if words is None or lines is None else _per(total_nats, share * (words + lines)),
        bits_per_byte=total_nats / math.log(2) / (share * stream.num_bytes) if stream.num_bytes else math.nan,
    )


def _per(nats: float, count: float) -> float:
    return _exp(nats / count) if count else math.nan


def _exp(value: float) -> float:
    """exp, but infinite where a float cannot hold it (an untrained model's figure per word)."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
