"""The training benchmark as a user runs it, on a tiny shape."""

import json

import numpy as np
import pytest

from benchmarks import profiling, steps, training_report
from tests.support.commands import ROOT, check_refusal, command, in_forks
from tests.support.figures import check_lines
from tlinformer_jax.config.named import load_python
from tlinformer_jax.config.run import run_config
from tlinformer_jax.errors import ConfigError

TINY = "model.d_model=16,model.num_heads=2,model.num_blocks=1,model.hidden_depth=0,model.d_ff=16,model.vocab_size=64"


@pytest.mark.slow
def test_rows_results_and_best_settings(tmp_path):
    done = command(
        "benchmarks.training",
        f"--set={TINY}",
        "--window=4",
        "--lengths=8",
        "--architectures=transformer",
        "--batch_tokens=16,32",
        "--try=train.accumulation=2",
        "--steps=5",
        f"--out={tmp_path}",
        f"--profile={tmp_path}/trace",
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "training.json").read_text())
    assert report["device"] == "cpu"
    assert {"jax", "command", "devices"} < set(report)
    assert "--lengths=8" in report["command"]
    rows = report["rows"]
    assert [(row["architecture"], row["length"], row["batch"]) for row in rows] == [
        ("transformer", 8, tokens // 8) for tokens in (16, 32)
    ]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["step_seconds"])
        assert row["setting"] == "train.accumulation=2"
        assert row["model_flops"] > 0
        assert row["step_bytes"] > 0
        assert row["error"] is None
    assert len((tmp_path / "training.md").read_text().splitlines()) == 2 + 1
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert [row["kernels"].startswith("no kernel table") for row in rows] == [True, True]  # a CPU has none
    assert done.stdout.count("no kernel table") == 2


def test_as_many_steps_are_timed_as_asked():
    assert [steps.group_sizes(count) for count in (1, 5, 7, 50)] == [[1], [5], [3, 4], [5] * 10]


@pytest.mark.slow
def test_memory_that_does_not_suffice_is_a_row_not_an_end(monkeypatch):
    import jax

    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    monkeypatch.setattr(steps, "_timed", exhausted)
    config = run_config({"model": {"vocab_size": 64, "d_model": 16, "num_heads": 2}})
    row = steps.time_case(steps.Case(config, ""), steps.TimingOptions(1))
    assert row["error"] == "out of memory"
    assert row["tokens_per_second"] is None
    assert training_report.best_rows([row]) == []
    assert "out of memory" in training_report.line(row)


def test_documents_are_kept_apart_where_that_is_asked():
    sizes = {"model": {"vocab_size": 64}, "data": {"sequence_length": 4096}, "train": {"batch_size": 8}}
    apart = run_config(sizes | {"data": sizes["data"] | {"document_masking": True}})
    documents = steps.random_batch(apart)["documents"]
    assert documents.shape == (8, 4096)
    assert set(np.unique(np.diff(documents, axis=1))) == {0, 1}
    assert 380 < documents[:, -1].sum() < 560  # 8 * 4096 / 70 is 468
    assert "documents" not in steps.random_batch(run_config(sizes))


def test_a_row_that_the_devices_cannot_share_is_refused():
    values = {"model": {"architecture": "transformer"}, "train": {"batch_size": 8, "mesh": "window=2"}}
    with pytest.raises(
        ConfigError, match=r"train\.mesh = 'window=2': window must be 1 for model.architecture = 'transformer'"
    ):
        steps.checked_mesh(run_config(values))
    with pytest.raises(ConfigError, match=r"--batch_tokens / --lengths = 6"):
        steps.checked_mesh(run_config({"train": {"batch_size": 6, "mesh": "window=2"}}))


def test_a_trace_tells_as_many_kernels_as_asked(monkeypatch, tmp_path):
    monkeypatch.setattr(profiling, "device_kernels", lambda _: {f"kernel{n}": (n, n * 1e6) for n in range(1, 21)})
    lines = profiling.trace(tmp_path, lambda: 0, most=3).splitlines()
    assert [text.split()[-1] for text in lines[1:-1]] == ["kernel20", "kernel19", "kernel18"]
    assert lines[-1].split() == ["210.000", "in", "all,", "20", "kernels"]


