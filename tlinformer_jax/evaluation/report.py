"""An evaluation as a JSON object, with figures by position and by length, and as lines to print."""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tlinformer_jax.data.batches import num_samples, take_samples
from tlinformer_jax.data.streams import TokenStream, cut_documents, encode_pieces, smallest_dtype
from tlinformer_jax.data.tasks import Split, TaskSplit
from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.errors import POSITIVE, ConfigError, DataError, check_value
from tlinformer_jax.evaluation.bootstrap import mean_interval
from tlinformer_jax.files import finite, write_text, writing
from tlinformer_jax.models.feed_forward import with_tallies
from tlinformer_jax.models.model import LanguageModel, embed, hidden_states, prepare_params
from tlinformer_jax.parallel.sharding import EVALUATION_AXES, process_rows, put_batch, replicated
from tlinformer_jax.training.checkpoint import load_run
from tlinformer_jax.training.device_memory import EVALUATION_ADVICE, memory_advice
from tlinformer_jax.training.evaluation import DIGITS, Answers, Evaluation, summary
from tlinformer_jax.training.loss import weighted_loss
from tlinformer_jax.training.setup import Run, TrainedRun
from tlinformer_jax.training.window_loss import DeviceBatch

Report = dict[str, Any]
BINS = 64  # most bins of positions
LABELS = {
    "loss": "loss, nats per token",
    "perplexity": "perplexity per token",
    "perplexity_per_word": "perplexity per word",
    "perplexity_per_word_with_eol": "  line ends as words",
    "bits_per_byte": "bits per byte",
    "loss_first_window": "loss in the first window",
    "loss_later_windows": "loss in later windows",
    "accuracy": "answers right",
    "accuracy_own": "  source in the window",
    "accuracy_observed": "  source in W_oh",
    "accuracy_history": "  source before W_oh",
    "chance": "  by guessing",
}
MOST_ROWS = 16
TEXT_COLUMNS, TASK_COLUMNS = ("perplexity", "bits_per_byte"), ("accuracy", "accuracy_history")


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation."""

    length: int | None = None  # tokens per sample, to evaluate all tokens; None: whole samples as in training
    lengths: tuple[int, ...] = ()  # further lengths at which all tokens are evaluated
    by_position: bool = False  # report losses by position in the sample and in the window
    batch_size: int | None = None  # sequences at a time; None: as many as have the tokens of the configured batch

    def __post_init__(self) -> None:
        lengths = [("lengths", size) for size in self.lengths]
        for name, value in [("length", self.length), ("batch_size", self.batch_size), *lengths]:
            if value is not None:
                check_value(f"evaluation.{name}", value, POSITIVE)


class Source(NamedTuple):
    """The tokens to evaluate."""

    name: str  # for messages
    stream: Split  # the first token is only context
    counted: Split  # the text whose words, lines and bytes are counted
    whole: bool = False  # whether a stream shorter than a sample is evaluated as one


def evaluate_run(
    trained: TrainedRun,
    stream: Split | None = None,
    options: EvaluationOptions = EvaluationOptions(),
    *,
    split: str = "validation",
    command: Sequence[str] = (),
) -> Report:
    """Evaluates a run's parameters on the split named `split`, or on `stream`, that split loaded before.

        from tlinformer_jax import evaluate_run, load_run

        print(evaluate_run(load_run("runs/tiny"), split="train")["figures"]["loss"])

    Without `options.length`, the figures are over the split's whole samples, as in training. With `options.length` and
    `options.lengths`, they are over every token but the first, with a shorter last sample, so over the same tokens.

    Returns:
      A JSON object: the entries of `describe`; split; length, batch_size, tokens (predicted), figures (see
      `training.evaluation.summary`); by_document, for a split of 2 to 200 documents whose ends are known: the hash of
      its tokens, and for each document, in the order of the split, the sum of losses and the tokens; on request
      by_position, by_window_position, and by_length, a list with the same entries for each length; for a mixture of
      experts expert_load; for a task answers and accuracy_by_position.
    """
    if stream is None:
        stream = trained.run.split(split, None if options.length is None else 1)
    source = Source(f"the {split} split", stream, stream)
    return finite(describe(trained, command) | {"split": split} | evaluate_source(trained, source, options))


def describe(trained: TrainedRun, command: Sequence[str]) -> Report:
    """Describes the run, the machine and the command for a report."""
    config = trained.run.config.to_dict()
    return {
        "command": list(command),
        "workdir_config": {name: config[name] for name in ("model", "train", "data")},
        "step": trained.step,
        "device": jax.devices()[0].device_kind,
        "devices": trained.run.mesh.size,
        "jax": jax.__version__,
    }


def evaluate_source(trained: TrainedRun, source: Source, options: EvaluationOptions) -> Report:
    """Returns the entries of `evaluate_run`'s report from `length` on."""
    for name, length in (("length", options.length), *(("lengths", length) for length in options.lengths)):
        may_be_short = source.whole and name == "length"
        if length is not None and not may_be_short and num_samples(source.stream, length) < 1:
            assert not isinstance(source.stream, TaskSplit)  # a task has samples of any length
            most = len(source.stream.tokens) - 1
            raise ConfigError(f"evaluation.{name}", length, f"must be at most {most} for {source.name}")
    length, every = options.length or trained.run.config.data.sequence_length, source.whole or bool(options.length)
    report = _at_length(trained, source, length, every, options)
    if (load := expert_load(trained.run, trained.params, source.stream)) is not None:
        report["expert_load"] = np.round(load, DIGITS).tolist()
    if options.lengths:
        report["by_length"] = [_at_length(trained, source, size, True, options) for size in options.lengths]
    return report


