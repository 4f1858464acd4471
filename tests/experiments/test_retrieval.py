"""Tables and heat maps of tasks from records, against sums by hand; and the whole way from a sweep to the report."""

import json

import numpy as np
import pytest

from tests.support.commands import ROOT, command
from tests.support.figures import check_lines
from tests.support.results import MEASURED, made_result, save
from tlinformer_jax.experiments.curves import groups_of
from tlinformer_jax.experiments.report import write_report
from tlinformer_jax.experiments.retrieval import best_of, retrieval_lines
from tlinformer_jax.experiments.tables import row_of

DATA = {"dataset": "recall", "tokenizer": "numbers:257", "sequence_length": 512, "pairs": 64}
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


def test_the_best_rate_of_each_model_and_all_rates_beside_each_other():
    results = [
        cell({}, 1e-3, 0.992, reached=True, steps=40),
        cell({}, 3e-3, 0.992, reached=True, steps=20),
        cell(TLIN, 1e-3, 0.5, 0),
        cell(TLIN, 1e-3, 0.7, 1),
        cell(TLIN, 3e-3, 0.55),
    ]
    lines = retrieval_lines(results)
    assert lines[0] == "### recall, N = 512, 64 pairs, W_oh = 16, W_og = 32, width 16"
    base = "| full attention, 4 layers | 0.003 | 0.992 |  |  | 0.496 | 0.016 | 0.6 M | 99% reached | 1,234 | 1:01 | 0 |"
    ours = "| TLinFormer, 4 layers (B = 2, H = 0) | 0.001 | 0.600 ± 0.141 |  |  | 0.300 ± 0.071 | 0.016 | "
    ours += "3.0 M ± 0.0 M | all updates: 99% not reached | 1,234 | 1:01 | 0, 1 |"
    assert base in lines
    assert ours in lines
    assert "| answers right by learning rate | 0.001 | 0.003 |" in lines
    assert "| TLinFormer, 4 layers (B = 2, H = 0) | 0.600 ± 0.141 | 0.550 |" in lines
    grown = [cell({}, 1e-3, 0.5, data=DATA | {"curriculum": "64:10,256:20"})]
    assert retrieval_lines(grown)[0] == f"{lines[0]}, curriculum 64:10,256:20"
    assert row_of(results[0])["target_reached"] is True
    assert row_of(results[2])["accuracy_history"] == 0.25


def test_runs_that_end_at_different_updates_are_one_group():
    results = [cell({}, 1e-3, 0.991, seed, reached=True, steps=10 + seed) for seed in range(3)]
    assert [group.seeds for group in groups_of(results)] == [[0, 1, 2]]
    chosen = {"model": {"observed_selection": "top_k"}}
    names = best_of(groups_of([cell(TLIN | chosen["model"], 1e-3, 0.5), cell(TLIN, 1e-3, 0.5)]))
    assert list(names) == ["TLinFormer, 4 layers (B = 2, H = 0)", "TLinFormer, 4 layers (B = 2, H = 0), top_k rows"]


def test_the_same_configuration_of_two_sweeps_is_one_row():
    results = [cell(TLIN, 1e-3, accuracy, seed) for seed, accuracy in enumerate((0.5, 0.6, 0.7))]
    again = {**cell(TLIN, 1e-3, 0.8), "name": "recent-rows-seed0", "point": "recent-rows", "sweep": "sweep_selection"}
    (row,) = [line for line in retrieval_lines([*results, again]) if line.startswith("| TLinFormer")]
    assert "| 0.650 ± 0.129 |" in row
    assert row.endswith("| 0, 0, 1, 2 |")


def test_heat_maps_keep_what_the_last_windows_hold_apart(tmp_path, drawn):
    then = [
        {
            "evaluate@256": evaluated(256, {0: (3, 4), 7: (1, 4)}, (2, 2)),
            "evaluate@8192": evaluated(8192, {0: (1, 4)}, (1, 2)),
        },
        {
            "evaluate@256": evaluated(256, {0: (2, 4), 7: (0, 4)}, (2, 2)),
            "evaluate@8192": evaluated(8192, {0: (4, 4)}, (1, 2)),
        },
    ]
    data = DATA | {"dataset": "passkey", "tokenizer": "bytes"}
    results = [cell(TLIN, 1e-3, 0.5, seed, then=part, data=data) for seed, part in enumerate(then)]
    lines = written(tmp_path, *results)
    assert "| TLinFormer, 4 layers (B = 2, H = 0) | 256 | 0.500 |  | 1.000 | 0.375 |" in lines
    assert "| TLinFormer, 4 layers (B = 2, H = 0) | 8,192 | 0.583 |  | 0.500 | 0.625 |" in lines
    (file,) = (tmp_path / "figures").iterdir()
    setting, model = "passkey_n_512_1_hidden_w_oh_16_w_og_32_width_16", "tlinformer_4_layers_b_2_h_0"
    assert file.name == f"results_lengths_{setting}_{model}.png"
    assert any(f"](figures/{file.name})" in line for line in lines)
    # By depth what lies before both windows; after a gap what lies in them.
    expected = np.full((2, 22), np.nan)
    expected[0, [0, 7, 21]] = 5 / 8, 1 / 8, 1.0
    expected[1, [0, 21]] = 5 / 8, 0.5
    np.testing.assert_array_equal(drawn[file.name][0].image, expected)