def test_the_best_row_is_the_fastest_of_its_length():
    row = {"architecture": "tlinformer", "length": 512, "batch": 1}
    rows = [row | {"tokens_per_second": speed, "setting": str(speed)} for speed in (3.0, None, 9.0, 5.0)]
    assert [best["setting"] for best in training_report.best_rows(rows)] == ["9.0"]


def test_settings_take_numbers_words_none_and_lists_of_names():
    fields = steps.overrides(
        "model.d_ff=None,train.mesh=fsdp=2,tensor=2,data.train_files=a.txt,b.txt,train.accumulation=4", "--set"
    )
    assert fields == {
        ("train", "mesh"): "fsdp=2,tensor=2",
        ("model", "d_ff"): None,
        ("data", "train_files"): "a.txt,b.txt",
        ("train", "accumulation"): 4,
    }


CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py") if not path.name.startswith("sweep"))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_can_be_timed_on_random_tokens(name):
    config = load_python(str(ROOT / "configs" / name), "--config", "get_config")
    base = steps.base_fields(config.to_dict(), 0, [])
    row, _ = steps.cases(base, ["tlinformer", "transformer"], [512], [""], [2048])
    assert (row.config.data.sequence_length, row.config.train.batch_size) == (512, 4)
    assert row.config.model.d_model == config.model.d_model


def test_a_field_for_all_rows_is_in_every_row():
    configured = run_config({"model": {}}).to_dict()
    base = steps.base_fields(configured, 32, ["train.accumulation=2", "model.d_model=24"])
    rows = steps.cases(base, ["transformer"], [8], ["", "train.accumulation=4"], [64, 128])
    fields = [(row.config.train.batch_size, row.config.train.accumulation, row.config.model.d_model) for row in rows]
    assert fields == [(8, 2, 24), (16, 2, 24), (8, 4, 24), (16, 4, 24)]
    windows = {(row.config.model.history_window, row.config.model.generation_window) for row in rows}
    assert windows == {(32, 32)}


MISTAKES = {
    "--lengths=many": "--lengths=many: must be integers from 1 to 2147483647",
    "--batch_tokens=0": "--batch_tokens=0: must be integers from 1 to",
    "--try=model.width=3": "'model.width=3': must be section.field=value",
    "--try=model.d_model=64,steps=3": "'steps=3': must be section.field=value",
    "--set=train.batch_size=3": "--set = 'train.batch_size=3': must not have this field; --batch_tokens sets it",
    "--architectures=": "--architectures = '': must name at least one architecture",
    "--architectures=mamba": "model.architecture = 'mamba': must be one of",
}


def test_mistakes_end_in_one_line():
    results = in_forks([("benchmarks.training", [argument]) for argument in MISTAKES])
    for result, message in zip(results, MISTAKES.values(), strict=True):
        check_refusal(result, message)


def test_results_that_cannot_be_written_leave_those_before(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    training_report.write_results(tmp_path, {"rows": []})
    before = (tmp_path / "training.json").read_text()
    monkeypatch.setattr("tlinformer_jax.files.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        training_report.write_results(tmp_path, {"rows": [], "device": "cpu"})
    assert (tmp_path / "training.json").read_text() == before


def test_plots_have_a_line_for_every_architecture(tmp_path, drawn):
    rows = [
        {"architecture": name, "length": length, "tokens_per_second": speed, "step_bytes": memory}
        for name, length, speed, memory in (
            ("tlinformer", 1024, 3e5, 4e9),
            ("tlinformer", 512, 5e5, 2e9),
            ("transformer", 512, 7e5, 1e9),
            ("transformer", 1024, None, 8e9),
        )
    ]
    files = training_report.plot_training(rows, "1 x test", tmp_path)
    assert [file.name for file in files] == list(drawn) == ["training_speed.png", "training_memory.png"]
    assert all(file.exists() for file in files)
    (speed,), (memory,) = drawn.values()
    check_lines(speed.lines, {"tlinformer": [(512, 5e5), (1024, 3e5)], "transformer": [(512, 7e5)]})
    check_lines(memory.lines, {"tlinformer": [(512, 2), (1024, 4)], "transformer": [(512, 1), (1024, 8)]})  # GB