def _at_length(trained: TrainedRun, source: Source, length: int, rest: bool, options: EvaluationOptions) -> Report:
    """Evaluates in samples of `length` tokens; with `rest`, also the shorter last one."""
    run, padded = trained.run, length
    if rest and not isinstance(source.stream, TaskSplit):
        labels = len(source.stream.tokens) - 1
        # Pad a short text to a power of two, so that texts of all lengths compile few programs.
        padded, length = min(length, 1 << (labels - 1).bit_length()), min(length, labels)
    batch_size = run.evaluation_batch_size(padded, num_samples(source.stream, padded, rest), options.batch_size)
    with memory_advice(EVALUATION_ADVICE):
        result = run.evaluate(trained.params, source.stream, length=padded, batch_size=batch_size, rest=rest)
    result = dataclasses.replace(result, losses=result.losses[:length], weights=result.weights[:length])
    window = run.config.model.generation_window
    figures = summary(result, source.counted, window)
    report: Report = {"length": length, "batch_size": batch_size, "tokens": result.tokens, "figures": figures}
    if result.documents is not None:
        assert isinstance(source.stream, TokenStream)
        report["by_document"] = {"sha256": source.stream.sha256, **result.documents.sums()}
    if result.answers is not None:
        report["answers"] = result.answers.counts()
    if options.by_position:
        report["by_position"] = by_position(result)
        report["by_window_position"] = by_window_position(result, window)
        if result.answers is not None:
            report["accuracy_by_position"] = accuracy_by_position(result.answers)
    return report


def write_report(report: Report, target: pathlib.Path) -> None:
    """Writes a report as JSON, completely or not at all (UserError)."""
    text = json.dumps(report, indent=1, allow_nan=False)
    # Put each list of numbers on one line.
    text = re.sub(r"\[\n[^][{}\"]+\]", lambda found: " ".join(found[0].split()), text)
    with writing(f"{target}:"):
        write_text(target, text + "\n")


def bin_edges(length: int, bins: int = BINS) -> np.ndarray:
    """Returns the edges, int64 [bins + 1] from 0 to length, of at most `bins` bins."""
    bins = min(bins, length)
    return np.arange(bins + 1, dtype=np.int64) * length // bins


def by_position(result: Evaluation, bins: int = BINS) -> dict[str, list[Any]]:
    """Returns edges of bins of positions in the sample, and mean loss and tokens of each bin."""
    edges = bin_edges(len(result.losses), bins)
    loss, tokens = _means(result.losses, result.weights, edges)
    return {"edges": edges.tolist(), "loss": loss, "tokens": tokens}


def by_window_position(result: Evaluation, window: int, bins: int = BINS) -> dict[str, list[Any]]:
    """Returns edges of bins of positions in the window; mean loss and tokens of each, in first and in later windows."""
    length = len(result.losses)
    edges = bin_edges(min(window, length), bins)
    rows = [np.pad(sums, (0, -length % window)).reshape(-1, window) for sums in (result.losses, result.weights)]
    columns = {"edges": edges.tolist()}
    columns["first"], columns["first_tokens"] = _means(rows[0][0], rows[1][0], edges)
    if length > window:
        columns["later"], columns["later_tokens"] = _means(rows[0][1:].sum(axis=0), rows[1][1:].sum(axis=0), edges)
    return columns


