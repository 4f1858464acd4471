"""The paragraph on what the history contributes, against sentences by hand; also where it does not flatter."""

from tests.support.results import MEASURED, made_result
from tlinformer_jax.experiments.contribution import contribution_lines, verdict
from tlinformer_jax.experiments.curves import Mean

CUTS = [
    {"distance": 0, "loss": 3.25, "change": 0.5, "affected_tokens": 8, "affected_change": 1.0},
    {"distance": 4, "loss": 3.5, "change": 0.75, "affected_tokens": 8, "affected_change": 1.5},
    {"distance": 16, "loss": 3.25, "change": 0.0, "affected_tokens": 0, "affected_change": None},
]
OWN = Mean(19.5, 0.5, 2)
TOLD = MEASURED | {"cuts": CUTS, "starts": [0, 4, 8, 12], "losses": {"all": [3.0, 2.5, 2.375, None]}}


def test_the_sliding_window_of_the_same_windows_and_tokens_is_named_and_no_other(tmp_path, drawn):
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
    (cuts,) = drawn["results_12_history_cuts.png"]
    assert cuts.lines == {
        "ours, all tokens": [(0, 0.5), (4, 0.75)],
        "ours, tokens with more history": [(0, 1.0), (4, 1.5)],
    }
    (text,) = [line for line in lines if line.startswith("ours: ")]
    assert "same, of the same windows, " in text
    assert "19.25 against 19.50" in text
    assert not any(name in text for name in ("twice", "other", "full"))


def test_it_tells_what_is_lost_without_the_history_and_what_speaks_against_it():
    text = verdict("ours", TOLD, OWN, {"near": Mean(19.25, None, 1), "far": Mean(20.0, 0.25, 2)})
    assert text.startswith("ours: without its history the loss of a token that has one changes by +1.000 nats.")
    assert "With the last 4 rows left that of one with more changes by +1.500. Unflattering: 4 rows left are" in text
    assert "16" not in text
    assert "the history makes 25%, 50% in the blocks" in text
    assert "With 8 tokens of history a token costs 0.125 nats less than with 4." in text
    assert "Unflattering: near, of the same windows, " in text
    assert "19.25 against 19.50 ± 0.50" in text
    assert "20.00 ± 0.25 against 19.50 ± 0.50" in text
    assert ": far" not in text
    assert "near" not in verdict("ours", TOLD, None, {"near": Mean(19.25, None, 1)})


def test_what_better_cuts_and_unknown_losses_leave_out():
    fewer = {"affected_tokens": 4}  # so of other tokens
    for kept in ({"affected_change": 0.25}, {"affected_change": 1.0005}, fewer):
        assert "Unflattering" not in verdict("ours", TOLD | {"cuts": [CUTS[0], CUTS[1] | kept]}, OWN, {})
    unknown = verdict("ours", MEASURED | {"cuts": [CUTS[2]]}, OWN, {})
    assert (
        unknown == "ours: Of what the window's tokens read, the history makes 25%, 50% in the blocks from the first on."
    )
