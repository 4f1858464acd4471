"""What figures show, read from matplotlib's axes when they are saved."""

import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

Points = list[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Panel:
    """Data of one pair of axes.

    Attributes:
      title: of the axes.
      lines: label -> points of each line with a label, with or without error bars.
      points: of all lines and error bars, in the order they were drawn.
      spreads: of the points with error bars, the half lengths of the vertical bars, in the same order.
      notes: text -> the point it stands at.
      image: values of an image, rows from the bottom up; NaN where nothing is drawn.
    """

    title: str
    lines: dict[str, Points]
    points: Points
    spreads: list[float]
    notes: dict[str, tuple[float, float]]
    image: np.ndarray | None


def panel(axes: Any) -> Panel:
    """The data that `axes` show."""
    bars = {container.lines[0]: container for container in axes.containers}
    labels = [(bars.get(line, line).get_label(), _points(line)) for line in axes.lines if line in bars or _told(line)]
    return Panel(
        title=axes.get_title(),
        lines={label: points for label, points in labels if not label.startswith("_")},
        points=[point for _, points in labels for point in points],
        spreads=[half for container in bars.values() for half in _half_lengths(container)],
        notes={text.get_text(): tuple(map(float, text.xy)) for text in axes.texts if hasattr(text, "xy")},
        image=np.ma.filled(axes.images[0].get_array().astype(float), np.nan) if axes.images else None,
    )


def check_lines(found: Mapping[str, Points], expected: Mapping[str, Points]) -> None:
    """Asserts that lines have these labels, in this order, and these points."""
    assert list(found) == list(expected)
    for label, points in expected.items():
        np.testing.assert_allclose(found[label], points, rtol=1e-9, err_msg=label)


def _told(line: Any) -> bool:
    """Whether a line is named; the caps of error bars and lines across the whole figure are not."""
    return not line.get_label().startswith("_")


def _points(line: Any) -> Points:
    return [(float(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]


def _half_lengths(container: Any) -> Iterator[float]:
    for segment in container.lines[2][-1].get_segments():
        yield float(segment[1][1] - segment[0][1]) / 2 if len(segment) else float("nan")


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Panel]]:
    """File name -> panels of every figure from now on, filled in while it is saved."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    save, found = figure.savefig, dict[str, list[Panel]]()

    def savefig(self: Any, file: Any, **options: Any) -> None:
        found[pathlib.Path(file).name] = [panel(axes) for axes in self.axes]
        save(self, file, **options)

    monkeypatch.setattr(figure, "savefig", savefig)
    return found
