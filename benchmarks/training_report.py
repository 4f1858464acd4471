"""Prints, tabulates, writes and plots the rows of `benchmarks.training`."""

import importlib.util
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.plots import log_axes
from tlinformer_jax.experiments.drawing import Curve, draw_curves, figure_of, save
from tlinformer_jax.files import write_text

# Columns of a row; `steps.time_case` explains them.
COLUMNS = (
    "architecture",
    "length",
    "batch",
    "setting",
    "tokens_per_second",
    "mfu",
    "step_seconds",
    "compile_seconds",
    "step_bytes",
    "model_flops",
    "hardware_flops",
    "tokens",
    "first_loss",
    "last_loss",
    "peak_bytes",
    "error",
)

FIGURES = {
    "training_speed.png": ("tokens_per_second", "tokens per second", 1.0),
    "training_memory.png": ("step_bytes", "memory of a step, GB", 1e-9),
}


def best_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the fastest row of every architecture and length, in the order in which they were timed."""
    best: dict[tuple[str, int], Mapping[str, Any]] = {}
    for row in rows:
        case = (row["architecture"], row["length"])
        if row["tokens_per_second"] and row["tokens_per_second"] > best.get(case, {}).get("tokens_per_second", 0):
            best[case] = row
    return list(best.values())


def line(row: Mapping[str, Any]) -> str:
    """Returns a row as a line of text."""
    head = f"{row['architecture']:14} N {row['length']:>9,}  batch {row['batch']:>4}"
    setting = f"  [{row['setting']}]" if row["setting"] else ""
    if row["error"]:
        return f"{head}  {row['error']}{setting}"
    mfu = "" if row["mfu"] is None else f"  MFU {row['mfu']:.1%}"
    memory = "" if row["step_bytes"] is None else f"  {row['step_bytes'] / 1e9:.2f} GB"
    return (
        f"{head}  {row['tokens_per_second']:>12,.0f} tokens/s{mfu}  step {row['step_seconds'] * 1e3:.2f} ms{memory}  "
        f"compile {row['compile_seconds']:.1f} s  loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}{setting}"
    )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the best rows as a Markdown table."""
    head = "| architecture | N | batch | tokens/s | MFU | step | memory | compilation | setting |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for row in best_rows(rows):
        mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        memory = "" if row["step_bytes"] is None else f"{row['step_bytes'] / 1e9:.2f} GB"
        lines.append(
            f"| {row['architecture']} | {row['length']:,} | {row['batch']} | {row['tokens_per_second']:,.0f} | {mfu} | "
            f"{row['step_seconds'] * 1e3:.2f} ms | {memory} | {row['compile_seconds']:.1f} s | {row['setting']} |"
        )
    return "\n".join(lines) + "\n"


def write_results(folder: pathlib.Path, report: Mapping[str, Any]) -> None:
    """Writes training.json and training.md."""
    write_text(folder / "training.json", json.dumps(report, indent=1) + "\n")
    write_text(folder / "training.md", table(report["rows"]))


def plot_training(rows: Sequence[Mapping[str, Any]], device: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws one line per architecture; returns the files, or none, with a message, if matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: pip install 'tlinformer-jax[bench]' has matplotlib", file=sys.stderr)
        return []
    files = []
    for name, (column, label, unit) in FIGURES.items():
        curves: list[Curve] = []
        for architecture in dict.fromkeys(row["architecture"] for row in rows):
            own = [row for row in rows if row["architecture"] == architecture and row[column] is not None]
            points = sorted((row["length"], row[column] * unit) for row in own)
            curves.append((architecture, [length for length, _ in points], [value for _, value in points]))
        figure, (axes,) = figure_of()
        draw_curves(axes, curves)
        log_axes(axes)
        axes.set(xlabel="sequence length N, tokens", ylabel=label, title=f"Training, best batch, {device}")
        files.append(save(figure, folder / name))
    return files
