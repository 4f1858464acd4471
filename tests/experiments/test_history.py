"""What was measured of the history as tables and figures, as an action, and by its command."""

import json

import pytest

from tests.support.commands import check_refusal, in_forks
from tests.support.figures import check_lines
from tests.support.results import MEASURED, made_result
from tlinformer_jax.config.run import run_config
from tlinformer_jax.errors import UserError
from tlinformer_jax.experiments.actions import check_possible
from tlinformer_jax.experiments.driver import run_job
from tlinformer_jax.experiments.figures import history_tables, plot_history
from tlinformer_jax.experiments.frame import frame_of
from tlinformer_jax.experiments.job import Job
from tlinformer_jax.experiments.report import history_lines

SECTIONS = {
    "model": {"vocab_size": 257, "d_model": 16, "num_heads": 2, "num_blocks": 1, "hidden_depth": 0, "d_ff": 24}
    | {"history_window": 8, "generation_window": 8, "dtype": "float32"},
    "train": {"steps": 2, "batch_size": 8, "warmup_steps": 1},
    "data": {"dataset": "pydoc", "tokenizer": "bytes", "sequence_length": 32},
}


def test_tables_and_figures(tmp_path, drawn):
    tables = history_tables(MEASURED)
    assert tables["history_mass"].iloc[1].to_dict() == {"label": "block 0, read by the window", "x": 2, "y": 0.75}
    assert tables["history_length"].iloc[1].to_dict() == {"label": "loss", "x": 4, "y": 2.5}
    figures = plot_history([("one", MEASURED), ("two", MEASURED)], tmp_path, "results_")
    assert [file.name for file in figures] == list(drawn)
    assert [file.name for file in figures] == [
        f"results_history_{kind}.png" for kind in ("mass", "cuts", "length", "same_tokens")
    ]
    window, observation = "read by the window", "read by the observation window"
    masses = {f"block 0, {window}": [(1, 0.25), (2, 0.75)], f"block 1, {window}": [(1, 0.5), (2, 0.5)]}
    masses |= {f"block 0, {observation}": [(1, 0.1), (2, 0.9)], f"block 1, {observation}": [(1, 0.2), (2, 0.8)]}
    for panels, curves in zip(
        drawn.values(),
        [
            masses,
            {"all tokens": [(0, 0.5)], "tokens with more history": [(0, 1.0)]},
            {"loss": [(0, 3.0), (4, 2.5)]},  # the last length has no loss
            {"loss": [(0, 3.25), (8, 2.75)]},  # all of the history stands at the longest
        ],
        strict=True,
    ):
        assert [panel.title for panel in panels] == ["one", "two"]
        for panel in panels:
            check_lines(panel.lines, curves)


CUTS = [
    {"distance": 0, "loss": 3.25, "change": 0.5, "affected_tokens": 8, "affected_change": 1.0},
    {"distance": 4, "loss": 3.5, "change": 0.75, "affected_tokens": 8, "affected_change": 1.5},
    {"distance": 16, "loss": 3.25, "change": 0.0, "affected_tokens": 0, "affected_change": None},
]


def test_a_run_that_was_measured_has_its_rows_and_curves_in_the_report(tmp_path, drawn):
    measured = MEASURED | {"cuts": CUTS, "starts": [0, 4, 8, 12], "losses": {"all": [3.0, 2.5, 2.375, None]}}
    ours = {"architecture": "tlinformer"}
    results = [
        made_result("ours-seed0", 19.0, model=ours, point="ours", then={"history": measured}),
        made_result("ours-seed1", 20.0, 1, model=ours, point="ours"),
        made_result("full", 18.0, point="full"),
    ]
    lines = history_lines(frame_of(results), tmp_path)
    assert lines[0] == "## What the history contributes"
    assert "| ours | 4 | +0.7500 | +1.5000 | 0.25, 0.50 |" in lines
    assert "| ours | 16 | +0.0000 |  | 0.25, 0.50 |" in lines
    assert any("](figures/results_12_3.0M_100_history_cuts.png)" in line for line in lines)
    (cuts,) = drawn["results_12_3.0M_100_history_cuts.png"]
    assert cuts.lines == {
        "all tokens": [(0, 0.5), (4, 0.75)],
        "tokens with more history": [(0, 1.0), (4, 1.5)],
    }


