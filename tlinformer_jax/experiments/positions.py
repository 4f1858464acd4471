"""The report's section on the loss by position, in the sample and in the generation window. Without JAX."""

import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tlinformer_jax.experiments.curves import Group, Mean, Result, groups_of, mean_of
from tlinformer_jax.experiments.plots import plot_curves
from tlinformer_jax.experiments.tables import markdown, with_spread

DEFINITIONS = """Later windows of W_og tokens are all but the first; of models without windows, the same positions.
Losses of first windows compare only where W_og is the same. What sliding costs shows at the starts of later windows,
where a token has nothing of its own window behind it.
"""
EVALUATION = "evaluate"
COLUMNS = (
    "model",
    "trained at N",
    "evaluated at",
    "tokens",
    "W_og",
    "perplexity",
    "loss, first window",
    "loss, later windows",
)
LOSS = "validation loss, nats per token"

Evaluation = dict[str, Any]


def position_lines(
    results: Iterable[Result],
    order: Callable[[Group], Any],
    figures: pathlib.Path,
    figure_line: Callable[[pathlib.Path, str], list[str]],
) -> list[str]:
    """The section, where evaluations tell of positions.

    Args:
      results: of runs on text.
      order: of groups.
      figures: where the figures go.
      figure_line: the lines that show one.

    Returns:
      Markdown.
    """
    evaluations = _evaluations(sorted(groups_of(results), key=order))
    if not evaluations:
        return []
    rows = []
    for length, members in evaluations.items():
        for group, parts in members:
            figures_of = [part["figures"] for part in parts]
            means = [_mean(figures_of, name) for name in ("perplexity", "loss_first_window", "loss_later_windows")]
            cells = [with_spread(mean, form) for mean, form in zip(means, ("{:.2f}", "{:.3f}", "{:.3f}"))]
            sizes = (
                group.config.data.sequence_length,
                length,
                parts[0]["tokens"],
                group.config.model.generation_window,
            )
            rows.append((group.label, *(f"{size:,}" for size in sizes), *cells, *_starts(parts)))
    columns = (*COLUMNS, "loss, start of later windows", "tokens of the start")
    lines = ["## Loss by position", "", DEFINITIONS, *markdown(columns, rows), ""]
    for length, members in evaluations.items():
        file = figures / f"results_positions_{length}.png"
        curves = [_curve(group.label, parts, "by_position", "loss") for group, parts in members]
        plot_curves(curves, ("position in the sample", LOSS), file)
        lines += figure_line(file, f"Loss by position in samples of {length:,} tokens")
        later = [(label, parts) for label, parts in ((g.label, _with_windows(ps)) for g, ps in members) if parts]
        if later:
            file = figures / f"results_window_positions_{length}.png"
            curves = [_curve(label, parts, "by_window_position", "later") for label, parts in later]
            plot_curves(curves, ("position in a later window", LOSS), file, log_x=True)
            lines += figure_line(file, f"Loss by position in the window, samples of {length:,} tokens")
    return lines


def _evaluations(groups: Iterable[Group]) -> dict[int, list[tuple[Group, list[Evaluation]]]]:
    """Length -> the groups that were evaluated at it, each with its evaluations."""
    found: dict[int, list[tuple[Group, list[Evaluation]]]] = {}
    for group in groups:
        by_length: dict[int, list[Evaluation]] = {}
        for result in group.results:
            for name, part in result["then"].items():
                if name.partition("@")[0] == EVALUATION and "by_position" in part:
                    by_length.setdefault(part["length"], []).append(part)
        for length, parts in by_length.items():
            found.setdefault(length, []).append((group, parts))
    return dict(sorted(found.items()))


def _with_windows(parts: Sequence[Evaluation]) -> list[Evaluation]:
    """The evaluations of samples longer than a window."""
    return [part for part in parts if "later" in part.get("by_window_position", {})]


def _starts(parts: Sequence[Evaluation]) -> tuple[str, str]:
    """The loss in the first bin of the later windows, and that bin's tokens; empty where there are none."""
    windows = [part["by_window_position"] for part in _with_windows(parts)]
    if not windows:
        return "", ""
    return with_spread(mean_of(window["later"][0] for window in windows), "{:.3f}"), f"{windows[0]['edges'][1]:,}"


def _mean(parts: Sequence[Evaluation], name: str) -> Mean | None:
    return mean_of(part.get(name) for part in parts)


def _curve(label: str, parts: Sequence[Evaluation], by: str, of: str) -> tuple[str, list[float], list[float]]:
    """The mean over seeds of the loss in each bin, at the bins' middles."""
    edges = parts[0][by]["edges"]
    columns = zip(*(part[by][of] for part in parts))
    points = [
        ((low + high - 1) / 2, sum(losses) / len(losses))
        for low, high, losses in zip(edges, edges[1:], columns)
        if None not in losses
    ]
    return label, [x for x, _ in points], [y for _, y in points]
