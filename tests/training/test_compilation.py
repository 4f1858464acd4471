"""When the training step is compiled, how often, and with which options."""

import contextlib
import logging
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.support.commands import TEXT_FILE
from tlinformer_jax.config.run import run_config
from tlinformer_jax.data.tokenizers import ByteTokenizer
from tlinformer_jax.parallel.mesh import target
from tlinformer_jax.training import step
from tlinformer_jax.training.loop import train_and_evaluate
from tlinformer_jax.training.optimizer import Horizon
from tlinformer_jax.training.setup import build_run

MODEL = {"vocab_size": 257, "d_model": 16, "num_heads": 2, "num_blocks": 1, "hidden_depth": 0, "d_ff": 24}
MODEL |= {"architecture": "transformer", "dtype": "float32"}  # which compiles in half the time
TLINFORMER = {"architecture": "tlinformer", "history_window": 4, "generation_window": 4}
RECALL = {"dataset": "recall", "tokenizer": "numbers:64", "sequence_length": 16, "num_items": 2, "examples": 200}
FILES = {f"{split}_files": str(TEXT_FILE) for split in ("train", "validation")}
TEXT = {"dataset": "text", "tokenizer": "bytes", "sequence_length": 16} | FILES


@pytest.fixture(autouse=True)
def logged():
    """In every thread, unlike `jax.log_compiles`."""
    jax.config.update("jax_log_compiles", True)
    yield
    jax.config.update("jax_log_compiles", False)


def compilations(
    caplog: Any, workdir: pathlib.Path, data: dict[str, Any], model: dict[str, Any] = MODEL, **train: Any
) -> list[str]:
    """Threads that compiled a training step in a run, one name for each program."""
    caplog.clear()
    train = {"batch_size": 8, "warmup_steps": 1, **train}
    with caplog.at_level(logging.WARNING, logger="jax"):
        train_and_evaluate({"model": model, "train": train, "data": data}, workdir)
    found = [record for record in caplog.records if "Finished XLA compilation of jit(train_step)" in record.message]
    caplog.clear()
    return [record.threadName or "" for record in found]


# Of a task the default suite counts the steps of a curriculum, below.
@pytest.mark.parametrize(
    ("data", "model"), [(TEXT, MODEL | TLINFORMER), pytest.param(RECALL, MODEL, marks=pytest.mark.slow)]
)
def test_a_step_is_compiled_once_beside_what_else_a_run_needs(data, model, tmp_path, caplog):
    (thread,) = compilations(caplog, tmp_path, data, model, steps=3)
    assert thread.startswith("compilation")
    assert compilations(caplog, tmp_path, data, model, steps=3) == [], "the run was finished"


def test_the_short_update_of_a_paper_epoch_is_the_same_program(tmp_path, caplog):
    (tmp_path / "a.txt").write_bytes(bytes(range(32, 127)) * 4)  # 23 samples: three updates, the last of seven
    files = {"train_files": str(tmp_path / "a.txt"), "validation_files": str(tmp_path / "a.txt")}
    assert len(compilations(caplog, tmp_path / "run", TEXT | files, steps="1epochs", schedule="paper")) == 1


def test_a_step_is_compiled_for_each_length_of_a_curriculum(tmp_path, caplog):
    threads = compilations(caplog, tmp_path, RECALL | {"curriculum": "8:2"}, steps=4)
    assert len(threads) == 2
    assert all(thread.startswith("compilation") for thread in threads), "the main thread answers signals"


# ---- train.deterministic


def test_the_installed_xla_knows_the_options_of_deterministic_runs():
    options = {"xla_gpu_enable_triton_gemm": False} | step.DETERMINISTIC
    assert jax.jit(lambda x: x + 1, compiler_options=options)(1) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        jax.jit(lambda x: x + 1, compiler_options={"no_such_option": True})(1)


@pytest.mark.parametrize("deterministic", [False, True])
def test_on_a_gpu_training_and_evaluation_are_compiled_with_them(deterministic, monkeypatch):
    """An option that XLA does not know stands for them, and is refused where they are passed on."""
    monkeypatch.setattr(step, "DETERMINISTIC", {"no_such_option": True})
    train = {"steps": 3, "batch_size": 8, "deterministic": deterministic}
    config = run_config({"model": MODEL, "train": train, "data": TEXT})
    with target("gpu", "AMD Instinct MI300X"):  # for which no kernels of ours are in the way of the CPU's compiler
        run = build_run(config, ByteTokenizer(), Horizon(3, 3))
        batch = {name: jax.ShapeDtypeStruct((8, 16), jnp.float32) for name in ("weights",)}
        batch |= {name: jax.ShapeDtypeStruct((8, 16), jnp.int32) for name in ("inputs", "labels")}
        with jax.set_mesh(run.mesh):
            evaluation = run.eval_step.lower(run.abstract_state.params, batch)
        for compiled in (run.compiled_train_step, evaluation.compile):
            refused = pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option")
            with refused if deterministic else contextlib.nullcontext():
                compiled()
