"""python -m tlinformer_jax.main --check: what a run would take, and whatever is wrong with it, before it starts."""

import os

import jax
import pytest

from tests.support.commands import ROOT, check_refusal, command, in_fork
from tlinformer_jax.config.run import run_config
from tlinformer_jax.data.sources import load_split
from tlinformer_jax.data.tokenizers import ByteTokenizer
from tlinformer_jax.errors import UserError
from tlinformer_jax.training.check import check_run, state_bytes
from tlinformer_jax.training.device_memory import program_bytes
from tlinformer_jax.training.setup import ANY_LENGTH, build_run

MODEL = {
    "architecture": "transformer",
    "vocab_size": 257,
    "d_model": 16,
    "num_heads": 2,
    "num_blocks": 1,
    "hidden_depth": 0,
    "d_ff": 24,
    "generation_window": 16,
    "history_window": 16,
}
TEXT = "abcdefghij" * 100  # 1,000 bytes and the end of the text: 31 samples of 32


def config_of(tmp_path, model=(), train=(), data=()):
    """A run over a text file of 1,000 bytes."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    text = {"dataset": "text", "train_files": str(path), "validation_files": str(path)}
    text["sequence_length"] = 32
    return run_config(
        {
            "model": MODEL | dict(model),
            "train": {"steps": 10, "batch_size": 8, **dict(train)},
            "data": text | dict(data),
        }
    )


def test_figures_are_those_of_hand_and_nothing_is_written(tmp_path):
    text = check_run(config_of(tmp_path))
    layer = 16 * 48 + 48 + 16 * 16 + 16 + 4 * 16 + 3 * 16 * 24
    parameters = 257 * 16 + 2 * layer + 2 * 16
    assert f"{parameters:,} parameters" in text
    products = 2 * 16 * (48 + 16 + 3 * 24) * 2 + 2 * 257 * 16  # a token's, of two layers and the head
    attended = 2 * 4 * 16 * (32 * 33 / 2) / 32
    assert f"model FLOPs per trained token, forward and backward: {3 * (products + attended):,.0f}\n" in text
    assert "10 steps of 256 tokens, 2,560 tokens in all" in text
    assert "train split: not tokenised yet" in text
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_epochs_are_counted_once_the_text_is_tokenised(tmp_path):
    config = config_of(tmp_path, train={"steps": "3epochs"})
    assert "3 epochs, steps of 256 tokens; their number will be known when the text is tokenised" in check_run(config)
    load_split(config.data, "train", ByteTokenizer())
    before = sorted(path.name for path in tmp_path.rglob("*"))
    text = check_run(config)
    assert "train split: 1,001 tokens, 31 samples of 32" in text
    assert "12 steps of 256 tokens, 3,072 tokens in all, 3.10 epochs" in text  # 93 sequences in updates of 8
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("mesh", ["", "fsdp=4"])
def test_memory_is_what_the_arrays_take(tmp_path, mesh):
    run = build_run(config_of(tmp_path, train={"mesh": mesh}), ByteTokenizer())
    state = run.initial_state()

    def held(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    found = state_bytes(run)
    assert found.parameters == found.gradients == held(state.params)
    assert found.optimizer == held(state.opt_state)
    twice = build_run(config_of(tmp_path, train={"mesh": mesh, "batch_size": 16, "accumulation": 2}), ByteTokenizer())
    assert state_bytes(twice).gradients == 2 * held(state.params)


def test_compiled_step_holds_more_than_the_state(tmp_path):
    def measured(**train):
        run = build_run(config_of(tmp_path, train=train), ByteTokenizer(), ANY_LENGTH)
        return state_bytes(run), program_bytes(run.compiled_train_step())

    state, step = measured()
    assert step.total - step.temporary >= state.parameters + state.optimizer
    assert step.total > sum(state)
    _, larger = measured(batch_size=512)
    assert larger.temporary > 1.5 * step.temporary


def test_a_compiler_that_does_not_report_a_programs_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda compiled: None)
    assert "by device: the compiler does not report its memory" in check_run(config_of(tmp_path), compile_step=True)


MISTAKES = {
    "files": ({"data": {"validation_files": "none/*.txt"}}, "data.validation_files: no file matches"),
    "tokenizer": ({"model": {"vocab_size": 256}}, "model.vocab_size = 256"),
    "no tokenizer": ({"data": {"tokenizer": "/none.json"}}, "data.tokenizer = '/none.json'"),
    "batch": ({"train": {"batch_size": 12}}, "train.batch_size = 12: must be divisible by 8"),
    "mesh": ({"train": {"mesh": "fsdp=3"}}, "it is 3, and there are 8 devices"),
    "fsdp": ({"model": {"d_model": 12}, "train": {"mesh": "fsdp=8"}}, "train.mesh = 'fsdp=8': fsdp must divide"),
    "length": ({"data": {"dataset": "pydoc", "sequence_length": 10**7}}, "data.sequence_length = 10000000"),
}


@pytest.mark.skipif(jax.device_count() != 8, reason="the messages count 8 devices")
@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found(tmp_path, name):
    changes, message = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        check_run(config_of(tmp_path, **changes))
    assert message in str(caught.value)


def test_the_command_needs_no_workdir_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")  # of conftest.py
    for name in ("HOME", "XDG_CACHE_HOME", "TLINFORMER_CACHE", "JAX_COMPILATION_CACHE_DIR", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    result = command("tlinformer_jax.main", "--check", "--config=configs/tiny.py", f"--workdir={tmp_path}/run")
    assert result.returncode == 0, result.stderr
    assert "450 steps of 2,048 tokens, 921,600 tokens in all" in result.stdout
    shown = (ROOT / "docs" / "quickstart.md").read_text()
    for line in result.stdout.splitlines()[:4]:  # what follows depends on Python's own documentation
        assert line.rpartition(", ")[0] in shown
    assert os.listdir(tmp_path) == []
    wrong = in_fork("tlinformer_jax.main", "--check", "--config=configs/tiny.py", "--config.train.mesh=fsdp=3")
    check_refusal(wrong, "it is 3, and there is 1 device")


def test_a_split_that_is_too_short_is_found_before_training(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    config = config_of(tmp_path, data={"validation_files": str(tmp_path / "short.txt")})
    load_split(config.data, "validation", ByteTokenizer())
    for look in (check_run, lambda config: build_run(config, ByteTokenizer()).split("validation")):
        with pytest.raises(UserError, match="the validation split has only 10 tokens"):
            look(config)
