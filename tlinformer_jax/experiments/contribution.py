"""The report's section on what the history contributes: tables and figures. Without JAX."""

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tlinformer_jax.experiments.curves import Group, Result, groups_of
from tlinformer_jax.experiments.history import Measured, plot_history
from tlinformer_jax.experiments.tables import markdown

DEFINITIONS = """`tlinformer_jax.evaluation.history` defines what was measured. The loss changes by so much, in nats
per token, where nothing is left of the history but so many rows before the window, without any training, so that the
weights may misread a history shorter than they know, and a change is not what the rows are worth. Tokens with more are
those whose windows have more. The share is that of the history in what the window's tokens read in each block.
"""
ACTION = "history"


def contribution_lines(
    results: Iterable[Result],
    order: Callable[[Group], Any],
    figures: pathlib.Path,
    figure_line: Callable[[pathlib.Path, str], list[str]],
) -> list[str]:
    """The section; of each group the run of the first seed that was measured.

    Args:
      results: of runs on text.
      order: of groups.
      figures: where the figures go.
      figure_line: the lines that show one.

    Returns:
      Markdown; nothing where no run was measured.
    """
    results = list(results)
    lines: list[str] = []
    for name in sorted({name for result in results for name in result["then"] if name.partition("@")[0] == ACTION}):
        groups = sorted(groups_of(result for result in results if name in result["then"]), key=order)
        runs_of = [(group.label, group.results[0]["then"][name]) for group in groups]
        length = runs_of[0][1]["length"]
        lines += [f"Samples of {length:,} tokens:", "", *_cuts_table(runs_of), ""]
        for file in plot_history(runs_of, figures, f"results_{length}_"):
            lines += figure_line(file, f"{file.stem.replace('_', ' ')}, samples of {length:,} tokens")
    return ["## What the history contributes", "", DEFINITIONS, *lines] if lines else []


def _cuts_table(runs_of: Sequence[tuple[str, Measured]]) -> list[str]:
    columns = ("model", "rows of history left", "change in loss", "of tokens with more", "share by block")
    rows = []
    for label, measured in runs_of:
        shares = ", ".join(f"{share:.2f}" for share in measured["share"])
        for part in measured["cuts"]:
            rows.append(
                (label, f"{part['distance']:,}", *map(_change, (part["change"], part["affected_change"])), shares)
            )
    return markdown(columns, rows)


def _change(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"
