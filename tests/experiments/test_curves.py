"""Means, spreads, groups and the knee, against values computed by hand."""

import csv
import json

import pytest

from tests.support.figures import check_lines
from tests.support.results import made_result, windows_result
from tlinformer_jax.config import run_config
from tlinformer_jax.experiments.curves import (
    Mean,
    groups_of,
    knee,
    knee_of,
    label_of,
    mean_of,
    observed_share,
    perplexity,
    share_curves,
    why_no_knee,
)
from tlinformer_jax.experiments.plots import plot_sweep
from tlinformer_jax.experiments.tables import write_tables


def test_mean_and_sample_standard_deviation():
    assert mean_of([20.0, 22.0, 27.0]) == Mean(23.0, pytest.approx(13**0.5), 3)  # (9 + 1 + 16) / 2 = 13
    assert mean_of([20.0, None]) == Mean(20.0, None, 1)
    assert mean_of([None]) is None


def test_the_knee_is_the_point_farthest_below_the_chord():
    # Below the chord from (0, 1) to (1, 0), that is 1 - x - y: 0.45 at 0.25, 0.35 at 0.5, 0.2 at 0.75.
    curve = [(0.0, 1.0), (0.25, 0.3), (0.5, 0.15), (0.75, 0.05), (1.0, 0.0)]
    assert knee(curve) == 1
    assert knee(curve[::-1]) == 3
    # The same in other units.
    assert knee([(100 + 8 * x, 20 + 3 * y) for x, y in curve]) == 1
    # A curve that rises again: the chord is flat, so the knee is the lowest point.
    assert knee([(0.0, 5.0), (0.3, 4.0), (0.6, 3.5), (1.0, 5.0)]) == 2
    # Above the chord, on it, too few, flat, all at one place.
    assert knee([(0.0, 1.0), (0.5, 0.9), (1.0, 0.0)]) is None
    assert knee([(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]) is None
    assert knee([(0.0, 1.0), (1.0, 0.0)]) is None
    assert knee([(0.0, 1.0), (0.5, 1.0), (1.0, 1.0)]) is None
    assert knee([(1.0, 1.0), (1.0, 0.5), (1.0, 0.0)]) is None


def test_runs_that_differ_in_their_seed_alone_are_one_group():
    results = [windows_result(256, 256, 21.0, 1), windows_result(256, 256, 20.0), windows_result(128, 384, 30.0)]
    first, second = groups_of(results)
    assert (first.label, first.seeds) == ("256-256", [0, 1])
    assert first.mean(perplexity) == Mean(20.5, pytest.approx(0.5**0.5), 2)
    assert second.seeds == [0]
    elsewhere = [made_result("a", 1.0, data={"cache_dir": "/a", "train_files": "/a/x-*.txt, /a/y.txt"})]
    elsewhere.append(made_result("b", 1.0, 1, data={"cache_dir": "/b", "train_files": "b/x-*.txt,b/y.txt"}))
    assert [group.seeds for group in groups_of(elsewhere)] == [[0, 1]]
    elsewhere.append(made_result("c", 1.0, 2, data={"train_files": "b/z-*.txt,b/y.txt"}))
    assert [group.seeds for group in groups_of(elsewhere)] == [[0, 1], [2]]
    other_rate = made_result("x", 20.0, train={"learning_rate": 0.5})
    assert len(groups_of([made_result("y", 20.0), made_result("z", 21.0, 1), other_rate])) == 2


def test_labels_say_architecture_and_lengths():
    def label(**model):
        data = {"sequence_length": 1024}
        return label_of(run_config({"model": {"d_model": 16, "num_heads": 2, **model}, "data": data}))

    windows = {"history_window": 196, "generation_window": 316}
    assert label(architecture="transformer") == "base-1024"
    assert label(**windows) == "1024-512-0.383"
    assert label(**windows, num_blocks=4, hidden_depth=0) == "1024-512-0.383-B4-H0"
    assert label(architecture="tconstformer") == "tconst-1024-512-0.5"
    assert label(architecture="sliding_window") == "sliding-1024-512-0.5"
    assert label(history_window="auto") == "1024-auto-256"


def test_an_automatic_window_counts_as_in_the_last_window():
    config = run_config(windows_result("auto", 256, 1.0)["config"])
    # History 768: 8 * floor((12 * ln(768) + 7) / 8) = 8 * floor(86.73 / 8) = 80 rows.
    assert observed_share(config) == pytest.approx(80 / 336)


SHARES = {64: 30.0, 128: 24.0, 256: 22.0, 384: 21.5, 448: 21.0}


def windows_results() -> list[dict]:
    """Two seeds of each of SHARES."""
    return [windows_result(size, 512 - size, value, seed) for size, value in SHARES.items() for seed in (0, 1)]


def test_no_knee_is_told_of_one_seed_or_without_an_end():
    def knee_and_reason(results):
        curve = share_curves(groups_of(results))[512]
        return knee_of(curve), why_no_knee(curve)

    results = windows_results()
    assert knee_and_reason(results)[0].label == "128-384"
    assert knee_and_reason(results[1:]) == (None, "some points have one seed only")
    again = [results[0], results[0], *results[2:]]
    assert knee_and_reason(again) == (None, "some points have one seed only")
    assert knee_and_reason(results[:-2]) == (None, "an end is missing, 0.125 or 0.875")
    assert knee_and_reason(results[2:]) == (None, "an end is missing, 0.125 or 0.875")


def test_curves_are_of_one_total_and_their_knee_is_found():
    results = windows_results()
    results += [windows_result(128, 128, 40.0), windows_result("auto", 256, 50.0), made_result("base", 20.0)]
    curves = share_curves(groups_of(results))
    assert {total: [group.label for group in curve] for total, curve in curves.items()} == {
        512: ["64-448", "128-384", "256-256", "384-128", "448-64"]
    }
    # The chord falls from 30 to 21 over 384 rows. Below it lie 128 by 30 - 1.5 - 24 = 4.5, 256 by 30 - 4.5 - 22 = 3.5
    # and 384 by 30 - 7.5 - 21.5 = 1.
    assert knee_of(curves[512]).label == "128-384"


def test_tables_and_plots_of_a_sweep(tmp_path, drawn):
    results = windows_results()
    results[3] = windows_result(128, 384, 28.0, seed=1)
    write_tables(results, tmp_path)
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert len(rows) == 10
    assert rows[2]["name"] == "128-384-seed0"
    assert [float(rows[2][name]) for name in ("perplexity", "share", "cache_bytes")] == [24.0, 0.25, 1_500_000]
    values = json.loads((tmp_path / "sweep.json").read_text())
    assert values["knees"] == {"512": "256-256"}  # with 26 at 128 that is 2.5 below the chord, 256 is 3.5
    assert values["points"][1]["perplexity"] == [26.0, pytest.approx(8**0.5), 2]
    text = (tmp_path / "sweep.md").read_text().splitlines()
    assert text[3] == (
        "| 128-384 | 1,024 | 128 + 384 | 0.250 | 2 x 4 | 26.00 ± 2.83 | 60,000 ± 0 | 1.50 | 1:01 | 0, 1 |"
    )
    files = plot_sweep(groups_of(results), tmp_path)
    assert [file.name for file in files] == ["perplexity_speed.png", "perplexity_cache.png", "perplexity_share.png"]
    assert [file.name for file in files] == list(drawn)
    (speed,), (cache,), (share,) = drawn.values()
    # The means over seeds: 26 at 128, with 8**0.5 on each side.
    means = [30.0, 26.0, 22.0, 21.5, 21.0]
    spreads = [0, 8**0.5, 0, 0, 0]
    assert speed.points == [(60_000.0, mean) for mean in means]
    assert cache.points == [(1.5, mean) for mean in means]  # MB
    for panel in (speed, cache):
        assert list(panel.notes) == ["64-448", "128-384", "256-256", "384-128", "448-64"]
        assert list(panel.notes.values()) == panel.points
        assert panel.spreads == pytest.approx(spreads)
    check_lines(
        {"W_total = 512": share.lines["W_total = 512"]},
        {"W_total = 512": list(zip([0.125, 0.25, 0.5, 0.75, 0.875], means))},
    )
    assert share.spreads[:5] == pytest.approx(spreads)
