"""Tables and heat maps of tasks from records, against sums by hand; and the whole way from a sweep to the report."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from tests.support.commands import ROOT, command
from tests.support.figures import check_lines
from tests.support.results import made_result, save
from tlinformer_jax.experiments.figures import plot_heat_maps
from tlinformer_jax.experiments.frame import frame_of, median_update, points_of
from tlinformer_jax.experiments.report import write_report
from tlinformer_jax.experiments.retrieval import median_interval, overview_lines, retrieval_lines, wilson_interval

DATA = {"dataset": "recall", "tokenizer": "numbers:257", "sequence_length": 512, "num_items": 64}
WINDOWS = {"history_window": 16, "generation_window": 32, "hidden_depth": 0}
TLIN = {"architecture": "tlinformer"}


def cell(model, rate, accuracy, seed=0, reached=False, steps=100, **parts):
    point = f"{model.get('architecture', 'transformer')}-{rate}"
    figures = {"loss": 1.0, "accuracy": accuracy, "accuracy_history": accuracy / 2, "chance": 1 / 64}
    return made_result(
        f"{point}-seed{seed}",
        1.0,
        seed,
        point,
        study="retrieval",
        model=WINDOWS | model,
        train={"learning_rate": rate, "steps": "100@0.99"},
        data=parts.pop("data", DATA),
        validation=figures,
        target={"accuracy": 0.99, "reached": reached, "most_steps": 100},
        steps=steps,
        tokens=steps * 30_000,
        **parts,
    )


def evaluated(length: int, history: dict[int, tuple[int, int]], observed: tuple[int, int]) -> dict:
    """An evaluation: depth -> (right, answers) of sources before both windows; those in W_oh lie at depth 19."""
    answers = {region: {"right": [0] * 20, "answers": [0] * 20} for region in ("own", "observed", "history")}
    for depth, (right, count) in history.items():
        answers["history"]["right"][depth], answers["history"]["answers"][depth] = right, count
    answers["observed"]["right"][19], answers["observed"]["answers"][19] = observed
    return {"length": length, "tokens": 1000, "answers": answers, "figures": {}}


def written(folder, *results):
    save(folder / "records", *results)
    write_report(folder / "records", folder / "results.md")
    return (folder / "results.md").read_text().splitlines()


def test_runs_are_counted_and_listed_and_their_shares_never_averaged():
    results = [
        cell({}, 1e-3, 0.992, reached=True, steps=40),
        *(cell(TLIN, 1e-3, accuracy, seed) for seed, accuracy in enumerate((0.991, 0.974, 0.551))),
        cell(TLIN, 3e-3, 0.899),
    ]
    lines = retrieval_lines(frame_of(results))
    assert lines[0] == "### recall, N = 512, 64 pairs, W_oh = 16, W_og = 32, width 16"
    # Wilson: the shares p from which 2 / 3 is 1.96 standard errors away, (2 / 3 - p)^2 = 1.96^2 p (1 - p) / 3.
    for p in map(float, wilson_interval(2, 3).split(" to ")):
        assert (2 / 3 - p) ** 2 == pytest.approx(1.96**2 * p * (1 - p) / 3, abs=0.01)
    assert wilson_interval(3, 3) == "0.44 to 1.00"  # 3 / (3 + 1.96^2)
    assert wilson_interval(0, 0) == ""
    # H_64 / 64 = 0.0741.
    ours, theirs = "TLinFormer, 4 layers (B = 2, H = 0)", "Transformer, 4 layers"
    assert lines[2:7] == [
        "| model | learning rate | runs ≥ 0.9 | 95% interval | chance | parameters |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| {ours} | 0.001 | 2 of 3 | 0.21 to 0.94 | 0.074 | 1,234 |",
        f"| {ours} | 0.003 | 0 of 1 | 0.00 to 0.79 | 0.074 | 1,234 |",
        f"| {theirs} | 0.001 | 1 of 1 | 0.21 to 1.00 | 0.074 | 1,234 |",
    ]
    assert lines[10:15] == [
        f"| {ours} | 0.001 | 0 | 0.991 |  |  | 0.495 | validation | 3.0 M | all updates |",
        f"| {ours} | 0.001 | 1 | 0.974 |  |  | 0.487 | validation | 3.0 M | all updates |",
        f"| {ours} | 0.001 | 2 | 0.551 |  |  | 0.276 | validation | 3.0 M | all updates |",
        f"| {ours} | 0.003 | 0 | 0.899 |  |  | 0.450 | validation | 3.0 M | all updates |",
        f"| {theirs} | 0.001 | 0 | 0.992 |  |  | 0.496 | validation | 1.2 M | 99% reached |",
    ]
    assert not any("±" in line for line in lines)
    grown = [cell({}, 1e-3, 0.5, data=DATA | {"curriculum": "64:10,256:20"})]
    assert retrieval_lines(frame_of(grown))[0] == f"{lines[0]}, curriculum 64:10,256:20"


def test_what_is_reported_is_the_test_split_where_a_record_has_it():
    test = {"figures": {"accuracy": 0.85, "accuracy_history": 0.8}, "split": "test", "length": 512}
    result = cell(TLIN, 1e-3, 0.95, reached=True, then={"evaluate": test})
    lines = retrieval_lines(frame_of([result]))
    assert any("| 0.001 | 0 of 1 |" in line for line in lines)
    assert any("| 0 | 0.850 |  |  | 0.800 | test | " in line for line in lines)


def test_the_test_split_may_have_been_evaluated_at_the_trained_length_by_name():
    test = {"figures": {"accuracy": 0.85}, "split": "test", "length": 512}
    elsewhere = {"figures": {"accuracy": 0.2}, "split": "test", "length": 1024}
    result = cell(TLIN, 1e-3, 0.95, then={"evaluate@1024": elsewhere, "evaluate@512": test})
    frame = frame_of([result])
    assert (frame["reported.accuracy"].item(), frame["split"].item()) == (0.85, "test")
    for other in ({"evaluate@1024": elsewhere}, {"evaluate": test | {"split": "validation"}}):
        frame = frame_of([cell(TLIN, 1e-3, 0.95, then=other)])
        assert (frame["reported.accuracy"].item(), frame["split"].item()) == (0.95, "validation")


def evaluated_at(*accuracies: float | None) -> list[list]:
    """A history of evaluations every 10 updates."""
    return [[10 * number, 1.0, accuracy] for number, accuracy in enumerate(accuracies, 1)]


LATE, SOON, NEVER = (0.1, 0.2, 0.899, 0.9), (0.3, 0.95, 0.5, 0.99), (0.1, None, 0.8, 0.899)


@pytest.mark.parametrize(
    ("histories", "expected"),
    [
        ((SOON,), "20"),
        ((SOON, LATE), "30"),
        ((SOON, LATE, LATE), "40"),
        ((NEVER,), "> 100"),
        ((SOON, LATE, NEVER), "40"),
        ((SOON, NEVER, NEVER), "> 100"),
        ((SOON, NEVER), "> 60"),  # between 20 and something after 100: (20 + 100) / 2 at least
    ],
)
def test_the_median_update_of_finding_counts_runs_that_never_did(histories, expected):
    results = [cell(TLIN, 1e-3, 0.5, seed, history=evaluated_at(*parts)) for seed, parts in enumerate(histories)]
    frame = frame_of(results)
    assert median_update(frame) == expected
    lines = retrieval_lines(frame)
    assert "| runs ≥ 0.9 | 95% interval | median update | chance |" in lines[2]
    assert f" | {expected} | 0.074 |" in lines[4]
    each = {SOON: "20", LATE: "40", NEVER: "> 100"}
    assert [line.split(" | ")[-2] for line in lines[8:-1]] == [each[parts] for parts in histories]


def test_records_without_accuracies_by_update_say_nothing_of_when():
    assert median_update(frame_of([cell(TLIN, 1e-3, 0.99)])) == ""
    both = frame_of([cell(TLIN, 1e-3, 0.99), cell(TLIN, 1e-3, 0.99, 1, history=evaluated_at(*SOON))])
    assert median_update(both) == "20"


def test_the_interval_of_a_median_is_that_of_resampled_seeds():
    shares = [0.1, 0.5, 0.6, 0.9, 0.95]
    rng = np.random.default_rng(1)
    medians = [np.median(rng.choice(shares, 5)) for _ in range(4000)]
    low, high = median_interval(pd.Series(shares))
    assert (low, high) == tuple(np.quantile(medians, [0.025, 0.975])) == median_interval(pd.Series(shares[::-1]))
    assert median_interval(pd.Series([0.5, 0.5])) == (0.5, 0.5)
    assert np.isnan(median_interval(pd.Series([0.5]))).all()


def capacity_records() -> list[dict]:
    """Accuracy 1 - pairs / 100 of one model and half of it of another, three seeds; W_oh of one setting, two seeds."""
    by_pairs = [
        cell(TLIN | {"architecture": name}, 1e-3, (1 - pairs / 100) / part + seed / 1000, seed, data=DATA | more)
        for name, part in (("tlinformer", 1), ("tconstformer", 2))
        for pairs in (4, 16, 64)
        for seed in range(3)
        for more in [{"num_items": pairs, "examples": 10_000 + pairs}]
    ]
    by_rows = [
        cell(TLIN | {"history_window": rows}, 1e-3, rows / 40, seed, data=DATA)
        for rows in (1, 4, 32)
        for seed in range(2)
    ]
    alone = [cell({"history_window": rows}, 1e-3, 0.5) for rows in (1, 4, 32)]  # the Transformer has no such rows
    return [record | {"name": f"run{number}"} for number, record in enumerate([*by_pairs, *by_rows, *alone])]


def test_capacity_is_told_of_runs_that_differ_in_one_size_alone(tmp_path, drawn):
    lines = written(tmp_path, *capacity_records())
    start, end = lines.index("### Capacity"), lines.index("## Runs")
    rows = [line for line in lines[start:end] if line.startswith("| T")]
    ours, theirs = (f"{name}, 4 layers (B = 2, H = 0)" for name in ("TLinFormer", "TConstFormer"))
    middle = "| 3 of 3 | 0.44 to 1.00 | 0.961 | 0.960 to 0.962 | 0.960, 0.961, 0.962 |"
    assert f"| {ours} | 4 {middle}" in rows
    last = "| 0 of 3 | 0.00 to 0.56 | 0.181 | 0.180 to 0.182 | 0.180, 0.181, 0.182 |"
    assert f"| {theirs} | 64 {last}" in rows
    assert f"| {ours} | 32 | 0 of 2 | 0.00 to 0.66 | 0.800 | 0.800 to 0.800 | 0.800, 0.800 |" in rows
    # W_oh = 16 with 64 pairs is a point of both curves.
    assert len(rows) == 2 * 3 + 4
    pairs, windows = drawn["results_capacity.png"]
    above, half = [(4, 0.961), (16, 0.841), (64, 0.361)], [(4, 0.481), (16, 0.421), (64, 0.181)]
    check_lines(pairs.lines, {theirs: half, ours: above})
    check_lines(windows.lines, {ours: [(1, 0.025), (4, 0.1), (16, 0.361), (32, 0.8)]})
    np.testing.assert_allclose(pairs.spreads, 0.001)
    assert "![Right answers against pairs and W_oh](figures/results_capacity.png)" in lines
    assert not any("### Capacity" in line for line in written(tmp_path / "few", *capacity_records()[:6]))


def test_runs_that_end_at_different_updates_are_one_group():
    results = [cell({}, 1e-3, 0.991, seed, reached=True, steps=10 + seed) for seed in range(3)]
    assert list(points_of(frame_of(results))["seeds"]) == [[0, 1, 2]]
    chosen = cell(TLIN, 1e-3, 0.5)
    chosen["config"]["model"]["observed_selection"] = "top_k"  # as an earlier version chose them
    lines = retrieval_lines(frame_of([chosen, cell(TLIN, 1e-3, 0.5)]))
    assert [line.startswith("### ") for line in lines].count(True) == 1
    names = ["TLinFormer, 4 layers (B = 2, H = 0)", "TLinFormer, 4 layers (B = 2, H = 0), top_k rows"]
    assert [line.split(" | ")[0][2:] for line in lines[4:6]] == names


def test_a_seed_that_another_sweep_has_run_too_is_listed_but_not_counted():
    results = [cell(TLIN, 1e-3, accuracy, seed) for seed, accuracy in enumerate((0.5, 0.6, 0.95))]
    again = {**cell(TLIN, 1e-3, 0.99), "name": "recent-rows-seed0", "point": "recent-rows", "sweep": "sweep_selection"}
    lines = [line for line in retrieval_lines(frame_of([*results, again])) if line.startswith("| TLinFormer")]
    assert "| 1 of 3 |" in lines[0]
    assert [line.split(" | ")[2:4] for line in lines[1:]] == [
        ["0", "0.500"],
        ["0, again", "0.990"],
        ["1", "0.600"],
        ["2", "0.950"],
    ]


def test_settings_in_which_tlinformer_fails_come_first():
    """By the options with which it succeeds most surely: 3 of 4 runs are more than 1 of 1."""
    shift, far, near = {"token_shift": True}, {"sequence_length": 1024}, {"sequence_length": 256}
    results = [
        *(cell(TLIN, 1e-3, accuracy, seed) for seed, accuracy in enumerate((0.9, 0.1, 0.1))),
        *(cell(TLIN | shift, 1e-3, 0.89, seed) for seed in range(3)),
        cell({}, 1e-3, 0.99),
        cell({"num_blocks": 12}, 1e-2, 0.1),
        cell({"num_blocks": 3}, 3e-3, 0.1),
        *(cell(TLIN | shift, 1e-3, value, seed, data=DATA | far) for seed, value in enumerate((0.95, 0.9, 0.99, 0.5))),
        *(cell(TLIN, rate, 0.1, data=DATA | far) for rate in (1e-3, 3e-3)),
        cell({}, 1e-3, 0.1, data=DATA | far),
        cell({}, 1e-3, 0.1, data=DATA | near),
    ]
    results = [result | {"name": f"{place}-seed{result['seed']}"} for place, result in enumerate(results)]
    assert overview(*results) == [
        [
            "N = 512",
            "1 of 1, no options, 4 layers; 0 of 1, no options, 6 layers; 0 of 1, no options, 24 layers",
            "1 of 3, no options; 0 of 3, token shift",
        ],
        ["N = 1,024", "0 of 1, no options", "0 of 2, no options; 3 of 4, token shift"],
        ["N = 256", "0 of 1", ""],
    ]


def test_one_certain_success_is_less_than_three_of_four():
    certain = cell(TLIN, 1e-3, 0.99, data=DATA | {"sequence_length": 1024})
    often = [cell(TLIN, 1e-3, accuracy, seed) for seed, accuracy in enumerate((0.9, 0.9, 0.9, 0.1))]
    assert [row[0] for row in overview(certain, *often)] == ["N = 1,024", "N = 512"]


def test_a_seed_of_two_sweeps_counts_once_and_a_run_without_an_accuracy_not(tmp_path):
    once, again = cell(TLIN, 1e-3, 0.1), cell(TLIN, 1e-3, 0.99)
    again |= {"name": "zz-again-seed0", "point": "again", "sweep": "sweep_selection"}
    unknown = cell(TLIN, 3e-3, 0.9) | {"validation": {"loss": 1.0}}
    assert overview(once, again, unknown) == [["N = 512", "0 of 1"]]
    assert overview_lines(frame_of([unknown])) == []
    assert not any("by success" in line for line in written(tmp_path, unknown))
    # Of a repeated seed whose first run has no accuracy, the second run counts.
    assert overview(once | {"validation": {"loss": 1.0}}, again) == [["N = 512", "1 of 1"]]


def overview(*results):
    """The rows of the table, with the setting's length alone."""
    rows = [line.removesuffix(" |").removeprefix("| ").split(" | ") for line in overview_lines(frame_of(results))[2:-1]]
    return [[setting.split(", ")[1], *(cell.strip() for cell in cells)] for setting, *cells in rows]


