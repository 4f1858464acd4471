"""The inference benchmark's figures: the six panels of the paper's Figure 9, and multiples of the limits."""

import pathlib
from typing import Any

from benchmarks.report import BASELINE, MODEL, ratios

Row = dict[str, Any]
Curve = tuple[str, list[float], list[float]]


def write_plots(values: Row, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes figure9.png and multiples.png from the report's values.

    Returns:
      the files.

    Raises:
      ImportError: where matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    rows = sorted((row for row in values["rows"] if row["batch"] == 1), key=lambda row: row["length"])
    title = f"{values['device']}, jax {values['jax']}, d_model {values['config']['d_model']}"
    panels = Figure(figsize=(15, 8), layout="constrained")
    panels.suptitle(title)
    for axes, (name, unit, curves) in zip(panels.subplots(2, 3).flat, _panels(rows)):
        _draw(axes, name, unit, curves)
        axes.set_ylim(bottom=0)
    multiples = Figure(figsize=(8, 5), layout="constrained")
    axes = multiples.subplots()
    _draw(axes, f"Time as a multiple of the limit\n{title}", "times", _multiples(rows))
    axes.set_yscale("log")
    axes.axhline(1.0, color="grey", linewidth=1)
    files = [folder / "figure9.png", folder / "multiples.png"]
    panels.savefig(files[0], dpi=110)
    multiples.savefig(files[1], dpi=110)
    return files


def _panels(rows: list[Row]) -> list[tuple[str, str, list[Curve]]]:
    """Title, unit and curves of the panels (a) to (f)."""

    def protocol(architecture: str, *fields: str, factor: float = 1.0) -> list[Curve]:
        return [
            _curve(rows, field.split("_")[-2 if factor > 1 else -1], architecture, ("figure9", field), factor)
            for field in fields
        ]

    compared = [row for row in ratios(rows) if row["batch"] == 1]
    versus: list[Curve] = [
        (name, [row["length"] for row in compared if name in row], [row[name] for row in compared if name in row])
        for name in ("miss", "hit", "hit_sustained")
    ]
    architectures = dict.fromkeys(row["architecture"] for row in rows)
    cache = [_curve(rows, name, name, ("cache_bytes",), 1e-9) for name in architectures]
    cache += [_curve(rows, f"{name}, equation 7", name, ("equation_7_bytes",), 1e-9) for name in architectures]
    seconds, without = ("miss_seconds", "hit_seconds"), ("uncached_over_miss", "uncached_over_hit")
    return [
        (f"(a) latency of {BASELINE}", "ms", protocol(BASELINE, *seconds, factor=1e3)),
        (f"(b) latency of {MODEL}", "ms", protocol(MODEL, *seconds, factor=1e3)),
        (f"(c) {BASELINE}: without cache / with", "times", protocol(BASELINE, *without)),
        (f"(d) {MODEL}: without cache / with", "times", protocol(MODEL, *without)),
        ("(e) cache", "GB", cache),
        (f"(f) {BASELINE} time / {MODEL} time", "times", versus),
    ]


def _multiples(rows: list[Row]) -> list[Curve]:
    """Of every architecture and part, time over limit."""
    return [
        _curve(rows, f"{name}, {label}", name, (part, "multiple"), 1.0)
        for name in dict.fromkeys(row["architecture"] for row in rows)
        for part, label in (("sustained", "hit sustained"), ("slide", "slide"), ("prefill", "prefill"))
    ]


def _curve(rows: list[Row], label: str, architecture: str, path: tuple[str, ...], factor: float) -> Curve:
    """What stands at `path` in the rows of one architecture that have it, times `factor`."""
    points = [(row["length"], _at(row, path)) for row in rows if row["architecture"] == architecture]
    measured = [(length, value * factor) for length, value in points if value is not None]
    return label, [length for length, _ in measured], [value for _, value in measured]


def _at(row: Row, path: tuple[str, ...]) -> Any:
    for name in path:
        row = row.get(name)  # type: ignore[assignment]
        if row is None:
            return None
    return row


def _draw(axes: Any, title: str, unit: str, curves: list[Curve]) -> None:
    for label, lengths, values in curves:
        if values:
            axes.plot(lengths, values, marker="o", label=label)
    axes.set_title(title)
    axes.set_xlabel("N, tokens")
    axes.set_ylabel(unit)
    axes.set_xscale("log")
    if axes.lines:
        axes.legend(fontsize="small")
