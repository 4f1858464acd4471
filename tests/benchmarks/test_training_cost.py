"""What a trained token costs: the record, its table and its figure, counted and measured on a tiny shape."""

import json
import pathlib

import pytest

from benchmarks import training_cost
from tests.support.commands import check_refusal, command
from tests.support.figures import check_lines

TINY = (
    "--set=model.d_model=16,model.num_heads=2,model.num_blocks=1,model.hidden_depth=0,model.d_ff=16,model.vocab_size=64"
)
SMALL = ["--lengths=8,16", "--windows=0,4", "--batch_tokens=32", TINY]


def record(folder: pathlib.Path) -> dict:
    return json.loads((folder / "training_cost.json").read_text())


def test_counted(tmp_path):
    done = command("benchmarks.training_cost", *SMALL, f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    rows = record(tmp_path)["rows"]
    assert [(row["model"], row["length"], row["seconds"]) for row in rows] == [
        (name, length, None) for name in ("Transformer", "TLinFormer, windows of 4") for length in (8, 16)
    ]
    # 2 layers of four D x D matrices and three D x F, and the head; half of the other tokens' keys and values.
    for row in rows[:2]:
        weights, pairs = 2 * (4 * 16**2 + 3 * 16 * 16) + 64 * 16, (row["length"] + 1) / 2
        assert row["flops"] == pytest.approx(3 * (2 * weights + 2 * 4 * pairs * 16))
    assert rows[3]["flops"] > rows[1]["flops"]
    assert "| training, for each token | 8 | 16 |" in done.stdout
    assert (tmp_path / "training_cost.png").exists()


@pytest.mark.slow
def test_measured_with_as_many_tokens_at_every_length_and_drawn_again(tmp_path):
    done = command("benchmarks.training_cost", *SMALL, "--measure", "--steps=2", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = record(tmp_path)
    assert found["device"] == "cpu"
    for row in found["rows"]:
        assert row["tokens"] == 32
        assert row["seconds"] == pytest.approx(row["step_seconds"] / 32)
    assert "| Transformer, µs |" in done.stdout
    again = command("benchmarks.training_cost", f"--record={tmp_path}/training_cost.json", f"--out={tmp_path}/again")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again" / "training_cost.png").read_bytes() == (tmp_path / "training_cost.png").read_bytes()


def test_the_figure_shows_what_was_measured_and_leaves_out_what_did_not_fit(tmp_path, drawn):
    rows = [
        {"model": name, "length": length, "flops": 1e6, "seconds": seconds}
        for name, length, seconds in (("A", 1024, 1e-6), ("A", 2048, 3e-6), ("B", 1024, 2e-6), ("B", 2048, None))
    ]
    training_cost.draw({"device": "test", "rows": rows}, tmp_path / "cost.png")
    (panel,) = drawn["cost.png"]
    check_lines(panel.lines, {"A": [(1024, 1.0), (2048, 3.0)], "B": [(1024, 2.0)]})
    counted = [row | {"seconds": None} for row in rows]
    training_cost.draw({"device": None, "rows": counted}, tmp_path / "counted.png")
    check_lines(drawn["counted.png"][0].lines, {name: [(1024, 1.0), (2048, 1.0)] for name in "AB"})
    assert training_cost.table(rows)[2:] == [
        *("| A, µs | 1 | 3 |", "| B, µs | 2 | - |", "| A, MFLOP | 1 | 1 |", "| B, MFLOP | 1 | 1 |"),
    ]


def test_several_records_make_one_figure_and_what_is_none_is_refused(tmp_path):
    row = {"model": "Transformer", "length": 8, "flops": 2e6, "seconds": 1e-6}
    for name, changes in {"a": {}, "b": {"model": "TLinFormer, windows of 4"}, "c": {"seconds": 9.0}}.items():
        (tmp_path / name).write_text(json.dumps({"device": "test", "rows": [row | changes]}))
    joined = command("benchmarks.training_cost", f"--record={tmp_path}/b,{tmp_path}/a,{tmp_path}/c")
    assert joined.stdout.splitlines()[2:4] == ["| Transformer, µs | 1 |", "| TLinFormer, windows of 4, µs | 1 |"]
    (tmp_path / "none").write_text("[]")
    for argument, says in (
        (f"--record={tmp_path}/none", "must be records"),
        ("--windows=x", "--windows=x: must be int"),
    ):
        check_refusal(command("benchmarks.training_cost", argument), says)
