"""The report: its lines are those of the records, and the document that is committed is the one they give."""

import pathlib
import re

import numpy as np
import pandas as pd
import pytest

from tests.support.figures import check_lines
from tests.support.results import MEASURED, made_result, save, windows_result
from tlinformer_jax.errors import DataError
from tlinformer_jax.experiments.figures import plot_lines
from tlinformer_jax.experiments.frame import frame_of, read_records
from tlinformer_jax.experiments.report import against_base, fenced, report_lines, write_report, write_tables

pytest.importorskip("matplotlib")

DOCS = pathlib.Path(__file__).parents[2] / "docs"
WINDOWED = {"architecture": "tlinformer", "history_window": 256, "generation_window": 256}


def evaluation(length: int, loss: float, later: bool = True) -> dict:
    return {
        "length": length,
        "tokens": 40_000,
        "figures": {"perplexity": 10 * loss, "loss_first_window": loss, "loss_later_windows": loss - 1},
        "by_position": {"edges": [0, length // 2, length], "loss": [loss, loss - 1], "tokens": [1, 1]},
        "by_window_position": {"edges": [0, 4, 8], "first": [9.0, 9.0]}
        | ({"later": [loss + 1, loss]} if later else {}),
    }


def architectures() -> list[dict]:
    base = [made_result(f"base-1k-seed{seed}", value, seed) for seed, value in enumerate((20.0, 21.0, 22.0))]
    # This run shared its device, so its speed does not count.
    base[1] |= {"speed": {"tokens_per_second": 10_000.0, "mfu": 0.05}, "seconds": {"wall": 300.0}}
    lost = ([[50, 4.5], [100, 3.0]], [[50, 4.75], [100, 3.5]])
    ours = [made_result(f"ours-seed{s}", 21.0 + s, s, model=WINDOWED, history=lost[s]) for s in (0, 1)]
    ours[0]["then"] = {
        "evaluate": evaluation(1024, 3.0),
        "evaluate@256": evaluation(256, 5.0, later=False),
        "evaluate@8192": evaluation(8192, 4.0),
        "samples": {"temperature": 0.8, "samples": [{"prompt": "The ", "text": "end.\r```\n"}]},
    }
    return [*base, *ours]


TRAINED = "3.0 M training tokens in 100 updates"


def written(folder: pathlib.Path, *results: dict) -> list[str]:
    save(folder / "results", *results)
    write_report(folder / "results", folder / "results.md")
    return (folder / "results.md").read_text().splitlines()


def test_the_table_and_the_commands(tmp_path):
    lines = written(tmp_path, *architectures())
    start = lines.index(f"## Architectures, {TRAINED}")
    cells = "| 60,000 | 25.0% | 1:01 | 2.5 | 1.50 | 2 x Abacus |"
    assert lines[start + 2 : start + 7] == [
        "| model | architecture | N | W_oh + W_og | W_oh / W_total | B x (H + 2) | seeds | perplexity | against Base "
        "| bits per byte | tokens/s | MFU | wall time | peak memory, GB | cache, MB | device |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        f"| base-1k | transformer | 1,024 |  |  | 2 x 4 | 0, 1, 2 | 21.00 ± 1.00 |  | 1.500 ± 0.000 {cells}",
        f"| ours | tlinformer | 1,024 | 256 + 256 | 0.500 | 2 x 4 | 0, 1 | 21.50 ± 0.71 | +2.4% "
        f"| 1.500 ± 0.000 {cells}",
        "",
    ]
    assert "| ours-seed1 | 2 x Abacus | 1.2.3 | 1,234 | 100 | 3,000,000 | 1 | pydoc | bytes |" in lines
    assert "python -m tlinformer_jax.main --then=" in lines


def test_positions_lengths_and_samples(tmp_path, drawn):
    lines = written(tmp_path, *architectures())
    start = lines.index("## Loss by position")
    assert lines[start + 8 : start + 11] == [
        f"| ours | {TRAINED} | 1,024 | 256 | 40,000 | 256 | 50.00 | 5.000 | 4.000 |  |  |",
        f"| ours | {TRAINED} | 1,024 | 1,024 | 40,000 | 256 | 30.00 | 3.000 | 2.000 | 4.000 | 4 |",
        f"| ours | {TRAINED} | 1,024 | 8,192 | 40,000 | 256 | 40.00 | 4.000 | 3.000 | 5.000 | 4 |",
    ]
    assert not (tmp_path / "figures" / "results_window_positions_256_3.0M_100.png").exists()
    ours = "TLinFormer, W_og 256, W_oh 256"
    for name, curves in {
        "positions_256_3.0M_100": {ours: [(63.5, 5.0), (191.5, 4.0)]},
        "positions_1024_3.0M_100": {ours: [(255.5, 3.0), (767.5, 2.0)]},
        "window_positions_1024_3.0M_100": {ours: [(1.5, 4.0), (5.5, 3.0)]},
        "window_positions_8192_3.0M_100": {ours: [(1.5, 5.0), (5.5, 4.0)]},
        # Against millions of tokens: the means of two seeds less what the Transformer has lost, 4 and 3.
        "history_3.0M_100": {ours: [(1.5, 4.625 - 4.0), (3.0, 3.25 - 3.0)]},
    }.items():
        assert any(f"](figures/results_{name}.png)" in line for line in lines)
        assert (tmp_path / "figures" / f"results_{name}.png").exists()
        (panel,) = drawn[f"results_{name}.png"]
        check_lines(panel.lines, curves)
    # Drawn text cannot end its block, and has no control characters.
    at = lines.index("````text")
    assert lines[at + 1 : at + 4] == ["The |end.\\r```", "", "````"]
    assert f"After {TRAINED}, drawn with temperature 0.8." in lines


def test_the_reference_is_the_transformer_at_its_best_rate_and_every_rate_is_named(tmp_path, drawn):
    """A sweep of rates names the same model by its rate; its seeds may have come from two sweeps with two names."""
    runs = [
        made_result(f"{name}-seed{seed}", 1.0, seed, model=model, train={"learning_rate": rate}, history=[[100, loss]])
        for name, seed, model, rate, loss in (
            ("base-slow", 0, {}, 1e-4, 5.0),
            ("base", 0, {}, 1e-3, 4.0),
            ("again", 1, {}, 1e-3, 4.5),
            ("ours", 0, WINDOWED, 1e-3, 4.0),
        )
    ]
    written(tmp_path, *runs)
    (panel,) = drawn["results_history_3.0M_100.png"]
    ours = "TLinFormer, W_og 256, W_oh 256, rate 0.001"
    check_lines(panel.lines, {"Transformer, rate 0.0001": [(3.0, 0.75)], ours: [(3.0, -0.25)]})


def test_two_texts_have_sections_of_their_own(tmp_path):
    other = made_result("other-seed0", 30.0, data={"dataset": "text", "train_files": "other.txt"})
    lines = written(tmp_path, made_result("base-seed0", 20.0), other)
    assert [line for line in lines if line.startswith("## Arch")] == [
        f"## Architectures, {TRAINED}",
        f"## Architectures, {TRAINED} (2)",
    ]


def test_a_fourth_panel_begins_a_row_and_many_curves_have_their_legend_beside_them(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr("tlinformer_jax.experiments.figures.save", lambda figure, file: figures.append(figure))
    points = pd.DataFrame([(f"curve {number}", x, number) for number in range(8) for x in (0.0, 1.0)])
    points.columns = ["label", "x", "y"]
    few = points[points["label"] < "curve 3"]
    plot_lines({str(number): (points, "y") for number in range(4)}, "x", tmp_path / "many.png", "linear")
    plot_lines({"0": (few, "y")}, "x", tmp_path / "few.png", "linear")
    many, alone = figures
    assert [(axes.get_subplotspec().rowspan.start, axes.get_subplotspec().colspan.start) for axes in many.axes] == [
        *((0, column) for column in range(3)),
        (1, 0),
    ]
    (axes,) = alone.axes
    right = [
        axes.get_legend().get_bbox_to_anchor().transformed(axes.transAxes.inverted()).x0
        for axes in (many.axes[0], axes)
    ]
    assert right == pytest.approx([1.0, 0.0])


OPTIONS = {"window_overlap": 4, "key_taps": 3}


def test_a_test_split_has_columns_rows_and_figures_of_its_own(tmp_path, drawn):
    """Records without it, and earlier ones that do not name their split, are read beside it."""
    tested = {"split": "test", **evaluation(1024, 3.5)}
    tested["figures"]["bits_per_byte"] = 1.25
    then = {"evaluate": {"split": "validation", **evaluation(1024, 3.0), "test": tested}}
    earlier = {"evaluate": evaluation(1024, 3.0)}
    results = [
        *(made_result(f"ours-seed{seed}", 21.0, seed, model=WINDOWED, point="ours", then=then) for seed in (0, 1)),
        made_result("earlier-seed0", 20.0, model=WINDOWED | OPTIONS, point="earlier", then=earlier),
    ]
    lines = written(tmp_path, *results)
    start = lines.index(f"## Architectures, {TRAINED}")
    head, _, *rows = (line.split(" | ") for line in lines[start + 2 : start + 6])
    at = head.index("test perplexity")
    assert head[at - 1 : at + 2] == ["bits per byte", "test perplexity", "test bits per byte"]
    assert [row[at : at + 2] for row in rows] == [["", ""], ["35.00 ± 0.00", "1.250 ± 0.000"]]
    start = lines.index("## Loss by position")
    assert lines[start + 8 : start + 11] == [
        f"| earlier | {TRAINED} | 1,024 | 1,024 | validation | 40,000 | 256 | 30.00 | 3.000 | 2.000 | 4.000 | 4 |",
        f"| ours | {TRAINED} | 1,024 | 1,024 | validation | 40,000 | 256 | 30.00 ± 0.00 | 3.000 ± 0.000 "
        "| 2.000 ± 0.000 | 4.000 ± 0.000 | 4 |",
        f"| ours | {TRAINED} | 1,024 | 1,024 | test | 40,000 | 256 | 35.00 ± 0.00 | 3.500 ± 0.000 | 2.500 ± 0.000 "
        "| 4.500 ± 0.000 | 4 |",
    ]
    (panel,) = drawn["results_positions_1024_3.0M_100_test.png"]
    title = f"samples of 1,024 tokens, test split, {TRAINED}"
    assert panel.title.replace("\n", " ") == title
    check_lines(panel.lines, {"TLinFormer, W_og 256, W_oh 256": [(255.5, 3.5), (767.5, 2.5)]})
    # The validation split is drawn only for the run without a test split.
    assert [*drawn["results_positions_1024_3.0M_100.png"][0].lines] == [
        "TLinFormer, W_og 256, W_oh 256, 3 key taps, overlap 4"
    ]
    assert "results_window_positions_1024_3.0M_100_test.png" in drawn


def test_losses_by_position_are_drawn_against_one_model_with_equal_windows(tmp_path, drawn):
    """A panel for each size of windows: less the Transformer, or the sliding window, none without either of them."""
    models = {
        "base": {},
        "ours": WINDOWED,
        "small": WINDOWED | {"generation_window": 64},
        "sliding": {"architecture": "sliding_window", "history_window": 64, "generation_window": 64},
        "alone": WINDOWED | {"generation_window": 512},
    }
    losses = dict(zip(models, (3.0, 3.25, 3.5, 2.75, 4.0)))
    written(
        tmp_path,
        *(
            made_result(f"{name}-seed0", 1.0, model=model, then={"evaluate": evaluation(1024, losses[name])})
            for name, model in models.items()
        ),
    )
    labels = [f"TLinFormer, W_og {size}, W_oh 256" for size in (256, 64, 512)]
    (panel,) = drawn["results_positions_1024_3.0M_100.png"]
    places = (255.5, 767.5)
    above = dict(zip((labels[2], labels[0], "sliding window, 128 tokens", labels[1]), (1.0, 0.25, -0.25, 0.5)))
    check_lines(panel.lines, {label: [(x, value) for x in places] for label, value in above.items()})
    small, large = drawn["results_window_positions_1024_3.0M_100.png"]
    check_lines(small.lines, {labels[1]: [(1.5, 0.75), (5.5, 0.75)]})
    check_lines(large.lines, {labels[0]: [(1.5, 0.25), (5.5, 0.25)]})
    assert [" ".join(panel.title.split()[-3:]) for panel in (small, large)] == ["windows of 64", "windows of 256"]


def test_windows_with_their_knee(tmp_path, drawn):
    shares = {64: 30.0, 128: 24.0, 256: 22.0, 384: 21.5, 448: 21.0}
    lines = written(
        tmp_path, *(windows_result(size, 512 - size, value, seed) for size, value in shares.items() for seed in (0, 1))
    )
    assert "## Windows (sweep_windows), 3.0 M training tokens a point" in lines
    assert any("| 128-384 | tlinformer | 1,024 | 128 + 384 | 0.250 | 2 x 4 | 0, 1 | 24.00 ±" in line for line in lines)
    knee = "knee at 128-384, share 0.250."
    assert f"W_total = 512, shares 0.125, 0.250, 0.500, 0.750, 0.875: {knee}" in lines
    assert "![Perplexity share](figures/results_sweep_windows_perplexity_share.png)" in lines
    (panel,) = drawn["results_sweep_windows_perplexity_share.png"]
    assert panel.lines["both windows 512 rows"] == [(size / 512, value) for size, value in shares.items()]
    assert not any("Architectures" in line or "Samples" in line or "position" in line for line in lines)


def test_a_point_of_two_sweeps_of_windows_is_in_the_tables_of_both(tmp_path):
    results = [windows_result(size, 512 - size, 20.0) for size in (128, 256)]
    results.append(windows_result(256, 256, 30.0) | {"name": "x", "point": "x", "sweep": "sweep_x"})
    lines = report_lines(frame_of(results), tmp_path)
    tables = "\n".join(lines[: lines.index("## Runs")]).split("## Windows (sweep_")[1:]
    assert [[table.count(f"| {name} |") for name in ("x", "256-256", "128-384")] for table in tables] == [
        [0, 1, 1],
        [1, 0, 0],
    ]


def test_only_like_is_compared_with_like():
    base, better = made_result("base", 20.0), made_result("better", 19.0, model=WINDOWED)
    others = [
        made_result("tokens", 19.0, model=WINDOWED, tokens=1),
        made_result("dropout", 19.0, model=WINDOWED | {"dropout": 0.1}),
        made_result("width", 19.0, model=WINDOWED | {"d_model": 32}),
        made_result("rate", 19.0, model=WINDOWED, train={"learning_rate": 0.25}),
    ]
    change = against_base(frame_of([base, better, *others]))
    assert change.dropna().tolist() == [pytest.approx(-5)]
    assert len(change) == 5


def test_baselines_alone_are_compared_with_nothing(tmp_path):
    base = made_result("base", 20.0)
    assert against_base(frame_of([base])).empty
    write_tables([base], tmp_path)
    assert "| base |" in (tmp_path / "sweep.md").read_text()


def test_the_same_records_give_the_same_document(tmp_path, drawn):
    first, again = written(tmp_path / "a", *architectures()), written(tmp_path / "b", *architectures()[::-1])
    assert first == again
    figures = sorted(path.name for path in (tmp_path / "a" / "figures").iterdir())
    assert figures == sorted(drawn)
    assert all(panel.points for panels in drawn.values() for panel in panels)
    for name in figures:
        assert (tmp_path / "a" / "figures" / name).read_bytes() == (tmp_path / "b" / "figures" / name).read_bytes()


def test_losses_after_other_numbers_of_training_tokens_are_not_compared(tmp_path, drawn):
    sizes = {3_000_000: 4.0, 3_200_000: 5.0, 7_000_000: 6.0}
    runs = [made_result(f"r{size}", 9.0, tokens=size, history=[[100, loss]]) for size, loss in sizes.items()]
    lines = written(tmp_path, *runs)
    for (size, loss), name in zip(sizes.items(), ("3.0M_100", "3.2M_100", "7.0M_100")):
        assert f"![Validation loss while training](figures/results_history_{name}.png)" in lines
        (panel,) = drawn[f"results_history_{name}.png"]
        check_lines(panel.lines, {"Transformer": [(size / 1e6, loss)]})


def test_a_record_with_a_part_of_another_version_is_named(tmp_path):
    later = made_result("later", 1.0)
    later["config"]["model"]["architecture"] = "next"
    for damaged in (later, made_result("later", 1.0, history=[[50]])):
        save(tmp_path, made_result("good", 1.0), damaged)
        with pytest.raises(DataError, match="record later: has a part that this version cannot read"):
            write_report(tmp_path, tmp_path / "results.md")


def test_figures_that_no_run_has_are_left_out(tmp_path):
    assert "## Runs" in written(tmp_path, made_result("a", 9.0, history=[]))
    lines = written(tmp_path, made_result("a", 9.0, seconds={}, speed={}, peak_bytes=None))
    row = next(line for line in lines if line.startswith("| a | transformer"))
    assert row == "| a | transformer | 1,024 | 2 x 4 | 0 | 9.00 | 1.500 | 1.50 | 2 x Abacus |"


def test_text_in_a_block_stays_there():
    assert fenced("a`b") == ["```text", "a`b", "```", ""]
    assert fenced("a````b") == ["`````text", "a````b", "`````", ""]
    assert fenced("a\x1b[0m\tb\nc")[1] == "a\\x1b[0m\tb\nc"


EQUAL = "must have lists of equal length, not empty: "
BOTH = f"{EQUAL}right, answers"
# A part of an evaluation, lists in it that are no columns of a table, and what is said of them.
UNEVEN = (
    ("by_position", {"edges": [0, 4, 8], "loss": []}, f"{EQUAL}loss; edges with one number more"),
    ("by_position", {"edges": [], "loss": []}, f"{EQUAL}loss; edges"),
    ("by_position", {"edges": [0], "loss": []}, f"{EQUAL}loss; edges"),
    ("by_position", {"edges": [0, 4], "loss": [1.0, 2.0]}, f"{EQUAL}loss; edges"),
    ("by_window_position", {"edges": []}, f"{EQUAL}edges"),
    ("by_window_position", {"edges": [0, 4], "later": []}, f"{EQUAL}later; edges"),
    ("accuracy_by_position", {"edges": [0, 4], "right": [1], "answers": []}, f"{BOTH}; edges"),
)


def test_what_is_no_record_is_named(tmp_path):
    with pytest.raises(DataError, match="at least one record"):
        read_records(tmp_path)
    for text, says in (("{", "is not JSON"), ("[]", "is not a record"), ('{"format": "other"}', "'format' must be")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(DataError, match=f"x.json: .*{says}"):
            read_records(tmp_path)
    save(tmp_path, made_result("x", 1.0) | {"validation": None})
    with pytest.raises(DataError, match=r"x.json: 'validation' must be dict"):
        read_records(tmp_path)
    whole = evaluation(1024, 3.0)
    for action, done, says in (
        ("evaluate", whole | {"figures": []}, "'then.evaluate.figures' must be dict"),
        ("evaluate@256", whole | {"figures": {"loss": "low"}}, "'then.evaluate@256.figures.loss' must be int | float"),
        ("evaluate", whole | {"test": {"length": 1024}}, "'then.evaluate.test.tokens' is missing"),
        ("history", MEASURED | {"cuts": [MEASURED["cuts"][0], 7]}, "'then.history.cuts[1]' must be dict"),
        ("dance", [], "'then.dance' must be dict"),
        ("history", MEASURED | {"cuts": []}, "'then.history.cuts' must not be empty"),
        ("history", MEASURED | {"starts": []}, "'then.history.starts' must not be empty"),
        ("history", MEASURED | {"swapped": {"change": 1.0}}, "'then.history.swapped.affected_change' is missing"),
        *(("evaluate", whole | {part: columns}, f"'then.evaluate.{part}' {says}") for part, columns, says in UNEVEN),
        (
            "evaluate",
            whole | {"answers": {"own": {"right": [1], "answers": []}}},
            f"'then.evaluate.answers.own' {BOTH}",
        ),
    ):
        save(tmp_path, made_result("x", 1.0, then={action: done}))
        with pytest.raises(DataError, match=re.escape(f"x.json: {says}")):
            read_records(tmp_path)


@pytest.mark.skipif(not (DOCS / "results").is_dir(), reason="no results are committed yet")
def test_the_committed_report_is_that_of_the_committed_records(tmp_path, drawn, monkeypatch):
    """Correct it by `python -m tlinformer_jax report --results=docs/results --out=docs/results.md`."""
    # Files of figures stay empty: only the data of their axes are read, and to draw dozens of them takes half of the
    # time, to compress them a tenth.
    monkeypatch.setattr("matplotlib.figure.Figure.draw", lambda figure, renderer: None)
    monkeypatch.setattr("matplotlib.image.imsave", lambda path, image, **options: pathlib.Path(path).touch())
    write_report(DOCS / "results", tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text() == (DOCS / "results.md").read_text()
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        path.name for path in (DOCS / "figures").glob("results_*.png")
    }
    for path in (tmp_path / "figures").iterdir():
        panel = drawn[path.name][0]
        assert panel.points or np.isfinite(panel.image).any(), f"{path.name} shows nothing"