def accuracy_by_position(answers: Answers, bins: int = BINS) -> dict[str, list[int]]:
    """Counts correct and all answers by the position of their last token."""
    edges = bin_edges(len(answers.answers), bins)
    right, count = (np.add.reduceat(sums, edges[:-1]) for sums in (answers.right, answers.answers))
    return {"edges": edges.tolist(), "right": [int(sums) for sums in right], "answers": [int(sums) for sums in count]}


def _means(losses: np.ndarray, weights: np.ndarray, edges: np.ndarray) -> tuple[list[float | None], list[int]]:
    """Returns mean loss and number of tokens of each bin."""
    total, tokens = (np.add.reduceat(sums, edges[:-1]) for sums in (losses, weights))
    means = [round(float(loss / count), DIGITS) if count else None for loss, count in zip(total, tokens)]
    return means, [int(count) for count in tokens]


def lines(report: Report) -> list[str]:
    """Formats a report for reading: figures, losses by position, figures by length."""
    config = report["workdir_config"]["model"]
    name = report.get("text_file") or f"{report['split']} split"
    text = [f"{config['architecture']}, step {report['step']}, {name}, {report['tokens']:,} tokens"]
    text += [f"  {LABELS[name]:26} {_number(value)}" for name, value in report["figures"].items()]
    if "by_document" in report:
        documents = report["by_document"]
        count, low, high = mean_interval(documents["loss"], documents["tokens"])
        if np.isfinite(low):
            text.append(f"  loss, 95% over {count} documents: {low:.5g} to {high:.5g}")
    for layer, shares in enumerate(report.get("expert_load", ())):
        spread = f"{min(shares):.1%} to {max(shares):.1%} of the rows each (even: {1 / len(shares):.1%})"
        text.append(f"  {f'experts of layer {layer}':26} {spread}")
    if "by_position" in report:
        whole, window = report["by_position"], report["by_window_position"]
        text += _table(("position", "tokens", "loss"), _rows(whole["edges"], whole["loss"], whole["tokens"]))
        parts = [part for part in ("first", "later") if part in window]
        curves = [_rows(window["edges"], window[part], window[f"{part}_tokens"]) for part in parts]
        heads = ("position in the window", "first window", "later windows")[: 1 + len(parts)]
        text += _table(heads, [(row[0][0], *(cells[2] for cells in row)) for row in zip(*curves)])
    if "by_length" in report:
        columns = ("loss", *(TASK_COLUMNS if "answers" in report else TEXT_COLUMNS))
        sizes = [[f"{part[name]:,}" for name in ("length", "batch_size", "tokens")] for part in report["by_length"]]
        values = [[_number(part["figures"].get(name)) for name in columns] for part in report["by_length"]]
        heads = ("length", "sequences at a time", "tokens", *(name.replace("_", " ") for name in columns))
        text += _table(heads, [(*size, *figures) for size, figures in zip(sizes, values)])
    return text


