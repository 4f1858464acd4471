"""The paragraph on what the history contributes, against sentences by hand; also where it does not flatter."""

from tests.experiments.test_history import MEASURED
from tests.support.results import made_result
from tlinformer_jax.experiments.contribution import contribution_lines, verdict

CUTS = [
    {"distance": 0, "loss": 3.25, "change": 0.5, "affected_tokens": 8, "affected_change": 1.0},
    {"distance": 4, "loss": 3.5, "change": 0.75, "affected_tokens": 4, "affected_change": 1.5},
    {"distance": 16, "loss": 3.25, "change": 0.0, "affected_tokens": 0, "affected_change": None},
]
TOLD = MEASURED | {"cuts": CUTS, "starts": [0, 4, 8, 12], "losses": {"all": [3.0, 2.5, 2.375, None]}}


def test_the_sliding_window_of_the_same_windows_and_tokens_is_named_and_no_other(tmp_path):
    ours, same = {"architecture": "tlinformer"}, {"architecture": "sliding_window"}
    other = {"architecture": "sliding_window", "generation_window": 4}
    results = [
        made_result("ours-seed0", 19.0, model=ours, point="ours", then={"history": TOLD}),
        made_result("ours-seed1", 20.0, 1, model=ours, point="ours"),
        made_result("same", 19.25, model=same, point="same"),
        made_result("twice", 18.0, model=same, point="twice", tokens=6_000_000),
        made_result("other", 18.0, model=other, point="other"),
        made_result("full", 18.0, point="full"),
    ]
    lines = contribution_lines(results, lambda group: group.label, tmp_path, lambda file, title: [file.name])
    assert lines[0] == "## What the history contributes"
    assert "| ours | 4 | +0.7500 | +1.5000 | 0.25, 0.50 |" in lines
    assert "results_12_history_cuts.png" in lines
    (text,) = [line for line in lines if line.startswith("ours: ")]
    assert "same, of the same windows, " in text
    assert "19.25 against 19.50" in text
    assert not any(name in text for name in ("twice", "other", "full"))


def test_it_tells_what_is_lost_without_the_history_and_what_speaks_against_it():
    text = verdict("ours", TOLD, 19.5, {"near": 19.25, "far": 20.0})
    assert text.startswith("ours: without its history the loss of a token that has one changes by +1.000 nats.")
    assert "With the last 4 rows left it changes by +1.500. Unflattering: 4 rows left are worse than none" in text
    assert "16" not in text
    assert "the history makes 25%, 50% in the blocks" in text
    assert "With 8 tokens of history a token costs -0.125 nats more than with 4." in text
    assert "Unflattering too: near, of the same windows, " in text
    assert "20.00 against 19.50" in text
    assert "too: far" not in text
    assert "near" not in verdict("ours", TOLD, None, {"near": 19.25})


def test_what_better_cuts_and_unknown_losses_leave_out():
    kept = [CUTS[0], CUTS[1] | {"affected_change": 0.25}]
    assert "Unflattering" not in verdict("ours", TOLD | {"cuts": kept}, 19.5, {})
    unknown = verdict("ours", MEASURED | {"cuts": [CUTS[2]]}, 19.5, {})
    assert (
        unknown == "ours: Of what the window's tokens read, the history makes 25%, 50% in the blocks from the first on."
    )
