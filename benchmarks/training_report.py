"""Rows of `bench.training` as text: lines, the table of the best, JSON and CSV."""

import csv
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

# Of a row; what each is, `training.time_job` says.
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


def best_rows(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The fastest row of every architecture and length, in the order in which they were timed."""
    best: dict[tuple[str, int], Mapping[str, Any]] = {}
    for row in rows:
        place = (row["architecture"], row["length"])
        if row["tokens_per_second"] and row["tokens_per_second"] > best.get(place, {}).get("tokens_per_second", 0):
            best[place] = row
    return list(best.values())


def line(row: Mapping[str, Any]) -> str:
    """A row as it is printed."""
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
    """The best rows as a Markdown table."""
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
    """Writes training.json, training.csv and training.md."""
    rows = report["rows"]
    (folder / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    with open(folder / "training.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    (folder / "training.md").write_text(table(rows))


def window_differences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How far the first windows' losses of a model's rows of batch 1 are from its first row's, a line each."""
    lines: list[str] = []
    first: dict[tuple[str, str], tuple[int, list[float]]] = {}
    for row in rows:
        losses = row.get("window_losses")
        if not losses or row["batch"] != 1:
            continue
        start, truth = first.setdefault((row["architecture"], row["setting"]), (row["length"], losses))
        if truth is not losses:
            pairs = list(zip(losses, truth))
            most = max(abs(value - expected) for value, expected in pairs)
            lines.append(
                f"{row['architecture']}: losses of the first {len(pairs)} windows at N = {row['length']:,} and "
                f"{start:,} differ by at most {most:.1e}; they range from {min(truth):.4f} to {max(truth):.4f}"
            )
    return lines
