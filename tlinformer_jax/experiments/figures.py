"""Figures of sweeps and of the report, from tables with a row for each point; matplotlib is imported where it draws."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tlinformer_jax.experiments.frame import CACHE, PERPLEXITY, SPEED, curves_of, knee_of, points_of

# What `evaluation.history` measures: the names of the axes.
HISTORY = {
    "history_mass": ("distance before the window, from", "mass of attention to the history"),
    "history_cuts": ("rows of history left", "change in loss, nats per token"),
    "history_length": ("history before the window, tokens", "loss, nats per token"),
    "history_same_tokens": ("rows of history left, the last: all", "loss of the same tokens, nats per token"),
}


def plot_lines(points: pd.DataFrame, names: tuple[str, str], file: pathlib.Path, x_scale: str = "linear") -> None:
    """Draws a line for each label of a table label, x, y; `names` are those of the axes."""
    figure, axes = _figure(*names)
    for label, part in points.dropna(subset="y").groupby("label", sort=False):
        axes.plot(part["x"], part["y"], marker="o", markersize=3, label=label)
    # On 'symlog', 0 stands as far below 1 as 2 above it.
    axes.set_xscale(x_scale, **({"base": 2, "linthresh": 1} if x_scale == "symlog" else {}))
    axes.legend(fontsize=8)
    _save(figure, file)


def plot_heat_map(shares: pd.DataFrame, title: str, file: pathlib.Path) -> None:
    """Draws shares of right answers, 0 to 1; NaN is grey.

    They have a row for each length, drawn upwards, and columns by depth, the last what the last windows hold.
    """
    figure, axes = _figure("depth of the source before both windows", "tokens")
    axes.grid(visible=False)
    axes.set_facecolor("lightgrey")
    depths = shares.shape[1] - 1
    values = np.insert(shares.to_numpy(float), depths, np.nan, axis=1)  # a gap before the last column
    image = axes.imshow(values, origin="lower", aspect="auto", vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, label="answers right")
    places = range(0, depths, 4)
    axes.set_yticks(range(len(shares)), [f"{length:,}" for length in shares.index])
    axes.set_xticks([*places, depths + 1], [*(f"{place / depths:.0%}" for place in places), "last\nwindows"])
    axes.set_title(title, fontsize=9)
    _save(figure, file)


def plot_sweep(frame: pd.DataFrame, folder: pathlib.Path, prefix: str = "") -> list[pathlib.Path]:
    """Draws perplexity against speed, cache and W_oh / W_total with the knees, where runs have them."""
    points, files = points_of(frame).dropna(subset=PERPLEXITY), []
    curves = curves_of(points)
    for name, column, unit, axis in (
        ("speed", SPEED, 1.0, "training, tokens/s"),
        ("cache", CACHE, 1e-6, "cache of one sequence of N tokens, MB"),
        ("share", "share", 1.0, "W_oh / W_total"),
    ):
        named = points.dropna(subset=column)
        if named.empty:
            continue
        figure, axes = _figure(axis, "validation perplexity")
        if name == "share":
            for total, curve in curves.items():
                _errorbar(axes, curve, column, fmt="-o", label=f"W_total = {total:,}")
                found, _ = knee_of(curve)
                _errorbar(axes, found, column, fmt="*", label=f"knee, W_total = {total:,}", markersize=16)
            named = named.drop([group for curve in curves.values() for group in curve.index])
        _errorbar(axes, named.assign(**{column: named[column] * unit}), column, fmt="s", label="points")
        for label, x, y in zip(named["label"], named[column] * unit, named[PERPLEXITY]):
            axes.annotate(label, (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axes.legend(fontsize=8)
        files.append(folder / f"{prefix}perplexity_{name}.png")
        _save(figure, files[-1])
    return files


def history_tables(measured: Mapping[str, Any]) -> dict[str, pd.DataFrame]:
    """What `evaluation.history` has measured as tables label, x, y for each of HISTORY."""
    edges, cuts, same, starts = (measured[name] for name in ("mass", "cuts", "same_tokens", "starts"))
    kinds = (("all tokens", "change"), ("tokens with more history", "affected_change"))
    rows = (
        [
            (f"{reader}, block {block}", *point)
            for reader in ("x", "z")
            for block, masses in enumerate(edges[reader])
            for point in zip(edges["edges"], masses)
        ],
        [(label, cut["distance"], cut[kind]) for label, kind in kinds for cut in cuts if cut["affected_tokens"]],
        [("loss", *point) for point in zip(starts, measured["losses"]["all"])],
        # All of the history stands at the length of the longest.
        [("loss", starts[-1] if x is None else x, y) for x, y in zip(same["distances"], same["losses"])],
    )
    return {name: pd.DataFrame(part, columns=["label", "x", "y"]).dropna() for name, part in zip(HISTORY, rows)}


def plot_history(
    runs: Sequence[tuple[str, Mapping[str, Any]]], folder: pathlib.Path, prefix: str = ""
) -> list[pathlib.Path]:
    """Draws each of HISTORY for runs beside each other, of each a prefix of its labels and what was measured."""
    tables = [(label, history_tables(measured)) for label, measured in runs]
    files = []
    for name, axes in HISTORY.items():
        files.append(folder / f"{prefix}{name}.png")
        parts = [table[name].assign(label=label + table[name]["label"]) for label, table in tables]
        plot_lines(pd.concat(parts), axes, files[-1], "symlog")
    return files


def _errorbar(axes: Any, points: pd.DataFrame, column: str, **style: Any) -> None:
    """Perplexity against a column of `points_of`, with standard deviations over seeds."""
    if len(points):
        spread = np.nan_to_num(points[f"{PERPLEXITY}.std"])
        axes.errorbar(points[column], points[PERPLEXITY], yerr=spread, capsize=3, **style)


def _figure(x: str, y: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, file: pathlib.Path) -> None:
    figure.savefig(file, dpi=110, metadata={"Software": None})  # without versions: equal figures are equal bytes
