"""What makes a figure readable: no look twice."""

import pytest

from tlinformer_jax.experiments.drawing import draw_curves, figure_of, styles

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
