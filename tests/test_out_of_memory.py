"""Want of memory: one line that names what can be changed, and status 1."""

import jax
import pytest

from tests.support.commands import TEXT, TEXT_FILE, command, command_line, run_line
from tlinformer_jax.errors import DataError
from tlinformer_jax.training import loop
from tlinformer_jax.training.device_memory import OutOfMemoryError, memory_advice

SHRUNK = ("--config.model.d_model=16", "--config.model.num_heads=2", "--config.model.num_blocks=1")
MESSAGE = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12345 bytes.\nBufferAssignment OOM Debugging."


@pytest.mark.parametrize("message", [MESSAGE, "INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory"])
def test_the_error_becomes_one_line(message):
    with pytest.raises(OutOfMemoryError, match=r"train\.accumulation") as caught, memory_advice():
        raise jax.errors.JaxRuntimeError(message)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)


def test_what_the_host_fetches_in_vain_is_known_too_but_no_error_of_the_users():
    with pytest.raises(OutOfMemoryError), memory_advice():
        raise ValueError(MESSAGE)
    with pytest.raises(DataError, match=r"^out of memory"), memory_advice():
        raise DataError("out of memory, says a file")


@pytest.mark.parametrize(
    "message", ["INTERNAL: a kernel failed", "RESOURCE_EXHAUSTED: Shared memory size limit exceeded: requested 300000"]
)
def test_other_errors_go_on(message):
    with pytest.raises(jax.errors.JaxRuntimeError, match=message[:12]), memory_advice():
        raise jax.errors.JaxRuntimeError(message)


def test_from_python_too(tmp_path, monkeypatch):
    def first_state(*_):
        raise jax.errors.JaxRuntimeError(MESSAGE)

    monkeypatch.setattr(loop, "first_state", first_state)
    files = {f"{split}_files": str(TEXT_FILE) for split in ("train", "validation")}
    config = {
        "model": {"d_model": 16, "num_heads": 2, "num_blocks": 1},
        "data": {"dataset": "text", "tokenizer": "bytes", "sequence_length": 64} | files,
    }
    with pytest.raises(OutOfMemoryError, match=r"train\.batch_size"):
        loop.train_and_evaluate(config, tmp_path)


@pytest.mark.parametrize("arguments", [["--check_compile"], ["--workdir"]])
def test_the_command_ends_with_status_1_and_no_traceback(arguments, tmp_path):
    arguments = [argument.replace("--workdir", f"--workdir={tmp_path}/run") for argument in arguments]
    line, environment = command_line("tlinformer_jax.main", "--config=configs/tiny.py", *TEXT, *SHRUNK, *arguments)
    fault = f"""
import jax
from tlinformer_jax.training import setup
def jit_train_step(*_, **__):
    raise jax.errors.JaxRuntimeError({MESSAGE!r})
setup.jit_train_step = jit_train_step
"""
    line[2] = fault + line[2]
    result = run_line(line, environment)
    assert result.returncode == 1, result.stderr
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: Out of memory while trying to allocate 12345 bytes; a step needs less memory with ")
    for field in ("model.memory", "train.accumulation", "train.batch_size", "data.sequence_length"):
        assert field in last


FULL = f"""
import jax
def full(*_, **__):
    raise jax.errors.JaxRuntimeError({MESSAGE!r})
"""


@pytest.mark.slow
def test_evaluating_and_generating_end_with_status_1_and_the_flags_that_help(tmp_path):
    short = ("--config.train.steps=1", "--config.data.sequence_length=64", f"--workdir={tmp_path}")
    trained = command("tlinformer_jax.main", "--config=configs/tiny.py", *TEXT, *SHRUNK, *short)
    assert trained.returncode == 0, trained.stderr
    for module, fault, arguments, advice in (
        (
            "evaluate",
            "from tlinformer_jax.training import setup; setup.put_batch = full",
            ("--batch_size=2",),
            "a smaller --batch_size",
        ),
        (
            "generate",
            "from tlinformer_jax.decoding import generator; generator.GenerationStream = full",
            ("--prompt=a", "--num_samples=3"),
            "a smaller --num_samples or --max_new_tokens, a shorter prompt",
        ),
    ):
        line, environment = command_line(module, f"--workdir={tmp_path}", *arguments)
        line[2] = f"{FULL}{fault}\n{line[2]}"
        result = run_line(line, environment)
        assert result.returncode == 1, result.stderr
        assert "Traceback" not in result.stderr
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith(f"error: Out of memory while trying to allocate 12345 bytes; {advice}, or a device")