def test_swapped_histories_and_models_without_windows_are_beside_the_cuts(tmp_path, drawn):
    swapped = {"loss": 3.5, "change": 0.75, "affected_tokens": 8, "affected_change": 1.25}
    measured = MEASURED | {"cuts": CUTS, "swapped": swapped}
    no_windows = measured | {"mass": {"edges": [1], "x": [], "z": []}, "share": []}
    results = [
        made_result("ours", 19.0, model={"architecture": "tlinformer"}, point="ours", then={"history": measured}),
        made_result("full", 18.0, point="full", then={"history": no_windows}),
    ]
    lines = history_lines(frame_of(results), tmp_path)
    assert "| ours | another text's | +0.7500 | +1.2500 | 0.25, 0.50 |" in lines
    assert "| full | 4 | +0.7500 | +1.5000 |  |" in lines
    assert "| full | another text's | +0.7500 | +1.2500 |  |" in lines
    masses, cuts = (drawn[f"results_12_3.0M_100_history_{kind}.png"] for kind in ("mass", "cuts"))
    assert (len(masses), len(cuts)) == (1, 2)
    assert [panel.lines["another text's history"] for panel in cuts] == [[(0, 1.25), (4, 1.25)]] * 2
    assert list(history_tables(no_windows)) == ["history_cuts", "history_length", "history_same_tokens"]
    figures = plot_history([("full", no_windows)], tmp_path)
    assert [file.name for file in figures] == [f"history_{kind}.png" for kind in ("cuts", "length", "same_tokens")]


def test_what_a_run_cannot_have_is_refused_before_it_is_trained():
    base = run_config(SECTIONS | {"model": SECTIONS["model"] | {"architecture": "transformer"}})
    check_possible(("evaluate", "history"), base)
    with pytest.raises(UserError, match="history: samples of 8 tokens"):
        check_possible(("history@8",), run_config(SECTIONS))
    task = SECTIONS["data"] | {"dataset": "copy", "tokenizer": "numbers:9"}
    with pytest.raises(UserError, match=r"samples: .*tokenizer = 'numbers:9'"):
        check_possible(("samples",), run_config(SECTIONS | {"data": task}))
    with pytest.raises(UserError, match=r"^history@33: data\.sequence_length = 33: must be even"):
        check_possible(("history@33",), run_config(SECTIONS | {"data": task}))
    with pytest.raises(UserError, match=r"^history@1048576: .*: the validation split has only"):
        check_possible(("history@1048576",), run_config(SECTIONS))
    check_possible(("history", "history@64", "evaluate", "samples"), run_config(SECTIONS))


@pytest.mark.slow
def test_a_training_and_the_command_measure_the_same(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    result = run_job(Job("run", run_config(SECTIONS), workdir, "command", ("history",)))
    measured = result["then"]["history"]
    options = ([f"--out={tmp_path}/out", "--batch_size=4"], ["--distances=4,x"], ["--distances=-1,4"])
    asked, *wrong = in_forks([("history", [f"--workdir={workdir}", *given]) for given in options])
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("| rows of history left | loss | change |")
    swapped = measured["swapped"]
    values = " | ".join(f"{swapped[name]:.4f}" for name in ("loss", "change", "affected_change"))
    assert f"| another text's | {values} |" in asked.stdout
    written = json.loads((tmp_path / "out" / "history.json").read_text())
    assert (written["step"], written["split"], written["samples"]) == (2, "validation", 64)
    assert written["losses"]["all"] == pytest.approx(measured["losses"]["all"], abs=1e-4)
    assert written["mass"]["x"][0] == pytest.approx(measured["mass"]["x"][0], abs=1e-4)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    kinds = ("mass", "cuts", "length", "same_tokens")
    assert {f"history_{kind}.{ending}" for kind in kinds for ending in ("csv", "png")} <= names
    for result, given in zip(wrong, ("4,x", "-1,4"), strict=True):
        check_refusal(result, f"--distances={given}: must be integers from 0 to 2147483647")
