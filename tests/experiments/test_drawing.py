"""What makes a figure readable: no look twice, and texts that cover nothing."""

import itertools

import pytest

from tlinformer_jax.experiments.drawing import annotate, draw_curves, figure_of, styles

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("count", [2, 10, 23])
def test_no_colour_is_used_twice(count):
    looks = styles(f"model {number % count}" for number in range(2 * count))
    assert len(looks) == count
    assert len({look["color"] for look in looks.values()}) == count
    assert len({str(look) for look in looks.values()}) == count
    _, (axes,) = figure_of()
    draw_curves(axes, [(label, [1, 2], [number, number]) for number, label in enumerate(looks)], looks)
    assert [line.get_color() for line in axes.lines] == [look["color"] for look in looks.values()]


def test_texts_beside_points_cover_neither_each_other_nor_a_point_and_are_not_cut():
    figure, (axes,) = figure_of()
    places = [(0.0, 0.0), (0.02, 0.01), (0.5, 0.5), (0.5, 0.53), (1.0, 1.0), (0.98, 1.0)]
    axes.plot(*zip(*places), "o", markersize=4)
    annotate(axes, [(f"{number} + 128", *place) for number, place in enumerate(places)])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    points = axes.transData.transform(places)
    assert not any(box.contains(*point) for box in boxes for point in points)
    assert all(axes.bbox.padded(1).containsx(x) for box in boxes for x in (box.x0, box.x1))
