"""Figures for sweeps and the report, drawn from tables with a row for each point."""

import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tlinformer_jax.experiments.drawing import (
    draw_curves,
    figure_of,
    put_legend_beside,
    save,
    scale_x,
    styles,
)
from tlinformer_jax.experiments.frame import CACHE, PERPLEXITY, SPEED, curves_of, knee_of, points_of

# Figures of `evaluation.history`: the titles of their axes.
HISTORY = {
    "history_mass": ("tokens before the window, from", "share of the attention to the history"),
    "history_cuts": ("rows of history left", "change in loss, nats per token"),
    "history_length": ("history before the window, tokens", "loss, nats per token"),
    "history_same_tokens": ("rows of history left, the last: all", "loss of the same tokens, nats per token"),
}
SWAPPED = "another text's"  # rows of history; see `evaluation.history`
READERS = {"x": "read by the window", "z": "read by the observation window"}
COLUMNS = 3  # panels side by side
MOST_INSIDE = 6  # curves whose legend fits into a panel
DEPTH_TICKS = 4  # depths at which a heat map has a tick
TITLE_WIDTH = 60  # characters of a line above a panel


def shown(file: pathlib.Path, title: str) -> list[str]:
    """Returns the line of a report that shows a figure."""
    return [f"![{title}](figures/{file.name})", ""]


