"""Draws the figures of the inference benchmark: `python -m benchmarks.plots --record=FILE.json[,FILE.json] --out=DIR`.

figure9.png has the six panels of the paper's Figure 9, by its protocol. generation.png compares what a user notices on
logarithmic axes: the cost of a token averaged over a generation window with its slide, the prefill, and the cache.
multiples.png has times as multiples of the shortest that the device could need. If several records have a row, the
first record counts. `benchmarks.inference` draws the figures of its own record.
"""

import itertools
import json
import pathlib
from typing import Any

from absl import flags

from benchmarks.report import BASELINE, MODEL, ratios
from tlinformer_jax.commands import cli
from tlinformer_jax.config.model import ARCHITECTURE_NAMES as NAMES
from tlinformer_jax.errors import UserError
from tlinformer_jax.experiments.drawing import Curve, draw_curves, figure_of, save
from tlinformer_jax.files import local_path

Row = dict[str, Any]
KINDS = {"miss": "cache miss (first token)", "hit": "cache hit (third token)"}
AVERAGE = "a token, averaged over a window and its slide"
PARTS = {"sustained": "cache hit", "slide": "slide", "prefill": "prefill"}


def write_plots(values: Row, folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes the figures of the report's values; returns their files; raises ImportError without matplotlib."""
    rows = sorted((row for row in values["rows"] if row["batch"] == 1), key=lambda row: row["length"])
    title = title_of(values)
    files = [folder / name for name in ("figure9.png", "generation.png", "multiples.png")]
    sheet, panels = figure_of(2, 3, (4.6, 3.6))
    for axes, (name, unit, curves) in zip(panels, figure9_panels(rows)):
        _draw(axes, name, unit, curves)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(short)
    sheet.suptitle(f"The protocol of the paper's Figure 9\n{title}", fontsize=10)
    save(sheet, files[0])
    sheet, panels = figure_of(2, 2, (5.4, 3.7))
    every = generation_panels(rows)
    for axes, (name, unit, curves) in zip(panels, every):
        _draw(axes, name, unit, curves)
        log_axes(axes)
    sheet.suptitle(title, fontsize=10)
    save(sheet, files[1])
    sheet, (axes,) = figure_of()
    _draw(axes, f"Time as a multiple of what this device could do at best\n{title}", "times", multiples(rows))
    log_axes(axes)
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.title.set_fontsize(8)
    save(sheet, files[2])
    return files


def title_of(values: Row) -> str:
    """Returns the title of all figures: the device and the sizes of the models."""
    config = values["config"]
    windows = f"{NAMES[MODEL]}: window {config['generation_window']}, observation {config['history_window']}"
    return f"{values['device']}, JAX {values['jax']}, width {config['d_model']}, batch 1. {windows}"


def log_axes(axes: Any) -> None:
    """Makes both axes logarithmic, with tokens as 1K and 1M on the x axis and plain numbers on the y axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_formatter(short)
    axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:,g}", minor_locator=NullLocator())


def short(value: float, _: Any = None) -> str:
    """Returns a number of tokens as 512, 8K or 1M, with decimal K and M."""
    size, unit = next(((size, unit) for size, unit in ((1e6, "M"), (1e3, "K")) if value >= size), (1, ""))
    return f"{value / size:g}{unit}"


def figure9_panels(rows: list[Row]) -> list[tuple[str, str, list[Curve]]]:
    """Returns title, unit and curves of the panels (a) to (f)."""
    caches = [_curve(rows, NAMES[name], name, ("cache_bytes",), 1e-9) for name in _architectures(rows)]
    base, ours = NAMES[BASELINE], NAMES[MODEL]

    def protocol(architecture: str, field: str, factor: float = 1.0) -> list[Curve]:
        fields = {field.format(kind): label for kind, label in KINDS.items()}
        return [_curve(rows, label, architecture, ("figure9", name), factor) for name, label in fields.items()]

    return [
        (f"(a) {base}: time of a token", "ms", protocol(BASELINE, "{}_seconds", 1e3)),
        (f"(b) {ours}: time of a token", "ms", protocol(MODEL, "{}_seconds", 1e3)),
        (f"(c) {base}: time without cache / with", "times", protocol(BASELINE, "uncached_over_{}")),
        (f"(d) {ours}: time without cache / with", "times", protocol(MODEL, "uncached_over_{}")),
        ("(e) cache", "GB", caches),
        (f"(f) {base} time / {ours} time", "times", _compared(rows, KINDS)),
    ]


def generation_panels(rows: list[Row]) -> list[tuple[str, str, list[Curve]]]:
    """Returns title, unit and curves of four panels: a token with its share of a slide, prefill, cache, ratios."""
    tokens = [row | {"token": row["windows"]["seconds"] / row["windows"]["tokens"]} for row in rows if "windows" in row]
    names = _architectures(rows)
    kinds = {"windows": "a token, on the average", "prefill": "prefill", "hit_sustained": "cache hit"}
    return [
        (AVERAGE, "ms", [_curve(tokens, NAMES[name], name, ("token",), 1e3) for name in names]),
        ("prefill", "ms", [_curve(rows, NAMES[name], name, ("prefill", "seconds"), 1e3) for name in names]),
        ("cache", "MB", [_curve(rows, NAMES[name], name, ("cache_bytes",), 1e-6) for name in names]),
        (f"{NAMES[BASELINE]} time / {NAMES[MODEL]} time", "times", _compared(rows, kinds)),
    ]


def _compared(rows: list[Row], kinds: dict[str, str]) -> list[Curve]:
    """Returns a curve of baseline time over TLinFormer time for each kind of ratio."""
    found = ratios(rows)
    return [
        (label, [row["length"] for row in found if kind in row], [row[kind] for row in found if kind in row])
        for kind, label in kinds.items()
    ]


def multiples(rows: list[Row]) -> list[Curve]:
    """Returns a curve of time over limit for every architecture and part."""
    pairs = itertools.product(_architectures(rows), PARTS.items())
    return [_curve(rows, f"{NAMES[name]}, {label}", name, (part, "multiple"), 1.0) for name, (part, label) in pairs]


def _architectures(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(row["architecture"] for row in rows))


def _curve(rows: list[Row], label: str, architecture: str, path: tuple[str, ...], factor: float) -> Curve:
    """Returns the values at `path` of the rows of one architecture that have it, times `factor`."""
    lengths, values = [], []
    for row in rows:
        found: Any = row if row["architecture"] == architecture else {}
        for name in path:
            found = found.get(name) if found else None
        if found is not None:
            lengths.append(row["length"])
            values.append(found * factor)
    return label, lengths, values


def _draw(axes: Any, title: str, unit: str, curves: list[Curve]) -> None:
    draw_curves(axes, curves)
    axes.set_title(title, fontsize=10)
    axes.set(xlabel="N, tokens before it", ylabel=unit)


def main() -> None:
    """Draws the figures of given records."""
    names = RECORD.value
    if not names:
        raise UserError("--record: must name an inference.json")
    try:
        records = [json.loads(local_path(name, "--record").read_text(encoding="utf-8")) for name in names]
        rows = {
            (row["architecture"], row["length"], row["batch"]): row for part in records[::-1] for row in part["rows"]
        }
        title_of(records[0])  # raises now, before the directory is created, if a part of the record is missing
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--record={','.join(names)}: must be records of benchmarks.inference ({error})") from None
    for file in write_plots(records[0] | {"rows": list(rows.values())}, cli.writable_workdir(OUT.value, "--out")):
        print(file)


if __name__ == "__main__":
    RECORD = flags.DEFINE_list("record", [], "Records of benchmarks.inference, inference.json.")
    OUT = flags.DEFINE_string("out", "", "Directory of the figures.")
    cli.run(main)
