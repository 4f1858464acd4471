"""The section on what the history contributes: its table and its figures."""

from tests.support.results import MEASURED, made_result
from tlinformer_jax.experiments.contribution import contribution_lines

CUTS = [
    {"distance": 0, "loss": 3.25, "change": 0.5, "affected_tokens": 8, "affected_change": 1.0},
    {"distance": 4, "loss": 3.5, "change": 0.75, "affected_tokens": 8, "affected_change": 1.5},
    {"distance": 16, "loss": 3.25, "change": 0.0, "affected_tokens": 0, "affected_change": None},
]
TOLD = MEASURED | {"cuts": CUTS, "starts": [0, 4, 8, 12], "losses": {"all": [3.0, 2.5, 2.375, None]}}


def test_a_run_that_was_measured_has_its_rows_and_curves(tmp_path, drawn):
    ours = {"architecture": "tlinformer"}
    results = [
        made_result("ours-seed0", 19.0, model=ours, point="ours", then={"history": TOLD}),
        made_result("ours-seed1", 20.0, 1, model=ours, point="ours"),
        made_result("full", 18.0, point="full"),
    ]
    lines = contribution_lines(results, lambda group: group.label, tmp_path, lambda file, title: [file.name])
    assert lines[0] == "## What the history contributes"
    assert "| ours | 4 | +0.7500 | +1.5000 | 0.25, 0.50 |" in lines
    assert "results_12_history_cuts.png" in lines
    (cuts,) = drawn["results_12_history_cuts.png"]
    assert cuts.lines == {
        "ours, all tokens": [(0, 0.5), (4, 0.75)],
        "ours, tokens with more history": [(0, 1.0), (4, 1.5)],
    }
