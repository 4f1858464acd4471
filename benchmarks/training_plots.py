"""Plots of `bench.training`: speed and memory against the sequence length."""

import importlib.util
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

FIGURES = {
    "training_speed.png": ("tokens_per_second", "tokens per second", 1.0),
    "training_memory.png": ("step_bytes", "memory of a step, GB", 1e-9),
}


def plot_training(rows: Sequence[Mapping[str, Any]], device: str, folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws one line per architecture; returns the files, none where matplotlib is missing, which it then says."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: the package matplotlib is not installed", file=sys.stderr)
        return []
    from matplotlib.figure import Figure

    files = []
    for name, (column, label, unit) in FIGURES.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for architecture in dict.fromkeys(row["architecture"] for row in rows):
            points = sorted(
                (row["length"], row[column] * unit)
                for row in rows
                if row["architecture"] == architecture and row[column] is not None
            )
            if points:
                axes.plot(*zip(*points), marker="o", label=architecture)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("sequence length N, tokens")
        axes.set_ylabel(label)
        axes.set_title(f"Training, best batch, {device}")
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
        figure.savefig(folder / name, dpi=150)
        files.append(folder / name)
    return files
