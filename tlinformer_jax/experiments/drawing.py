"""The look of all figures: sizes, palette and curves. matplotlib is imported only when drawing."""

import itertools
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

# Okabe and Ito's colours for readers with any colour vision, without yellow, which is hard to see on white, then three
# of Paul Tol's. Every curve of a figure has its own colour, marker and line style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#332288", "#999933")
MARKERS = "osD^vXP<>*"
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
DPI = 150
Curve = tuple[str, Sequence[float], Sequence[float]]  # label, x, y


def styles(labels: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns a style for each label, for all panels of a figure; more than ten labels get shades of one colour map."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    names = list(dict.fromkeys(labels))
    colours: Sequence[str] = COLOURS
    if len(names) > len(COLOURS):
        colours = [to_hex(colormaps["cividis"](number / (len(names) - 1))) for number in range(len(names))]
    lines, markers = itertools.cycle(LINES), itertools.cycle(MARKERS)
    looks = zip(names, colours, lines, markers)
    return {name: {"color": colour, "linestyle": line, "marker": marker} for name, colour, line, marker in looks}


def figure_of(rows: int = 1, columns: int = 1, panel: tuple[float, float] = (7.0, 4.4)) -> tuple[Any, list[Any]]:
    """Returns a figure and its panels, each `panel` inches in size."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(panel[0] * columns, panel[1] * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def draw_curves(axes: Any, curves: Sequence[Curve], looks: dict[str, dict[str, Any]] | None = None) -> None:
    """Draws each curve that has points, and the legend where it covers the least."""
    looks = looks or styles(label for label, _, _ in curves)
    for label, x, y in curves:
        if len(x):
            axes.plot(x, y, label=label, markersize=4, linewidth=1.4, **looks[label])
    if axes.lines:
        axes.legend(fontsize=8, framealpha=0.8, handlelength=3)


def put_legend_beside(axes: Any) -> None:
    """Moves the legend out of the axes, to their right."""
    if legend := axes.get_legend():
        legend.set_loc("center left")
        legend.set_bbox_to_anchor((1, 0.5))


def scale_x(axes: Any, kind: str) -> None:
    """Makes an x axis linear, 'log' or 'symlog', with whole numbers at its ticks.

    On 'symlog', 0 is as far below 1 as 2 is above it.
    """
    axes.set_xscale(kind, **{"log": {"base": 2}, "symlog": {"base": 2, "linthresh": 1}}.get(kind, {}))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def save(figure: Any, file: pathlib.Path) -> pathlib.Path:
    """Writes a PNG without software versions, so that equal figures have equal bytes."""
    figure.savefig(file, dpi=DPI, metadata={"Software": None})
    return file
