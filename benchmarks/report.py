"""Writes the inference benchmark's JSON after every part, and a table at the end."""

import json
import pathlib
from typing import Any

from tlinformer_jax.files import write_text

Row = dict[str, Any]

BASELINE, MODEL = "transformer", "tlinformer"
# Ratios of baseline time over TLinFormer time: name -> the keys of the seconds in a row.
RATIOS = {
    "miss": ("figure9", "miss_seconds"),
    "hit": ("figure9", "hit_seconds"),
    "hit_sustained": ("sustained", "seconds"),
    "prefill": ("prefill", "seconds"),
    "windows": ("windows", "seconds"),
}


class Report:
    """The figures so far. Every change is written to disk, so a run that is killed keeps what it measured.

    Attributes:
      values: the content of `inference.json`.
    """

    def __init__(self, folder: pathlib.Path | None, header: Row) -> None:
        self.folder = folder
        self.values: Row = header | {"complete": False, "rows": [], "ratios": [], "longest": []}
        self.write()

    def put(self, kind: str, row: Row) -> None:
        """Adds a row of `kind` ('rows' or 'longest') if it is new, and writes the file."""
        if not any(row is known for known in self.values[kind]):
            self.values[kind].append(row)
        self.write()

    def finish(self) -> None:
        """Marks the run as complete."""
        self.values["complete"] = True
        self.write()

    def write(self) -> None:
        """Writes the file."""
        self.values["ratios"] = ratios(self.values["rows"])
        if self.folder is None:
            return
        write_text(self.folder / "inference.json", json.dumps(self.values, indent=1, allow_nan=False) + "\n")


def add_cache_ratios(row: Row) -> None:
    """Adds to Figure 9's figures how many times as long a token takes without a cache."""
    if "uncached" in row and "figure9" in row:
        for name in ("miss", "hit"):
            row["figure9"][f"uncached_over_{name}"] = row["uncached"]["seconds"] / row["figure9"][f"{name}_seconds"]


def ratios(rows: list[Row]) -> list[Row]:
    """Returns baseline time over TLinFormer time at equal length and batch, for each figure that both have."""
    by_case = {(row["architecture"], row["length"], row["batch"]): row for row in rows}
    found = []
    for (architecture, length, batch), row in by_case.items():
        other = by_case.get((BASELINE, length, batch))
        if architecture != MODEL or other is None:
            continue
        figures = {
            name: other[part][field] / row[part][field]
            for name, (part, field) in RATIOS.items()
            if part in row and part in other
        }
        if figures:
            found.append({"length": length, "batch": batch, **figures})
    return found


def table(values: Row) -> str:
    """Returns the rows as text: milliseconds, and in brackets multiples of the limit."""
    head = (
        f"{'architecture':14} {'N':>11} {'batch':>5} {'miss':>10} {'hit':>9} {'hit sustained':>17} {'slide':>17} "
        f"{'prefill':>17} {'tokens/s':>10} {'cache GB':>9} {'peak GB':>9}"
    )
    lines = [head]
    for row in values["rows"]:
        protocol, memory = row.get("figure9", {}), row.get("memory", {})
        lines.append(
            f"{row['architecture']:14} {row['length']:>11,} {row['batch']:>5} "
            f"{_milliseconds(protocol.get('miss_seconds')):>10} {_milliseconds(protocol.get('hit_seconds')):>9} "
            f"{_multiple(row.get('sustained')):>17} {_multiple(row.get('slide')):>17} "
            f"{_multiple(row.get('prefill')):>17} {_number(row.get('windows', {}).get('tokens_per_second')):>10} "
            f"{_gigabytes(row.get('cache_bytes')):>9} {_gigabytes(memory.get('peak_above_weights_bytes')):>9}"
            + (f"  {row['error']}" if "error" in row else "")
        )
    for ratio in values["ratios"]:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in ratio.items() if name not in ("length", "batch"))
        lines.append(f"{BASELINE} / {MODEL}, N {ratio['length']:,}, batch {ratio['batch']}: {parts}")
    return "\n".join(lines + [longest_line(row) for row in values["longest"]])


def longest_line(row: Row) -> str:
    """Returns a row of the part 'longest' as text."""
    what = f"{row['architecture']}, prompt of {row['length']:,} and a window after it"
    if not row["fits"]:
        return f"{what}: {row['error']}"
    return f"{what}: fits, prompt ({row['filled']}) in {row['fill_seconds']:.2f} s"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


def _multiple(figures: Row | None) -> str:
    return "-" if figures is None else f"{figures['seconds'] * 1e3:.3f} ({figures['multiple']:.2f}x)"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _gigabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e9:.4g}"
