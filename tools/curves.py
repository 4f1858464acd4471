"""Draws the curves of a record: `python -m tools.curves --record=docs/measurements/FILE.json --out=FILE.png`.

The record's field "panels" maps the title of a panel to {"x": name, "y": name, "curves": {label: [[x, y], ...]}}. All
panels have the first one's x axis.
"""

import json
import pathlib
from typing import Any

from absl import flags

from tlinformer_jax.commands import cli
from tlinformer_jax.errors import UserError
from tlinformer_jax.files import local_path

RECORD = flags.DEFINE_string("record", "", "JSON file with the field 'panels'.")
OUT = flags.DEFINE_string("out", "", "PNG file to write.")


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
    record, out = cli.given_path(RECORD, "a record with curves"), cli.given_path(OUT, "a PNG file")
    try:
        panels = json.loads(local_path(record, "--record").read_text(encoding="utf-8"))["panels"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--record={record}: must be a JSON file with the field 'panels' ({error})") from None
    draw(panels, out)
    print(out)


if __name__ == "__main__":
    cli.run(main)
