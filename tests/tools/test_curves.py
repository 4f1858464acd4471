"""Figures drawn from the curves of a record."""

import json

from tests.support.commands import check_refusal, in_forks
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


PANEL = PANELS["loss"]
DAMAGED = {
    "no panels": ({"rows": []}, "panels: missing"),
    "empty": ({"panels": {}}, "panels: missing, empty"),
    "a list": ({"panels": [1]}, "panels: missing, empty, or not an object"),
    "no panel": ({"panels": {"a": PANEL, "b": 1}}, "panel 'b': x is missing"),
    "no curves": ({"panels": {"a": {"x": "x", "y": "y"}}}, "panel 'a': curves is missing"),
    "no points": ({"panels": {"a": PANEL | {"curves": {"one": [[1, 2], [3]]}}}}, "panel 'a': curve 'one' must be"),
}


def test_a_damaged_record_and_a_figure_that_cannot_be_written_are_refused_in_one_line(tmp_path):
    records = {name: json.dumps(record) for name, (record, _) in DAMAGED.items()} | {"no JSON": "{"}
    for name, text in records.items():
        (tmp_path / f"{name}.json").write_text(text)
    messages = {name: message for name, (_, message) in DAMAGED.items()} | {"no JSON": "(Expecting property"}
    lines = [[f"--record={tmp_path}/{name}.json", f"--out={tmp_path}/a.png"] for name in [*messages, "missing"]]
    (tmp_path / "sound.json").write_text(json.dumps({"panels": PANELS}))
    lines.append([f"--record={tmp_path}/sound.json", f"--out={tmp_path}/no/a.png"])
    *damaged, missing, unwritable = in_forks([("tools.curves", line) for line in lines])
    for (name, message), done in zip(messages.items(), damaged, strict=True):
        check_refusal(done, f"error: --record={tmp_path}/{name}.json: must be a JSON file with the field 'panels' (")
        assert message in done.stderr
    check_refusal(missing, "(No such file or directory)")
    assert missing.stderr.count("missing.json") == 1
    check_refusal(unwritable, f"--out={tmp_path}/no/a.png: must be a PNG file that can be written (No such file")