def test_heat_maps_keep_what_the_last_windows_hold_apart(tmp_path, drawn):
    then = {
        "evaluate@256": evaluated(256, {0: (3, 4), 7: (1, 4)}, (2, 2)),
        "evaluate@8192": evaluated(8192, {0: (1, 4)}, (1, 2)),
    }
    data = DATA | {"dataset": "passkey", "tokenizer": "bytes"}
    result = cell(TLIN, 1e-3, 0.5, then=then, data=data)
    lines = written(tmp_path, result)
    assert "| TLinFormer, 4 layers (B = 2, H = 0) | 0.001 | 0 | 256 | 0.600 |  | 1.000 | 0.500 |" in lines
    assert "| TLinFormer, 4 layers (B = 2, H = 0) | 0.001 | 0 | 8,192 | 0.333 |  | 0.500 | 0.250 |" in lines
    (file,) = (tmp_path / "figures").iterdir()
    assert re.fullmatch("results_lengths_passkey_512_[0-9a-f]{8}.png", file.name)
    assert any(f"](figures/{file.name})" in line for line in lines)
    # By depth what lies before both windows; after a gap what lies in them.
    expected = np.full((2, 22), np.nan)
    expected[0, [0, 7, 21]] = 3 / 4, 1 / 4, 1.0
    expected[1, [0, 21]] = 1 / 4, 0.5
    np.testing.assert_array_equal(drawn[file.name][0].image, expected)


