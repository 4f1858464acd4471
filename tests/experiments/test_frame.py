"""Groups, means, spreads, labels and the knee, against values by hand."""

import json
import pathlib
import re

import pandas as pd
import pytest

import tlinformer_jax
from tests.support.figures import check_lines
from tests.support.results import as_earlier, made_result, windows_result
from tlinformer_jax.experiments.figures import plot_sweep
from tlinformer_jax.experiments.frame import (
    PERPLEXITY,
    curves_of,
    frame_of,
    knee,
    knee_of,
    mean,
    mean_and_deviation,
    points_of,
)
from tlinformer_jax.experiments.report import write_tables

PACKAGE = pathlib.Path(tlinformer_jax.__file__).parent


def test_mean_and_sample_standard_deviation():
    values = pd.Series([20.0, 22.0, 27.0])
    assert mean_and_deviation("{:.3f}")(values) == "23.000 ± 3.606"  # (9 + 1 + 16) / 2 = 13 = 3.606 ** 2
    assert mean_and_deviation("{:.1f}")(pd.Series([20.0, None])) == "20.0"
    assert mean_and_deviation("{:.1f}")(pd.Series([None], dtype=float)) == ""
    assert mean("{:.1f}", 10)(pd.Series([20.0, 22.0, None])) == "210.0"


def test_the_knee_is_the_point_farthest_below_the_chord():
    # Below the chord from (0, 1) to (1, 0), that is 1 - x - y: 0.45 at 0.25, 0.35 at 0.5, 0.2 at 0.75.
    curve = pd.Series({0.0: 1.0, 0.25: 0.3, 0.5: 0.15, 0.75: 0.05, 1.0: 0.0})
    assert knee(curve) == knee(curve[::-1]) == 0.25
    # The same in other units.
    assert knee(pd.Series((20 + 3 * curve).to_numpy(), 100 + 8 * curve.index)) == 102
    # A curve that rises again: the chord is flat, so the knee is the lowest point.
    assert knee(pd.Series({0.0: 5.0, 0.3: 4.0, 0.6: 3.5, 1.0: 5.0})) == 0.6
    # Above the chord, on it, too few, flat, all at one place.
    for x, y in (
        ([0, 0.5, 1], [1, 0.9, 0]),
        ([0, 0.5, 1], [1, 0.5, 0]),
        ([0, 1], [1, 0]),
        ([0, 0.5, 1], [1, 1, 1]),
        ([1, 1, 1], [1, 0.5, 0]),
    ):
        assert knee(pd.Series(y, x, float)) is None


def seeds_of(*records) -> list[list[int]]:
    return list(points_of(frame_of(records))["seeds"])


def test_runs_that_differ_in_their_seed_alone_are_one_group():
    results = [windows_result(256, 256, 21.0, 1), windows_result(256, 256, 20.0), windows_result(128, 384, 30.0)]
    points = points_of(frame_of(results)).set_index("label")
    assert points["seeds"].to_dict() == {"256-256": [0, 1], "128-384": [0]}
    assert list(points.loc["256-256", [PERPLEXITY, f"{PERPLEXITY}.std"]]) == [20.5, pytest.approx(0.5**0.5)]
    elsewhere = [made_result("a", 1.0, data={"train_files": "/a/x-*.txt, /a/y.txt"})]
    elsewhere.append(made_result("b", 1.0, 1, data={"train_files": "b/x-*.txt,b/y.txt"}, train={"mesh": "fsdp=2"}))
    as_earlier(elsewhere[0])
    assert seeds_of(*elsewhere) == [[0, 1]]
    goals = [made_result("a", 1.0), made_result("b", 1.0, 1)]
    for each in goals:
        each["config"]["train"]["steps"] = "100@0.5"
    as_earlier(goals[0])
    assert goals[0]["config"]["train"]["steps"] == 100
    assert seeds_of(*goals) == [[0, 1]]
    goals[0]["config"]["train"]["stop_at_accuracy"] = 0.25
    assert sorted(seeds_of(*goals)) == [[0], [1]]
    assert seeds_of(*elsewhere, made_result("c", 1.0, 2, data={"train_files": "b/z-*.txt,b/y.txt"})) == [[0, 1], [2]]
    other_rate = made_result("x", 20.0, train={"learning_rate": 0.5})
    assert sorted(seeds_of(made_result("y", 20.0), made_result("z", 21.0, 1), other_rate)) == [[0], [0, 1]]


def test_records_of_other_versions_have_defaults_for_what_they_lack_and_keep_what_was_removed():
    older, newer = made_result("a", 1.0), made_result("b", 1.0, 1)
    del older["config"]["data"]["text_field"]
    assert seeds_of(older, newer) == [[0, 1]]
    older["config"]["model"]["removed_option"] = "on"
    assert seeds_of(older, newer) == [[0], [1]]


def test_options_are_named():
    model = {"architecture": "tlinformer", "causal_history": True, "key_taps": 3}
    (options,) = frame_of([made_result("mine-seed3", 1.0, 3, model=model)])["options"]
    assert options == "causal history, 3 key taps"


def test_a_run_has_its_points_name_or_its_own():
    frame = frame_of([made_result("mine-seed3", 1.0, 3), windows_result(8, 8, 1.0)])
    assert sorted(frame["label"]) == ["8-8", "mine"]


