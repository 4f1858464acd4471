"""Figures drawn from the curves of a record."""

import json

from tests.support.commands import check_refusal, command
from tests.support.figures import check_lines

PANELS = {
    "loss": {"x": "tokens", "y": "nats", "curves": {"from scratch": [[1, 5.5], [2, 5.0]], "converted": [[1, 4.5]]}},
    "difference": {"x": "tokens", "y": "nats", "curves": {"all": [[0, 0.1], [1, -0.1]]}},
}


def test_every_panel_shows_its_curves(tmp_path, drawn):
    from tools import curves

    curves.draw(PANELS, tmp_path / "figure.png")
    panels = drawn["figure.png"]
    assert [panel.title for panel in panels] == list(PANELS)
    for panel, given in zip(panels, PANELS.values(), strict=True):
        expected = {label: [tuple(map(float, point)) for point in curve] for label, curve in given["curves"].items()}
        check_lines(panel.lines, expected)


def test_a_record_without_curves_is_refused(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({"rows": []}))
    done = command("tools.curves", f"--record={tmp_path}/record.json", f"--out={tmp_path}/figure.png")
    check_refusal(done, f"--record={tmp_path}/record.json: must be a JSON file with the field 'panels'")
