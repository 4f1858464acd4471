"""Draws the curves of a record: `python -m tools.curves --record=docs/measurements/FILE.json --out=FILE.png`.

The record's field "panels" maps the title of a panel to {"x": name, "y": name, "curves": {label: [[x, y], ...]}}. All
panels have the first one's x axis.
"""

import json
import pathlib
from typing import Any

from absl import flags

from tlinformer_jax.commands import cli
from tlinformer_jax.errors import UserError, file_errors_as


def define_flags() -> None:
    """Defines the command's flags, which other commands define with other meanings."""
    flags.DEFINE_string("record", "", "JSON file with the field 'panels'.")
    flags.DEFINE_string("out", "", "PNG file to write.")


def checked(record: Any) -> dict[str, Any]:
    """Returns the panels of a record; raises a ValueError that says what is missing."""
    panels = record.get("panels") if isinstance(record, dict) else None
    if not isinstance(panels, dict) or not panels:
        raise ValueError("panels: missing, empty, or not an object")
    for title, panel in panels.items():
        for name, kind in (("x", str), ("y", str), ("curves", dict)):
            if not isinstance(panel, dict) or not isinstance(panel.get(name), kind) or not panel[name]:
                raise ValueError(f"panel {title!r}: {name} is missing or of another type")
        for label, curve in panel["curves"].items():
            if not isinstance(curve, list) or not curve or not all(map(_is_point, curve)):
                raise ValueError(f"panel {title!r}: curve {label!r} must be a list of points [x, y]")
    return panels


def _is_point(point: Any) -> bool:
    return isinstance(point, list) and len(point) == 2 and all(type(value) in (int, float) for value in point)


def draw(panels: dict[str, Any], file: pathlib.Path) -> None:
    """Draws the panels side by side."""
    import pandas as pd

    from tlinformer_jax.experiments.figures import plot_lines

    tables = {}
    for title, panel in panels.items():
        points = [(label, *point) for label, curve in panel["curves"].items() for point in curve]
        tables[title] = pd.DataFrame(points, columns=["label", "x", "y"]), panel["y"]
    plot_lines(tables, next(iter(panels.values()))["x"], file, "linear")


def main() -> None:
    """Reads the record and draws its figure."""
    record = cli.given_path(flags.FLAGS["record"], "a record with curves")
    out = cli.given_path(flags.FLAGS["out"], "a PNG file")
    with file_errors_as(f"--record={record}: must be a JSON file with the field 'panels'"):
        text = record.read_text(encoding="utf-8")
    try:
        panels = checked(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise UserError(f"--record={record}: must be a JSON file with the field 'panels' ({error})") from None
    with file_errors_as(f"--out={out}: must be a PNG file that can be written"):
        draw(panels, out)
    print(out)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