def _rows(edges: Sequence[int], means: Sequence[float | None], tokens: Sequence[int]) -> list[tuple[str, ...]]:
    """Returns positions, tokens and mean loss; bins are merged to at most MOST_ROWS."""
    starts = np.arange(0, len(tokens), -(-len(tokens) // MOST_ROWS))
    bounds = [*np.asarray(edges)[starts], edges[-1]]
    losses = np.nan_to_num(np.asarray(means, float)) * tokens
    sums, counts = (np.add.reduceat(values, starts) for values in (losses, np.asarray(tokens)))
    return [
        (f"{low:,} to {high - 1:,}", f"{count:,}", _number(total / count if count else None))
        for (low, high), total, count in zip(itertools.pairwise(bounds), sums, counts)
    ]


def _table(heads: Sequence[str], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    return ["", *("  " + "  ".join(map(str.rjust, row, widths)) for row in (heads, *rows))]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


# ---- Evaluating any text


@dataclasses.dataclass(frozen=True)
class TextFigures:
    """Loss in nats per token, its exponential, exp(nats / words), nats / ln 2 / bytes.

    All tokens are predicted, the first one from an end-of-text. Words are separated by white space.
    """

    tokens: int
    words: int
    bytes: int
    loss: float
    perplexity: float
    perplexity_per_word: float | None
    bits_per_byte: float


def text_perplexity(source: str | pathlib.Path | TrainedRun, text: str, length: int | None = None) -> TextFigures:
    """Evaluates a text in non-overlapping samples of `length` tokens (None: as trained); the last may be shorter.

    from tlinformer_jax import load_run, text_perplexity

    figures = text_perplexity("runs/tiny", "The for statement is used to iterate.")
    run = load_run("runs/tiny")  # for many texts: restores and compiles once
    losses = [text_perplexity(run, text).loss for text in ("A class.", "A function.")]
    """
    trained = source if isinstance(source, TrainedRun) else load_run(source)
    tokens = text_source(text, trained.run.tokenizer)
    report = evaluate_source(trained, tokens, EvaluationOptions(length=length))
    figures, counted = report["figures"], tokens.counted
    assert isinstance(counted, TokenStream)
    return TextFigures(
        report["tokens"],
        counted.num_words or 0,
        counted.num_bytes,
        *map(figures.get, ("loss", "perplexity", "perplexity_per_word", "bits_per_byte")),
    )


def evaluate_text(
    trained: TrainedRun, text: str, options: EvaluationOptions, *, text_file: str, command: Sequence[str] = ()
) -> Report:
    """Evaluates a run over all tokens of a text at every length; returns a report like that of `evaluate_run`."""
    source = text_source(text, trained.run.tokenizer, text_file)
    head = describe(trained, command) | {"text_file": text_file}
    return finite(head | evaluate_source(trained, source, options))


def text_source(text: str, tokenizer: Tokenizer, name: str = "text") -> Source:
    """Encodes a text, with an end-of-text before it."""
    if not isinstance(text, str):
        raise DataError(f"{name}: must be a str, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{name}: must be text; it holds parts of characters (surrogates)") from None
    # Encode in pieces if the tokenizer allows it: some tokenizers are slow on long texts.
    pieces = cut_documents([(text, True)], tokenizer.safe_cut)
    encoded, counts = encode_pieces(pieces, tokenizer, smallest_dtype(tokenizer.vocab_size))
    if len(encoded) < 2:
        raise DataError(f"{name}: must hold some text; it holds no token")
    # Move the end-of-text, which follows every document, to the front.
    stream = TokenStream(np.roll(encoded, 1), counts.num_bytes, 1, counts.num_words, counts.num_lines)
    return Source(name, stream, dataclasses.replace(stream, tokens=encoded[:-1]), whole=True)


# ---- Load of a model's experts


def expert_load(run: Run, params: Any, stream: Split) -> Float[np.ndarray, "layers E"] | None:
    """Returns the fraction of a layer's rows that each expert gets, on a split's first samples; None if no experts."""
    length = run.config.data.sequence_length
    samples = num_samples(stream, length)
    if not run.config.model.mixture or samples < 1:
        return None
    rows = process_rows(run.mesh, run.evaluation_batch_size(length, samples), EVALUATION_AXES)
    batch = take_samples(stream, length, np.where(rows < samples, rows, -1))
    count = functools.partial(expert_rows, model=run.model)
    with jax.set_mesh(run.mesh):
        read = {name: batch[name] for name in ("inputs", "labels", "weights", "documents") if name in batch}
        placed = put_batch(read, run.mesh, EVALUATION_AXES)
        counts = np.asarray(jax.jit(count, out_shardings=replicated(run.mesh))(params, placed))
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def expert_rows(params: Any, batch: DeviceBatch, *, model: LanguageModel) -> Float[Array, "layers E"]:
    """Counts the rows that each expert of each layer gets, among the rows that the loss depends on."""
    config = model.config
    typed: Any = prepare_params(model.apply({"params": params}, method=model.parameters), config)  # type: ignore[arg-type]

    def loss(tallies: Array) -> Array:
        embeddings = embed(typed, config, batch["inputs"], documents=batch.get("documents"))
        hidden = hidden_states(with_tallies(typed, tallies), config, embeddings)
        return weighted_loss(hidden, typed.embedding, batch, most=None, z_loss=0.0)[0]

    return jax.grad(loss)(jnp.zeros((config.num_layers, config.num_experts), jnp.float32))