def plot_lines(panels: Mapping[str, tuple[pd.DataFrame, str]], x_name: str, file: pathlib.Path, x_scale: str) -> None:
    """Draws a panel for each title: a line for each label in a table of label, x and y; the string is y's title."""
    columns = min(COLUMNS, len(panels))
    many = any(points["label"].nunique() > MOST_INSIDE for points, _ in panels.values())
    figure, all_axes = figure_of(-(-len(panels) // columns), columns, (12.5, 4.8) if many else (7.0, 4.4))
    looks = styles(pd.concat(points for points, _ in panels.values())["label"])
    for axes, (title, (points, y_name)) in zip(all_axes, panels.items()):
        points = points.dropna(subset="y")
        curves = [(str(label), part["x"], part["y"]) for label, part in points.groupby("label", sort=False)]
        if points["y"].min() < 0 < points["y"].max():
            axes.axhline(0, color="grey", linewidth=1)
        draw_curves(axes, curves, looks)
        if many:
            put_legend_beside(axes)
        scale_x(axes, x_scale)
        axes.set(xlabel=x_name, ylabel=textwrap.fill(y_name, TITLE_WIDTH))
        axes.set_title(textwrap.fill(title, TITLE_WIDTH), fontsize=10)
    for axes in all_axes[len(panels) :]:
        axes.remove()
    save(figure, file)


def plot_heat_maps(maps: Mapping[str, pd.DataFrame], setting: str, file: pathlib.Path) -> None:
    """Draws accuracies of each run: a row for each length, a column for each depth, the last one for near sources.

    `setting` says what the runs were trained on, above all maps.
    """
    columns = min(2, len(maps))
    figure, panels = figure_of(-(-len(maps) // columns), columns, (5.6, 3.6))
    for axes, (title, shares) in zip(panels, maps.items()):
        axes.grid(visible=False)
        axes.set_facecolor("lightgrey")
        depths = shares.shape[1] - 1
        values = np.insert(shares.to_numpy(float), depths, np.nan, axis=1)  # leaves a gap before the last column
        image = axes.imshow(values, origin="lower", aspect="auto", vmin=0, vmax=1, cmap="viridis")
        ticks = range(0, depths, -(-depths // DEPTH_TICKS))
        axes.set_yticks(range(len(shares)), [f"{length:,}" for length in shares.index])
        axes.set_xticks([*ticks, depths + 1], [*(f"{tick / depths:.0%}" for tick in ticks), "last\nwindows"])
        axes.set_title("\n".join(textwrap.fill(line, TITLE_WIDTH) for line in title.split("\n")), fontsize=9)
        axes.set(xlabel="depth of the source before both windows, or in them", ylabel="tokens")
    for axes in panels[len(maps) :]:
        axes.remove()
    figure.colorbar(image, ax=panels[: len(maps)], label="share of answers right; grey: not asked")
    figure.suptitle(textwrap.fill(f"trained on {setting}", TITLE_WIDTH * columns), fontsize=10)
    save(figure, file)


def plot_capacity(curves: Mapping[str, pd.DataFrame], file: pathlib.Path) -> None:
    """Draws a panel for each x: each model's median accuracy over seeds, its interval, and the single runs."""
    figure, all_axes = figure_of(1, len(curves))
    looks = styles(pd.concat(curves.values())["label"])
    for axes, (x_name, points) in zip(all_axes, curves.items()):
        for label, part in points.groupby("label", sort=False):
            spread = np.maximum(0, [part["median"] - part["low"], part["high"] - part["median"]])
            axes.errorbar(part["x"], part["median"], yerr=spread, capsize=3, label=label, markersize=5, **looks[label])
            runs = part[["x", "runs"]].explode("runs")
            axes.plot(runs["x"], runs["runs"], ".", color=looks[label]["color"], alpha=0.4, markersize=4)
        scale_x(axes, "log")
        axes.set(xlabel=x_name, ylabel="answers right, median over seeds", ylim=(-0.03, 1.03))
        axes.legend(fontsize=8)
    save(figure, file)


def plot_sweep(frame: pd.DataFrame, folder: pathlib.Path, prefix: str = "") -> list[pathlib.Path]:
    """Draws perplexity against speed, cache and W_oh / W_total with the knees, if the runs have these figures."""
    points, files = points_of(frame).dropna(subset=PERPLEXITY), []
    curves = curves_of(points)
    for name, column, unit, axis in (
        ("speed", SPEED, 1.0, "training, tokens/s"),
        ("cache", CACHE, 1e-6, "cache of one sequence of N tokens, MB"),
        ("share", "share", 1.0, "observation window / (observation + generation window)"),
    ):
        named = points.dropna(subset=column)
        if named.empty:
            continue
        named = named.assign(**{column: named[column] * unit})
        alone: dict[str, Any] = {"linestyle": "none"}
        groups = [("point: observation + generation window", named, alone)]
        if name == "share":
            on_curve = [group for curve in curves.values() for group in curve.index]
            groups = [(f"both windows {total:,} rows", curve, {}) for total, curve in curves.items()]
            knees = [(f"knee, both windows {total:,} rows", knee_of(part)[0]) for total, part in curves.items()]
            groups += [(label, found, alone | {"markersize": 14}) for label, found in knees if len(found)]
            groups += [("other sums", named.drop(on_curve), alone)]
        figure, (axes,) = figure_of()
        looks = styles(label for label, _, _ in groups)
        for label, part, change in groups:
            if len(part):
                spread = np.nan_to_num(part[f"{PERPLEXITY}.std"])
                look = {"markersize": 6, **looks[label], **change}
                axes.errorbar(part[column], part[PERPLEXITY], yerr=spread, capsize=3, label=label, **look)
        shared = named["windows"].isna() | named["windows"].duplicated(keep=False)
        notes = zip(named["windows"].mask(shared, named["label"]), named[column], named[PERPLEXITY])
        for text, *point in notes:
            axes.annotate(text, point, xytext=(5, 3), textcoords="offset points", fontsize=8)
        axes.set(xlabel=axis, ylabel="validation perplexity")
        if name == "speed":
            axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.legend(fontsize=8)
        files.append(save(figure, folder / f"{prefix}perplexity_{name}.png"))
    return files


def history_tables(measured: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """Converts the result of `evaluation.history` to a table with columns label, x and y for each of HISTORY.

    A table without rows is left out: models without windows have no masses.
    """
    edges, same, starts = measured["mass"], measured["same_tokens"], measured["starts"]
    masses = [
        (f"block {block}, {words}", edge, mass)
        for reader, words in READERS.items()
        for block, of_block in enumerate(edges[reader])
        for edge, mass in zip(edges["edges"], of_block)
    ]
    cuts = [cut for cut in measured["cuts"] if cut["affected_tokens"]]
    changes = [("all tokens", cut["distance"], cut["change"]) for cut in cuts]
    changes += [("tokens with more history", cut["distance"], cut["affected_change"]) for cut in cuts]
    if swapped := measured.get("swapped"):  # records of other versions have none
        changes += [(f"{SWAPPED} history", cut["distance"], swapped["affected_change"]) for cut in cuts]
    losses = [("loss", start, loss) for start, loss in zip(starts, measured["losses"]["all"])]
    # A history that is not cut is drawn at the longest history's length.
    distances = [starts[-1] if distance is None else distance for distance in same["distances"]]
    cut_losses = [("loss", distance, loss) for distance, loss in zip(distances, same["losses"])]
    tables = {
        name: pd.DataFrame(rows, columns=["label", "x", "y"]).dropna()
        for name, rows in zip(HISTORY, (masses, changes, losses, cut_losses))
    }
    return {name: table for name, table in tables.items() if len(table)}


def plot_history(
    runs: Sequence[tuple[str, Mapping[str, Any]]], folder: pathlib.Path, prefix: str = ""
) -> list[pathlib.Path]:
    """Draws each figure of HISTORY, with a panel for each run that has its values, under the run's title."""
    tables = {title: history_tables(measured) for title, measured in runs}
    files = []
    for name, (x_name, y_name) in HISTORY.items():
        panels = {title: (table[name], y_name) for title, table in tables.items() if name in table}
        if panels:
            files.append(folder / f"{prefix}{name}.png")
            plot_lines(panels, x_name, files[-1], "symlog")
    return files
