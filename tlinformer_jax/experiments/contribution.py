"""The report's section on what the history contributes: tables, a paragraph for each model, figures. Without JAX."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tlinformer_jax.experiments.curves import Group, Mean, Result, groups_of, perplexity
from tlinformer_jax.experiments.history import Measured, plot_history
from tlinformer_jax.experiments.job import essence
from tlinformer_jax.experiments.tables import markdown, with_spread

DEFINITIONS = """`tlinformer_jax.evaluation.history` defines what was measured. The loss changes by so much, in nats
per token, where nothing is left of the history but so many rows before the window, without any training; tokens with
more are those whose windows have more. The share is that of the history in what the window's tokens read in each block.
"""
ACTION = "history"
MARGIN = 0.001  # nats, below which two changes of the loss are told as equal


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
    compared = groups_of(results)
    lines: list[str] = []
    for name in sorted({name for result in results for name in result["then"] if name.partition("@")[0] == ACTION}):
        groups = sorted(groups_of(result for result in results if name in result["then"]), key=order)
        runs_of = [(group.label, group.results[0]["then"][name]) for group in groups]
        length = runs_of[0][1]["length"]
        lines += [f"Samples of {length:,} tokens:", "", *_cuts_table(runs_of), ""]
        for group, (label, measured) in zip(groups, runs_of):
            lines += [verdict(label, measured, *_against_windows(group, compared)), ""]
        for file in plot_history(runs_of, figures, f"results_{length}_"):
            lines += figure_line(file, f"{file.stem.replace('_', ' ')}, samples of {length:,} tokens")
    return ["## What the history contributes", "", DEFINITIONS, *lines] if lines else []


def verdict(label: str, measured: Measured, own: Mean | None, windowed: Mapping[str, Mean]) -> str:
    """One paragraph that says what the figures of a run show, also where they do not flatter it.

    Args:
      label: of the run's group.
      measured: its figures.
      own: perplexity of the group, over its seeds; None where it is not known.
      windowed: label -> perplexity of groups that differ from it in reading no history beyond a sliding window.
    """
    sentences = _of_cuts(label, measured)
    shares = ", ".join(f"{share:.0%}" for share in measured["share"])
    sentences.append(f"Of what the window's tokens read, the history makes {shares} in the blocks from the first on.")
    by_history = zip(measured["starts"], measured["losses"]["all"])
    known = [(start, loss) for start, loss in by_history if start and loss is not None]
    if len(known) > 1:
        (least, short), (most, long) = known[0], known[-1]
        sentences.append(
            f"With {most:,} tokens of history a token costs {abs(long - short):.3f} nats"
            f" {'more' if long > short else 'less'} than with {least:,}."
        )
    for name, other in windowed.items():
        if own is not None:
            told, ours = with_spread(other, "{:.2f}"), with_spread(own, "{:.2f}")
            sentences.append(
                f"{'Unflattering: ' if other.value <= own.value else ''}{name}, of the same windows, each of whose"
                f" layers reads nothing before its sliding window, has perplexity {told} against {ours}."
            )
    return " ".join(sentences)


def _of_cuts(label: str, measured: Measured) -> list[str]:
    cuts = {part["distance"]: part for part in measured["cuts"] if part["affected_change"] is not None}
    if 0 not in cuts:
        return [f"{label}:"]
    changes = {distance: part["affected_change"] for distance, part in cuts.items()}
    none = changes.pop(0)
    sentences = [f"{label}: without its history the loss of a token that has one changes by {none:+.3f} nats."]
    for distance, change in sorted(changes.items()):
        sentences.append(f"With the last {distance:,} rows left that of one with more changes by {change:+.3f}.")
    # Of the same tokens alone: those with more history than the distance are fewer where it exceeds a window.
    alike = [distance for distance in changes if cuts[distance]["affected_tokens"] == cuts[0]["affected_tokens"]]
    worse = ", ".join(f"{distance:,}" for distance in sorted(alike) if changes[distance] > none + MARGIN)
    if worse:
        sentences.append(
            f"Unflattering: {worse} rows left are worse than none, so weights that were trained with a longer history"
            " misread so short a one, and a change is not what the rows that are cut are worth."
        )
    return sentences


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


def _against_windows(group: Group, compared: Iterable[Group]) -> tuple[Mean | None, dict[str, Mean]]:
    """Perplexity of the group, over all of its seeds, and of sliding windows that differ from it in nothing else."""

    def terms(other: Group) -> tuple[Any, ...]:
        config = essence(other.config)
        model = dataclasses.replace(config.model, architecture="tlinformer")
        return (model, dataclasses.replace(config.train, seed=0), config.data, other.results[0]["tokens"])

    alike = [other for other in compared if terms(other) == terms(group)]
    whole = next((other for other in alike if other.label == group.label), group).mean(perplexity)
    windowed = {
        other.label: mean
        for other in alike
        if other.config.model.architecture == "sliding_window"
        and group.config.model.architecture != "sliding_window"
        and (mean := other.mean(perplexity)) is not None
    }
    return whole, windowed


def _change(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"