def test_a_heat_map_keeps_its_name_when_others_come_and_no_two_settings_share_one(tmp_path, drawn):
    then = {f"evaluate@{length}": evaluated(length, {0: (3, 4), 7: (1, 4)}, (2, 2)) for length in (256, 8192)}
    data = DATA | {"dataset": "passkey", "tokenizer": "bytes"}
    settings = ["256:40", "256:4", "128:40,256:40"]
    results = [
        cell(TLIN, 1e-3, 0.5, seed, then=then, data=data | {"curriculum": stages})
        for seed, stages in enumerate(settings)
    ]
    names = []
    for count in (1, 3):
        written(tmp_path / str(count), *results[:count])
        names.append({file.name for file in (tmp_path / str(count) / "figures").iterdir()})
    assert len(names[1]) == 3
    assert names[0] < names[1]


def test_no_line_above_a_heat_map_reaches_the_next_one(tmp_path, drawn):
    shares = pd.DataFrame([[0.5, 1.0]], index=[256])
    title = (
        "TConstFormer, 4 layers (B = 2, H = 0), token shift, 5 key taps, wavelengths to 64\nlearning rate 0.001, seed 0"
    )
    plot_heat_maps({title: shares, f"other {title}": shares}, "passkey", tmp_path / "maps.png")
    for panel, whole in zip(drawn["maps.png"], (title, f"other {title}")):
        assert panel.title.replace("\n", " ") == whole.replace("\n", " ")
        assert max(map(len, panel.title.split("\n"))) <= 60


