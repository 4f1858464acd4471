"""Tables and heat maps of tasks from records, against sums by hand; and the whole way from a sweep to the report."""

import json

import numpy as np
import pytest

from tests.support.commands import ROOT, command
from tests.support.results import made_result, save
from tlinformer_jax.experiments.frame import frame_of, points_of
from tlinformer_jax.experiments.report import FOUND, exact_interval, retrieval_lines, write_report

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
        train={"learning_rate": rate, "stop_at_accuracy": 0.99, "steps": 100},
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
    return {"length": length, "answers": answers, "figures": {}}


def written(folder, *results):
    save(folder / "records", *results)
    write_report(folder / "records", folder / "results.md")
    return (folder / "results.md").read_text().splitlines()


def test_runs_are_counted_and_listed_and_their_shares_never_averaged():
    results = [
        cell({}, 1e-3, 0.992, reached=True, steps=40),
        *(cell(TLIN, 1e-3, accuracy, seed) for seed, accuracy in enumerate((0.991, 0.974, 0.551))),
        cell(TLIN, 3e-3, 0.9),
    ]
    lines = retrieval_lines(frame_of(results))
    assert lines[0] == "### recall, N = 512, 64 pairs, W_oh = 16, W_og = 32, width 16"
    # Clopper and Pearson: of 2 in 3, the p with P(X >= 2) = 0.025 and P(X <= 2) = 0.025; of 0 in 1, 1 - 0.025.
    low, high = map(float, exact_interval(2, 3).split(" to "))
    assert 3 * low**2 * (1 - low) + low**3 == pytest.approx(0.025, abs=0.003)
    assert 1 - high**3 == pytest.approx(0.025, abs=0.015)
    assert exact_interval(0, 1) == "0.00 to 0.97"
    # H_64 / 64 = 0.0741.
    ours, theirs = "TLinFormer, 4 layers (B = 2, H = 0)", "full attention, 4 layers"
    assert lines[2:7] == [
        f"| model | learning rate | runs above {FOUND} | 95% interval | chance | parameters |",
        "| --- | --- | --- | --- | --- | --- |",
        f"| {ours} | 0.001 | 2 of 3 | 0.09 to 0.99 | 0.074 | 1,234 |",
        f"| {ours} | 0.003 | 0 of 1 | 0.00 to 0.97 | 0.074 | 1,234 |",
        f"| {theirs} | 0.001 | 1 of 1 | 0.03 to 1.00 | 0.074 | 1,234 |",
    ]
    assert lines[10:15] == [
        f"| {ours} | 0.001 | 0 | 0.991 |  |  | 0.495 | validation | 3.0 M | all updates |",
        f"| {ours} | 0.001 | 1 | 0.974 |  |  | 0.487 | validation | 3.0 M | all updates |",
        f"| {ours} | 0.001 | 2 | 0.551 |  |  | 0.276 | validation | 3.0 M | all updates |",
        f"| {ours} | 0.003 | 0 | 0.900 |  |  | 0.450 | validation | 3.0 M | all updates |",
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
    assert file.name == "results_lengths_passkey_512_1.png"
    assert any(f"](figures/{file.name})" in line for line in lines)
    # By depth what lies before both windows; after a gap what lies in them.
    expected = np.full((2, 22), np.nan)
    expected[0, [0, 7, 21]] = 3 / 4, 1 / 4, 1.0
    expected[1, [0, 21]] = 1 / 4, 0.5
    np.testing.assert_array_equal(drawn[file.name][0].image, expected)


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
    assert not any(line.startswith("| full attention") for line in lines[start:])  # it asks at the end alone


@pytest.mark.slow
def test_attention_finds_pairs_and_the_report_says_so(tmp_path):
    """The harness works: two layers of attention learn recall to 99% and end there; minutes."""
    sweep = f"--sweep={ROOT}/configs/sweep_recall.py:tiny"
    done = command("sweep", sweep, f"--out={tmp_path}/sweep", f"--results={tmp_path}/records")
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
    assert "| full attention, 2 layers | 0.002 | 1 of 1 | " in done.stdout
    assert "| 99% reached |" in done.stdout
    write_report(tmp_path / "records", tmp_path / "results.md")
    assert "99% reached" in (tmp_path / "results.md").read_text()
