"""What a trained token costs: the record, its table and its figure, counted and measured on a tiny shape."""

import json
import pathlib

import pytest

from benchmarks import training_cost
from tests.support.commands import check_refusal, command, in_forks
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


def test_without_matplotlib_the_table_is_printed_and_one_line_says_so(tmp_path):
    arguments = ["--record=docs/measurements/training_cost.json", f"--out={tmp_path}/figure"]
    done = command("benchmarks.training_cost", *arguments, blocked=("matplotlib",))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| training, for each token | 1,024 |")
    assert done.stderr == "no figure: pip install 'tlinformer-jax[bench]' has matplotlib\n"
    assert list((tmp_path / "figure").iterdir()) == []


def test_other_architectures_are_counted_too(tmp_path):
    shape = TINY.replace("d_ff=16", "d_ff=64")
    arguments = ["--lengths=8,16", "--windows=", "--architectures=gated_deltanet,sliding_window", shape]
    done = command("benchmarks.training_cost", *arguments, "--set=model.history_window=2,model.generation_window=2")
    assert done.returncode == 0, done.stderr
    assert [text.split(",")[0] for text in done.stdout.splitlines()[2:]] == ["| Gated DeltaNet", "| sliding window"]
    (state, sliding) = ([float(cell) for cell in text.split("|")[2:4]] for text in done.stdout.splitlines()[2:])
    assert state[0] == state[1]  # a state costs the same at any length
    assert sliding[0] < sliding[1] < 1.1 * sliding[0]


@pytest.mark.slow
def test_measured_with_as_many_tokens_at_every_length_and_drawn_again(tmp_path):
    measured = [*SMALL, "--measure", "--steps=2", f"--out={tmp_path}"]
    drawn = [f"--record={tmp_path}/training_cost.json", f"--out={tmp_path}/again"]
    done, again = in_forks([("benchmarks.training_cost", arguments) for arguments in (measured, drawn)])
    assert done.returncode == 0, done.stderr
    assert again.returncode == 0, again.stderr
    found = record(tmp_path)
    assert found["device"] == "cpu"
    for row in found["rows"]:
        assert row["tokens"] == 32
        assert row["seconds"] == pytest.approx(row["step_seconds"] / 32)
    assert "| Transformer, µs |" in done.stdout
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


def test_a_batch_that_does_not_fit_is_followed_by_a_smaller_one(monkeypatch):
    tried = []

    def time_case(case, options):
        tokens = case.config.train.batch_size * case.config.data.sequence_length
        tried.append(tokens)
        fits = tokens <= 32
        return {"step_seconds": 2.0, "compile_seconds": 1.0, "step_bytes": 5, "tokens": tokens} | {
            "error": None if fits else "out of memory"
        }

    monkeypatch.setattr(training_cost, "time_case", time_case)
    monkeypatch.setattr(training_cost, "line", str)
    configs = training_cost.models([0], [], {})
    timing = training_cost.TimingOptions(1)
    (row,) = training_cost.rows(configs, [8], [128, 64, 32, 16], timing)
    assert (row["seconds"], row["error"], tried) == (2 / 32, None, [128, 64, 32])
    (row,) = training_cost.rows(configs, [8], [128, 64], timing)
    assert (row["seconds"], row["error"]) == (None, "out of memory")


def test_generation_stands_beside_training_under_the_same_names(tmp_path, drawn):
    def row(architecture, length, seconds, size, batch=1):
        figures = {"windows": {"seconds": seconds, "tokens": 4}, "cache_bytes": size}
        return {"architecture": architecture, "length": length, "batch": batch} | figures

    rows = [row("tlinformer", 9, 0.4, 2e6), row("tlinformer", 5, 0.2, 1e6), row("tlinformer", 5, 9.0, 9e6, batch=2)]
    (tmp_path / "a").write_text(json.dumps({"config": {"generation_window": 4}, "rows": rows}))
    parts = {"cache_bytes": 3e6, "sustained": {"seconds": 0.1}, "slide": {"seconds": 0.4}}  # a slide in 4 tokens
    rows = [row("gated_deltanet", 5, 0.8, 3e6), {"architecture": "transformer", "length": 5, "batch": 1, "error": "-"}]
    rows.append({"architecture": "tlinformer", "length": 12, "batch": 1} | parts)
    del parts["slide"]  # a window without its slide is no cost of a token, but a baseline has no slides
    rows += [{"architecture": name, "length": 20, "batch": 1} | parts for name in ("tlinformer", "gated_deltanet")]
    (tmp_path / "b").write_text(json.dumps({"config": {"generation_window": 4}, "rows": rows}))
    trained = [{"model": "TLinFormer, windows of 4", "length": 8, "flops": 1e6, "seconds": 1e-6}]
    found = training_cost.read_generation([f"{tmp_path}/a", f"{tmp_path}/b"])
    training_cost.draw({"device": "test", "rows": trained}, tmp_path / "cost.png", found)
    training, tokens, caches = drawn["cost.png"]
    check_lines(training.lines, {"TLinFormer, windows of 4": [(8, 1.0)]})
    check_lines(
        tokens.lines,
        {
            "Gated DeltaNet": [(5, 200.0), (20, 100.0)],
            "TLinFormer, windows of 4": [(5, 50.0), (9, 100.0), (12, 200.0)],
        },
    )
    check_lines(
        caches.lines,
        {
            "Gated DeltaNet": [(5, 3.0), (20, 3.0)],
            "TLinFormer, windows of 4": [(5, 1.0), (9, 2.0), (12, 3.0), (20, 3.0)],
        },
    )
    assert [panel.title.partition(" (")[0] for panel in (training, tokens, caches)] == [
        *("Cost of training", "Cost of generation", "Cache or state of one sequence"),
    ]


@pytest.mark.slow
def test_several_records_make_one_figure_and_what_is_none_is_refused(tmp_path):
    row = {"model": "Transformer", "length": 8, "flops": 2e6, "seconds": 1e-6}
    for name, changes in {"a": {}, "b": {"model": "TLinFormer, windows of 4"}, "c": {"seconds": 9.0}}.items():
        (tmp_path / name).write_text(json.dumps({"device": "test", "rows": [row | changes]}))
    (tmp_path / "none").write_text("[]")
    (tmp_path / "empty").write_text('{"rows": []}')
    refused = {
        f"--record={tmp_path}/none": "must be records",
        f"--record={tmp_path}/empty": "must be records of this command (they have no rows)",
        "--set=train.accumulation=2": "--set = 'train.accumulation=2': must be fields of the section model",
        "--set=widow=2": "--set = 'widow=2': must be section.field=value",
        "--at=8": "Unknown command line flag 'at'",
        "--windows=x": "--windows=x: must be int",
        "--windows=1_000": "--windows=1_000: must be int",
        "--windows=": "--windows=: must be int",
        "--architectures=nothing": "--architectures = 'nothing': must be among tlinformer, ",
        f"--generation={tmp_path}/none": "must be records of benchmarks.inference",
    }
    arguments = [f"--record={tmp_path}/b,{tmp_path}/a,{tmp_path}/c", *refused]
    joined, *results = in_forks([("benchmarks.training_cost", [argument]) for argument in arguments])
    assert joined.stdout.splitlines()[2:4] == ["| Transformer, µs | 1 |", "| TLinFormer, windows of 4, µs | 1 |"]
    for result, says in zip(results, refused.values(), strict=True):
        check_refusal(result, says)
