"""What was measured of the history as tables and figures, as an action, and by its command."""

import csv
import json

import pytest

from tests.support.commands import check_refusal, command
from tests.support.figures import check_lines
from tests.support.results import MEASURED
from tlinformer_jax.config import run_config
from tlinformer_jax.errors import UserError
from tlinformer_jax.experiments.actions import check_possible
from tlinformer_jax.experiments.driver import run_job
from tlinformer_jax.experiments.history import history_rows, plot_history, write_csv
from tlinformer_jax.experiments.job import Job

SECTIONS = {
    "model": {"vocab_size": 257, "d_model": 16, "num_heads": 2, "num_blocks": 1, "hidden_depth": 0, "d_ff": 24}
    | {"history_window": 8, "generation_window": 8, "history_segments": 1, "dtype": "float32"},
    "train": {"steps": 2, "batch_size": 8, "warmup_steps": 1},
    "data": {"dataset": "pydoc", "tokenizer": "bytes", "sequence_length": 32},
}


def test_tables_and_figures(tmp_path, drawn):
    rows = history_rows(MEASURED)
    assert rows["history_mass"][1] == {"reader": "x", "block": 0, "from_distance": 2, "to_distance": 3, "mass": 0.75}
    assert rows["history_length"][1] == {"history": 4, "tokens": 8, "loss": 2.5}
    assert rows["history_same_tokens"][1] == {"distance": "all", "tokens": 16, "loss": 2.75}
    for file in write_csv(MEASURED, tmp_path):
        with open(file, encoding="utf-8", newline="") as text:
            found = list(csv.DictReader(text))
        expected = [{key: "" if cell is None else str(cell) for key, cell in row.items()} for row in rows[file.stem]]
        assert found == expected
    figures = plot_history([("one", MEASURED), ("two", MEASURED)], tmp_path, "results_")
    assert [file.name for file in figures] == list(drawn)
    assert [file.name for file in figures] == [
        f"results_history_{kind}.png" for kind in ("mass", "cuts", "length", "same_tokens")
    ]
    masses = {"x, block 0": [(1, 0.25), (2, 0.75)], "x, block 1": [(1, 0.5), (2, 0.5)]}
    masses |= {"z, block 0": [(1, 0.1), (2, 0.9)], "z, block 1": [(1, 0.2), (2, 0.8)]}
    for (panel,), curves in zip(
        drawn.values(),
        [
            masses,
            {"all tokens": [(0, 0.5)], "tokens with more history": [(0, 1.0)]},
            {"": [(0, 3.0), (4, 2.5)]},  # the last length has no loss
            {"": [(0, 3.25), (8, 2.75)]},  # all of the history stands at the longest
        ],
        strict=True,
    ):
        labels = [(run, label) for run in ("one", "two") for label in curves]
        check_lines(panel.lines, {", ".join(filter(None, (run, label))): curves[label] for run, label in labels})


def test_what_a_run_cannot_have_is_refused_before_it_is_trained():
    base = run_config(SECTIONS | {"model": SECTIONS["model"] | {"architecture": "transformer"}})
    with pytest.raises(UserError, match=r"history: .* must have generation windows"):
        check_possible(("evaluate", "history"), base)
    with pytest.raises(UserError, match="history: samples of 8 tokens"):
        check_possible(("history@8",), run_config(SECTIONS))
    chosen = run_config(SECTIONS | {"model": SECTIONS["model"] | {"observed_selection": "top_k"}})
    with pytest.raises(UserError, match=r"samples: .*observed_selection = 'top_k'"):
        check_possible(("samples",), chosen)
    task = SECTIONS["data"] | {"dataset": "copy", "tokenizer": "numbers:9"}
    with pytest.raises(UserError, match=r"samples: .*tokenizer = 'numbers:9'"):
        check_possible(("samples",), run_config(SECTIONS | {"data": task}))
    check_possible(("history", "evaluate", "samples"), run_config(SECTIONS))


@pytest.mark.slow
def test_a_training_and_the_command_measure_the_same(tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    result = run_job(Job("run", run_config(SECTIONS), workdir, "command", ("history",)))
    measured = result["then"]["history"]
    asked = command(
        "tlinformer_jax.analysis.history", f"--workdir={workdir}", f"--out={tmp_path}/out", "--batch_size=4"
    )
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.startswith("| rows of history left | loss | change |")
    written = json.loads((tmp_path / "out" / "history.json").read_text())
    assert (written["step"], written["split"], written["samples"]) == (2, "validation", 64)
    assert written["losses"]["all"] == pytest.approx(measured["losses"]["all"], abs=1e-4)
    assert written["mass"]["x"][0] == pytest.approx(measured["mass"]["x"][0], abs=1e-4)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    kinds = ("mass", "cuts", "length", "same_tokens")
    assert {f"history_{kind}.{ending}" for kind in kinds for ending in ("csv", "png")} <= names
    wrong = command("tlinformer_jax.analysis.history", f"--workdir={workdir}", "--distances=4,x")
    check_refusal(wrong, "--distances=4,x: must be integers of 0 or more with commas between")
