"""Whole runs on data that the caller brings, also after a kill."""

import json
import os
import sys
import textwrap

import numpy as np
import pytest

from tests.data.test_given import DOCUMENTS, IDS, ROWS, SEEKING, N, grain
from tests.support.commands import run_line
from tests.support.compilation import quick_flags
from tlinformer_jax import load_run, train_and_evaluate
from tlinformer_jax.data.tokenizers import load_tokenizer
from tlinformer_jax.decoding import Generator
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.evaluation.report import EvaluationOptions, evaluate_run
from tools.fault_check import logged


def run_config(**data) -> dict:
    model = {"d_model": 16, "num_heads": 2, "num_blocks": 1, "hidden_depth": 0, "d_ff": 32}
    train = {"steps": 4, "batch_size": ROWS, "log_every": 2, "checkpoint_every": 2, "warmup_steps": 0}
    return {
        "model": model | {"history_window": 4, "generation_window": 4, "dtype": "float32"},
        "train": train,
        "data": {"dataset": "tokens", "tokenizer": "ids:65", "sequence_length": N} | data,
    }


@pytest.mark.slow
def test_a_run_on_files_is_evaluated_and_generates_from_its_directory(tmp_path):
    np.save(tmp_path / "train.npy", IDS)
    IDS[:300].tofile(tmp_path / "validation.bin")
    files = {"train_data": tmp_path / "train.npy", "validation_data": str(tmp_path / "validation.bin")}
    figures = train_and_evaluate(run_config(), tmp_path / "run", **files)
    assert "bits_per_byte" not in figures
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert stored["train_files"] == str(tmp_path / "train.npy")
    assert stored["validation_files"] == f"{tmp_path}/validation.bin:uint16"
    assert load_tokenizer(tmp_path / "run").name == "ids:65"
    trained = load_run(tmp_path / "run")
    report = evaluate_run(trained, trained.run.split("validation"), split="validation")
    assert report["figures"]["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    (text,) = Generator.from_workdir(tmp_path / "run").generate(["1 2 3"], max_new_tokens=5)
    assert all(0 <= int(word) < 128 for word in text.split())
    # The same files by the configuration alone.
    named = run_config(train_files=str(tmp_path / "train.npy"), validation_files=f"{tmp_path}/validation.bin")
    assert train_and_evaluate(named, tmp_path / "named") == figures


def test_data_of_a_program_is_not_kept(tmp_path, capfd):
    figures = train_and_evaluate(run_config(), tmp_path / "run", train_data=DOCUMENTS, validation_data=IDS[:100])
    told = capfd.readouterr().err
    assert f"next, in Python: evaluate_run(load_run('{tmp_path}/run', validation_data=...))" in told
    assert '--prompt="1 2 3"' in told
    with pytest.raises(DataError, match=r"data\.validation_files = '': must name"):
        load_run(tmp_path / "run").run.split("validation")
    trained = load_run(tmp_path / "run", validation_data=IDS[:100])
    report = evaluate_run(trained)  # the split is read by itself
    assert report["figures"]["loss"] == pytest.approx(figures["loss"], rel=1e-6)
    longer = evaluate_run(trained, options=EvaluationOptions(length=2 * N))
    assert (longer["length"], longer["tokens"]) == (2 * N, 99)
    with pytest.raises(DataError, match=r"data\.train_files = '': must name a .npy or .bin file"):
        train_and_evaluate(run_config(), tmp_path / "other")


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (run_config(dataset="pydoc", tokenizer="bytes"), {}, "data.dataset = 'pydoc': must be 'tokens'"),
        (run_config(tokenizer="ids:2"), {}, "data.tokenizer = 'ids:2': must be ids:V with V from 4"),
        (run_config(), {"validation_data": None}, "validation_data: must be given too"),
        (run_config(), {"validation_data": IDS[:5]}, "the validation split has only 5 tokens"),
        (
            run_config(),
            {"validation_data": IDS[:50] + 100},
            "split 'validation' of data.dataset = tokens, position 0: token id 1",
        ),
        (run_config(), {"train_data": -IDS.astype(int)}, "token id -.* is outside the vocabulary"),
    ],
)
def test_a_run_that_cannot_be_is_refused_with_nothing_written(tmp_path, config, data, message):
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        train_and_evaluate(config, tmp_path / "run", **{"train_data": DOCUMENTS, "validation_data": IDS[:50], **data})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_epochs_of_an_iterable_are_not_known(tmp_path):
    for train, message in (
        ({"steps": "1epoch"}, "epochs are unknown"),
        ({"eval_every": "epoch"}, "in updates"),
    ):
        config = run_config()
        config["train"] |= train
        with pytest.raises((ConfigError, DataError), match=message):
            train_and_evaluate(config, tmp_path / "run", train_data=DOCUMENTS, validation_data=IDS[:50])


# Trains on each kind of data: to a kill in a fork, on from there, and once without a kill.
TRAINING = """
    import os, pathlib, signal, sys
    from tests.data.test_given import FRESH, IDS
    from tests.training.test_given import run_config
    from tlinformer_jax import train_and_evaluate

    def trained(name, kind, killed_after=None):
        config = run_config()
        config["model"] |= {"architecture": "transformer", "dropout": 0.1}  # is soon traced
        config["train"] |= {"steps": 110, "log_every": 20, "checkpoint_every": 20}
        data = IDS if kind == "array" else FRESH[kind]()
        kill = lambda view: view.step == killed_after and os.kill(os.getpid(), signal.SIGKILL)
        workdir = pathlib.Path(sys.argv[1]) / name / kind
        return train_and_evaluate(config, workdir, train_data=data, validation_data=IDS[:200], callbacks=[kill])

    for kind in sys.argv[2:]:
        if not (child := os.fork()):
            trained("parts", kind, killed_after=75)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    for kind in sys.argv[2:]:
        print("next kind", file=sys.stderr)
        print(kind, trained("parts", kind)["loss"].hex(), flush=True)
    for kind in ("array", "list"):
        print(kind, trained("whole", kind)["loss"].hex(), flush=True)
"""
KINDS = ("array", "list", "grain map", "grain iterator", "again")  # all but the first give the same batches


@pytest.mark.slow
@pytest.mark.long
def test_killed_runs_go_on_bit_by_bit(tmp_path):
    """An epoch has 47 updates: one ends before the kill, one after it."""
    grain()
    line = [sys.executable, "-c", textwrap.dedent(TRAINING), str(tmp_path), *KINDS]
    done = run_line(line, os.environ | {"XLA_FLAGS": quick_flags()})
    assert done.returncode == 0, done.stderr
    for kind, told in zip(KINDS, done.stderr.split("next kind")[1:], strict=True):
        assert "continuing from step" in told, (kind, told)
        assert ("train_data: continues at item" in told) == (kind in SEEKING), (kind, told)
    *parts, array, documents = [line.split()[-1] for line in done.stdout.splitlines()]
    assert parts == [array, *[documents] * 4]
    assert array != documents
    for kind in KINDS:
        part = logged(tmp_path / "parts" / kind)
        assert part == logged(tmp_path / "whole" / ("array" if kind == "array" else "list"))
        assert len(part) >= 6