def asked(right: list[int], answers: list[int]) -> dict:
    """An evaluation of samples of 512 tokens, whose answers are counted in bins of 32."""
    bins = {"edges": list(range(0, 513, 32)), "right": right, "answers": answers}
    return {"evaluate": evaluated(512, {}, (0, 0)) | {"accuracy_by_position": bins}}


def test_answers_by_the_position_of_the_question(tmp_path):
    late = [0] * 4 + [10] * 12
    results = [
        cell(TLIN, 1e-3, 0.5, 0, then=asked([0] * 4 + [9, 7, *[5] * 10], late)),
        cell(TLIN, 1e-3, 0.5, 1, then=asked([0] * 4 + [5, 3, *[5] * 8, 0, 1], late)),
        cell(TLIN, 3e-3, 0.1, then=asked([0] * 16, late)),
        cell({}, 1e-3, 0.9, then=asked([0] * 16, [0] * 15 + [10])),
    ]
    lines = written(tmp_path, *results)
    start = lines.index("### By position of the question")
    (columns,) = [line for line in lines[start:] if line.startswith("| model | learning rate | seed | 0 to 63 |")]
    assert columns.endswith(
        " | 64 to 127 | 128 to 191 | 192 to 255 | 256 to 319 | 320 to 383 | 384 to 447 | 448 to 511 |"
    )
    shares = [line.split(" | ", 3)[1:] for line in lines[start:] if line.startswith("| TLinFormer")]
    assert shares == [
        ["0.001", "0", " |  | 0.800 | 0.500 | 0.500 | 0.500 | 0.500 | 0.500 |"],
        ["0.001", "1", " |  | 0.400 | 0.500 | 0.500 | 0.500 | 0.500 | 0.050 |"],
        ["0.003", "0", " |  | 0.000 | 0.000 | 0.000 | 0.000 | 0.000 | 0.000 |"],
    ]
    assert not any(line.startswith("| Transformer") for line in lines[start:])  # it asks at the end alone