def test_a_run_of_two_sweeps_counts_once_and_each_study_has_its_own():
    first, again = windows_result(64, 448, 30.0), windows_result(64, 448, 40.0)
    again |= {"name": "other-seed0", "point": "other"}
    elsewhere = windows_result(64, 448, 50.0) | {"study": "architectures"}
    frame = frame_of([first, again, elsewhere])
    assert list(frame.sort_index()["again"]) == [False, True, False]
    assert sorted(points_of(frame)[PERPLEXITY]) == [30.0, 50.0]


def test_an_automatic_window_counts_as_in_the_last_window():
    # History 768: 8 * floor((12 * ln(768) + 7) / 8) = 8 * floor(86.73 / 8) = 80 rows.
    assert frame_of([windows_result("auto", 256, 1.0)])["share"].item() == pytest.approx(80 / 336)


SHARES = {64: 30.0, 128: 24.0, 256: 22.0, 384: 21.5, 448: 21.0}


def windows_results() -> list[dict]:
    """Two seeds of each of SHARES."""
    return [windows_result(size, 512 - size, value, seed) for size, value in SHARES.items() for seed in (0, 1)]


def test_no_knee_is_told_of_one_seed_or_without_an_end():
    def found(results):
        point, reason = knee_of(curves_of(points_of(frame_of(results)))[512])
        return list(point["label"]), reason

    results = windows_results()
    assert found(results) == (["128-384"], "")
    assert found(results[1:]) == ([], "some points have one seed only")
    again = [results[0], results[0], *results[2:]]
    assert found(again) == ([], "some points have one seed only")
    assert found(results[:-2]) == ([], "an end is missing, 0.125 or 0.875")
    assert found(results[2:]) == ([], "an end is missing, 0.125 or 0.875")


def test_curves_are_of_one_total_and_their_knee_is_found():
    results = windows_results()
    results += [windows_result(128, 128, 40.0), windows_result("auto", 256, 50.0), made_result("base", 20.0)]
    curves = curves_of(points_of(frame_of(results)))
    assert {total: list(curve["label"]) for total, curve in curves.items()} == {
        512: ["64-448", "128-384", "256-256", "384-128", "448-64"]
    }
    # The chord falls from 30 to 21 over 384 rows. Below it lie 128 by 30 - 1.5 - 24 = 4.5, 256 by 30 - 4.5 - 22 = 3.5
    # and 384 by 30 - 7.5 - 21.5 = 1.
    assert list(knee_of(curves[512])[0]["label"]) == ["128-384"]
    equal_shares = [made_result(name, 20.0, model={"d_ff": width}) for name, width in (("a", 8), ("b", 16), ("c", 24))]
    assert curves_of(points_of(frame_of(equal_shares))) == {}


def test_tables_and_plots_of_a_sweep(tmp_path, drawn):
    results = windows_results()
    results[3] = windows_result(128, 384, 28.0, seed=1)
    write_tables(results, tmp_path)
    rows = pd.read_csv(tmp_path / "sweep.csv")
    assert list(rows["name"]) == [result["name"] for result in results]
    row = rows.iloc[2]
    assert list(row[["point", PERPLEXITY, "share", "cache.used", "config.model.history_window"]]) == [
        *("128-384", 24.0, 0.25, 1_500_000, 128)
    ]
    points = {point["label"]: point for point in json.loads((tmp_path / "sweep.json").read_text())}
    assert points["128-384"]["seeds"] == [0, 1]
    assert [points["128-384"][f"{PERPLEXITY}{end}"] for end in ("", ".std", ".count")] == [
        *(26.0, pytest.approx(8**0.5), 2)
    ]
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("| 128-384 |")]
    assert "| 1,024 | 128 + 384 | 0.250 | 2 x 4 | 0, 1 | 26.00 ± 2.83 |" in line
    assert lines[-1].endswith(
        ": knee at 256-256, share 0.500."
    )  # with 26 at 128 that is 2.5 below the chord, 256 is 3.5
    files = plot_sweep(frame_of(results), tmp_path)
    assert [file.name for file in files] == ["perplexity_speed.png", "perplexity_cache.png", "perplexity_share.png"]
    assert [file.name for file in files] == list(drawn)
    (speed,), (cache,), (share,) = drawn.values()
    # The means over seeds: 26 at 128, with 8**0.5 on each side.
    means = {64: 30.0, 128: 26.0, 256: 22.0, 384: 21.5, 448: 21.0}
    spreads = [0, 8**0.5, 0, 0, 0]
    for panel, x in ((speed, 60_000.0), (cache, 1.5)):  # MB
        assert panel.notes == {f"{size} + {512 - size}": (x, value) for size, value in means.items()}
        assert sorted(panel.points) == sorted(panel.notes.values())
        assert sorted(panel.spreads) == pytest.approx(sorted(spreads))
    check_lines(
        {"curve": share.lines["both windows 512 rows"]},
        {"curve": [(size / 512, value) for size, value in means.items()]},
    )
    assert share.lines["knee, both windows 512 rows"] == [(0.5, 22.0)]
    assert share.spreads[:5] == pytest.approx(spreads)


def test_a_sweep_without_a_finished_point_has_empty_tables(tmp_path):
    write_tables([], tmp_path)
    assert (tmp_path / "sweep.csv").read_text() == "name\n"
    assert json.loads((tmp_path / "sweep.json").read_text()) == []


def test_only_the_report_needs_pandas():
    """Anything else imports it, or a module that does, only inside the function that uses it."""
    importing = re.compile(
        r"^(?:import|from) (?:pandas|tlinformer_jax\.experiments\.(?:frame|figures|retrieval|report))\b", re.M
    )
    found = {path.stem for path in PACKAGE.rglob("*.py") if importing.search(path.read_text())}
    assert found == {"frame", "figures", "retrieval", "report"}