def asked(right: list[int], answers: list[int]) -> dict:
    """An evaluation of samples of 512 tokens, whose answers are counted in bins of 32."""
    bins = {"edges": list(range(0, 513, 32)), "right": right, "answers": answers}
    return {"evaluate": evaluated(512, {}, (0, 0)) | {"accuracy_by_position": bins}}


def test_answers_by_the_position_of_the_question(tmp_path, drawn):
    late = [0] * 4 + [10] * 12
    results = [
        cell(TLIN, 1e-3, 0.5, 0, then=asked([0] * 4 + [9, 7, *[5] * 10], late)),
        cell(TLIN, 1e-3, 0.5, 1, then=asked([0] * 4 + [5, 3, *[5] * 8, 0, 1], late)),
        cell(TLIN, 3e-3, 0.1, then=asked([0] * 16, late)),
        cell({}, 1e-3, 0.9, then=asked([0] * 16, [0] * 15 + [10])),
    ]
    lines = written(tmp_path, *results)
    ours = "| TLinFormer, 4 layers (B = 2, H = 0) |  |  | 0.600 | 0.500 | 0.500 | 0.500 | 0.500 | 0.275 |"
    assert ours in lines
    start = lines.index("### By position of the question")
    (columns,) = [line for line in lines[start:] if line.startswith("| questions in |")]
    assert columns.startswith("| questions in | 0 to 63 | 64 to 127 | ")
    assert not any(line.startswith("| full attention") for line in lines[start:])  # it asks at the end alone
    (panel,) = drawn["results_questions_recall_n_512_64_pairs_w_oh_16_w_og_32_width_16.png"]
    # Both seeds' answers in bins of 32 tokens; none is asked in the first four.
    shares = [14 / 20, 10 / 20, *[10 / 20] * 8, 5 / 20, 6 / 20]
    ours = [(128 + 32 * number, share) for number, share in enumerate(shares)]
    check_lines(panel.lines, {"TLinFormer, 4 layers (B = 2, H = 0)": ours})


def test_the_report_shows_what_the_history_contributes(tmp_path, drawn):
    lines = written(tmp_path, made_result("ours", 19.0, model=TLIN, then={"history": MEASURED}))
    assert "| 1024-512-0.5 | 0 | +0.5000 | +1.0000 | 0.25, 0.50 |" in lines
    for kind in ("mass", "cuts", "length", "same_tokens"):
        assert (tmp_path / "figures" / f"results_12_history_{kind}.png").exists()
        (panel,) = drawn[f"results_12_history_{kind}.png"]
        assert all(label.startswith("1024-512-0.5") and points for label, points in panel.lines.items())
        assert panel.lines
    assert not any("## Retrieval" in line for line in lines)


@pytest.mark.slow
def test_attention_finds_pairs_and_the_report_says_so(tmp_path):
    """The harness works: two layers of attention learn recall to 99% and end there; minutes."""
    sweep = f"--sweep={ROOT}/configs/sweep_recall.py:tiny"
    done = command("tlinformer_jax.sweep", sweep, f"--out={tmp_path}/sweep", f"--results={tmp_path}/records")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "records" / "16-2_attention-2-seed0.json").read_text())
    assert result["target"]["reached"]
    assert result["steps"] < result["target"]["most_steps"]
    assert result["validation"]["accuracy"] >= 0.99
    assert result["then"]["evaluate"]["figures"]["accuracy"] == pytest.approx(
        result["validation"]["accuracy"], abs=2e-3
    )
    other = json.loads((tmp_path / "records" / "16-2_tlin-2-seed0.json").read_text())
    assert (other["steps"], other["target"]["reached"]) == (200, False)
    assert "| full attention, 2 layers | 0.002 | " in done.stdout
    assert "| 99% reached |" in done.stdout
    write_report(tmp_path / "records", tmp_path / "results.md")
    assert "99% reached" in (tmp_path / "results.md").read_text()