@pytest.mark.slow
@pytest.mark.long
def test_attention_finds_pairs_and_the_report_says_so(tmp_path):
    """The harness works: two layers of attention learn recall to 99% and end there; minutes."""
    sweep = f"--sweep={ROOT}/configs/sweep_recall.py:tiny"
    done = command("sweep", sweep, f"--out={tmp_path}/sweep", f"--results={tmp_path}/records", many_steps=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "records" / "16-2_attention-2-seed0.json").read_text())
    assert result["target"]["reached"]
    assert result["steps"] < result["target"]["most_steps"]
    assert result["validation"]["accuracy"] >= 0.99
    tested = result["then"]["evaluate"]
    assert tested["split"] == "test"
    assert tested["figures"]["accuracy"] == pytest.approx(result["validation"]["accuracy"], abs=0.02)
    assert tested["figures"]["loss"] != result["validation"]["loss"]
    other = json.loads((tmp_path / "records" / "16-2_tlin-2-seed0.json").read_text())
    assert (other["steps"], other["target"]["reached"]) == (200, False)
    assert "| Transformer, 2 layers | 0.002 | 1 of 1 | " in done.stdout
    assert "| 99% reached |" in done.stdout
    write_report(tmp_path / "records", tmp_path / "results.md")
    assert "99% reached" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
@pytest.mark.long
def test_the_capacity_sweep_runs_and_is_reported(tmp_path):
    sweep = [
        f"--sweep={ROOT}/configs/sweep_capacity.py:tiny",
        "--config.train.steps=4@0.99",
        "--config.train.eval_every=4",
    ]
    done = command("sweep", *sweep, f"--out={tmp_path}/sweep", f"--results={tmp_path}/records")
    assert done.returncode == 0, done.stderr
    write_report(tmp_path / "records", tmp_path / "results.md")
    lines = (tmp_path / "results.md").read_text().splitlines()
    table = lines[lines.index("Against pairs in a sample:") :]
    assert [line.split(" | ")[1] for line in table if line.startswith("| TLinFormer")][:3] == ["1", "2", "4"]
    assert (tmp_path / "figures" / "results_capacity.png").exists()
