"""A report as lines to read."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tlinformer_jax.evaluation.report import Report

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


def lines(report: Report) -> list[str]:
    """The figures of a report, then its losses by position in at most 16 rows, then its figures by length."""
    config = report["workdir_config"]["model"]
    name = report.get("text_file") or f"{report['split']} split"
    text = [f"{config['architecture']}, step {report['step']}, {name}, {report['tokens']:,} tokens"]
    text += [f"  {LABELS[name]:26} {_number(value)}" for name, value in report["figures"].items()]
    text += _positions(report)
    if "by_length" in report:
        columns = ("loss", *(TASK_COLUMNS if "answers" in report else TEXT_COLUMNS))
        rows = [
            (
                f"{part['length']:,}",
                f"{part['batch_size']:,}",
                f"{part['tokens']:,}",
                *(_number(part["figures"].get(name)) for name in columns),
            )
            for part in report["by_length"]
        ]
        heads = (name.replace("_", " ") for name in columns)
        text += _table(("length", "sequences at a time", "tokens", *heads), rows)
    return text


def _positions(report: Report) -> list[str]:
    """Tables of the loss by position, where the report has it."""
    if "by_position" not in report:
        return []
    whole, window = report["by_position"], report["by_window_position"]
    text = _table(("position", "tokens", "loss"), _joined(whole["edges"], (whole["loss"], whole["tokens"])))
    later = [(window["later"], window["later_tokens"])] if "later" in window else []
    heads = ("first window", "later windows")[: 1 + len(later)]
    rows = _joined(window["edges"], (window["first"], window["first_tokens"]), *later)
    # Means alone: how many windows there are is known from the table above.
    rows = [(row[0], *row[2::2]) for row in rows]
    return text + _table(("position in the window", *heads), rows)


def _joined(edges: Sequence[int], *curves: tuple[list[Any], list[int]]) -> list[tuple[str, ...]]:
    """Rows (positions, then tokens and mean loss of each curve), neighbouring bins joined until they are few."""
    joined = -(-(len(edges) - 1) // MOST_ROWS)
    starts = np.arange(0, len(edges) - 1, joined)
    bounds = [*np.asarray(edges)[starts], edges[-1]]
    columns: list[list[str]] = [[f"{low:,} to {high - 1:,}" for low, high in itertools.pairwise(bounds)]]
    for means, tokens in curves:
        weights = np.asarray(tokens, float)
        sums = np.asarray([mean if mean is not None else 0.0 for mean in means]) * weights
        total, count = (np.add.reduceat(values, starts) for values in (sums, weights))
        columns.append([f"{number:,.0f}" for number in count])
        columns.append([_number(loss / number if number else None) for loss, number in zip(total, count)])
    return list(zip(*columns))


def _table(heads: Sequence[str], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    return ["", *("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in (heads, *rows))]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"
