"""What `evaluation.history` has measured, as CSV and figures, for one run or beside each other. Without JAX."""

import csv
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tlinformer_jax.experiments.plots import plot_curves

Measured = Mapping[str, Any]
MASS, CUTS, LENGTHS, SAME = "history_mass", "history_cuts", "history_length", "history_same_tokens"


def history_rows(measured: Measured) -> dict[str, list[dict[str, Any]]]:
    """The tables: masses by reader, block and distance; cuts; losses by history; losses of the same tokens."""
    edges, same = measured["mass"]["edges"], measured["same_tokens"]
    masses = [
        {"reader": reader, "block": block, "from_distance": low, "to_distance": high - 1, "mass": mass}
        for reader in ("x", "z")
        for block, row in enumerate(measured["mass"][reader])
        for low, high, mass in zip(edges, edges[1:], row)
    ]
    by_history = zip(measured["starts"], measured["tokens"], measured["losses"]["all"])
    return {
        MASS: masses,
        CUTS: [dict(part) for part in measured["cuts"]],
        LENGTHS: [{"history": start, "tokens": count, "loss": loss} for start, count, loss in by_history],
        SAME: [
            {"distance": "all" if distance is None else distance, "tokens": same["tokens"], "loss": loss}
            for distance, loss in zip(same["distances"], same["losses"])
        ],
    }


def write_csv(measured: Measured, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes each of `history_rows` as a CSV file."""
    files = []
    for name, rows in history_rows(measured).items():
        table = io.StringIO()
        writer = csv.DictWriter(table, list(rows[0]) if rows else [name], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        files.append(folder / f"{name}.csv")
        files[-1].write_text(table.getvalue(), encoding="utf-8")
    return files


def plot_history(runs: Sequence[tuple[str, Measured]], folder: pathlib.Path, prefix: str = "") -> list[pathlib.Path]:
    """Draws masses by distance, changes by cut, losses by history and losses of the same tokens of labelled runs.

    Raises:
      ImportError: where matplotlib is not installed.
    """
    curves: dict[str, list[tuple[str, list[float], list[float]]]] = {name: [] for name in (MASS, CUTS, LENGTHS, SAME)}
    for label, measured in runs:
        lead = f"{label}, " if label else ""
        for reader in ("x", "z"):
            for block, row in enumerate(measured["mass"][reader]):
                curves[MASS].append((f"{lead}{reader}, block {block}", measured["mass"]["edges"][: len(row)], row))
        cuts = [part for part in measured["cuts"] if part["affected_change"] is not None]
        distances = [part["distance"] for part in cuts]
        curves[CUTS].append((f"{lead}all tokens", distances, [part["change"] for part in cuts]))
        curves[CUTS].append((f"{lead}tokens with more history", distances, [part["affected_change"] for part in cuts]))
        known = [pair for pair in zip(measured["starts"], measured["losses"]["all"]) if pair[1] is not None]
        curves[LENGTHS].append((label or "loss", [start for start, _ in known], [loss for _, loss in known]))
        same = measured["same_tokens"]
        # 'all' stands where the longest history begins.
        places = [measured["starts"][-1] if distance is None else distance for distance in same["distances"]]
        told = [pair for pair in zip(places, same["losses"]) if pair[1] is not None]
        curves[SAME].append((label or "loss", [place for place, _ in told], [loss for _, loss in told]))
    names = {
        MASS: ("distance before the window, from", "mass of attention to the history"),
        CUTS: ("rows of history left", "change in loss, nats per token"),
        LENGTHS: ("history before the window, tokens", "loss, nats per token"),
        SAME: ("rows of history left, the last: all", "loss of the same tokens, nats per token"),
    }
    files = []
    for name, lines in curves.items():
        if any(x for _, x, _ in lines):
            files.append(folder / f"{prefix}{name}.png")
            plot_curves(lines, names[name], files[-1], log_x=True)
    return files
