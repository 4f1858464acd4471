"""A config.json that does not describe its checkpoint, or is a trap, gets one line before anything is built."""

import json
import os
import pathlib
import shutil

import jax
import pytest

from tests.support import golden
from tlinformer_jax.config.run import run_config
from tlinformer_jax.decoding.generator import Generator
from tlinformer_jax.errors import DataError
from tlinformer_jax.interop.files import write_safetensors
from tlinformer_jax.training.checkpoint import load_run
from tlinformer_jax.training.conversion import weights_to_workdir, workdir_to_weights
from tlinformer_jax.training.workdir import Origin, check_origin

pytest.importorskip("safetensors")
MODEL = {"vocab_size": 257, "d_model": 16, "num_heads": 2, "num_blocks": 1, "hidden_depth": 0, "d_ff": 24}
DATA = {"dataset": "text", "train_files": "/none/t.txt", "validation_files": "/none/t.txt"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("stored")
    config = run_config({"model": MODEL | {"history_window": 8, "generation_window": 8}, "data": DATA})
    write_safetensors(folder / "x.safetensors", golden.random_weights(config.model))
    weights_to_workdir(folder / "x.safetensors", config, folder / "run")
    return folder / "run"


@pytest.fixture
def workdir(sound, tmp_path) -> pathlib.Path:
    return shutil.copytree(sound, tmp_path / "run")


def change(workdir: pathlib.Path, section: str, **fields) -> None:
    values = json.loads((workdir / "config.json").read_text())
    values[section] |= fields
    (workdir / "config.json").write_text(json.dumps(values))


def read_configuration(workdir: pathlib.Path) -> None:
    here = run_config({"model": MODEL | {"history_window": 8, "generation_window": 8}, "data": DATA})
    check_origin(Origin(workdir), here)


def convert(workdir: pathlib.Path) -> None:
    workdir_to_weights(workdir, workdir.parent / "x.safetensors")


LOADERS = (load_run, Generator.from_workdir, convert)


def check_refused(workdir: pathlib.Path, message: str, loaders=(*LOADERS, read_configuration)) -> None:
    for load in loaders:
        with pytest.raises(DataError, match=message) as caught:
            load(workdir)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["num_blocks", "hidden_depth"])
def test_a_million_layers_are_refused_before_a_model_is_built(workdir, monkeypatch, field):
    change(workdir, "model", **{field: 10**6})
    monkeypatch.setattr(jax, "eval_shape", lambda *_: pytest.fail("a model is built"))
    check_refused(workdir, r"its config\.json does not fit this version: model\.num_blocks = .* it makes [\d,]{9}")


def test_a_damaged_description_of_the_arrays_is_noticed(workdir):
    for path in workdir.rglob("_METADATA"):
        os.truncate(path, 9)
    check_refused(workdir, "has no usable checkpoint", LOADERS)


@pytest.mark.parametrize(("fields", "message"), [
    ({"d_ff": 16}, r"down_kernel has shape \(24, 16\) instead of \(16, 16\)"),
    ({"num_heads": 1}, r"out_kernel has shape \(2, 8, 16\) instead of \(1, 16, 16\)"),
    ({"architecture": "transformer"}, r"layers_0/\w+ is missing"),
    ({"num_blocks": 9}, r"blocks_1/.* is missing"),
    ({"vocab_size": 10**9}, r"embedding has shape \(257, 16\) instead of \(1000000000, 16\)"),
    ({"d_model": 10**12}, r"has shape .*16\) instead of .*1000000000000\)"),
    ({"d_ff": 10**15}, r"down_kernel has shape \(24, 16\) instead of \(1000000000000000, 16\)"),
])  # fmt: skip
def test_parameters_of_other_shapes_are_named(workdir, fields, message):
    change(workdir, "model", **fields)
    for load in LOADERS:
        with pytest.raises(DataError, match=rf"^checkpoint .*checkpoints/0: array params/.*{message}"):
            load(workdir)


def test_a_model_with_fewer_layers_than_the_stored_one_is_refused(tmp_path):
    """Its layers would all be found, and give wrong figures."""
    config = run_config({"model": MODEL | {"num_blocks": 2, "history_window": 8, "generation_window": 8}, "data": DATA})
    write_safetensors(tmp_path / "x.safetensors", golden.random_weights(config.model))
    weights_to_workdir(tmp_path / "x.safetensors", config, tmp_path / "run")
    change(tmp_path / "run", "model", num_blocks=1)
    check_refused(tmp_path / "run", r"array params/blocks_1/\S+ is not in the model of config\.json", LOADERS)


@pytest.mark.parametrize(("text", "message"), [
    ("[" * 100_000, r"no readable config\.json \(nested too deeply\)"),
    ('{"data": ' + '{"a": ' * 100_000, r"no readable config\.json \(nested too deeply\)"),
    ('{"data": {"train_files": "a\\u0000b"}}', r"data\.train_files = .*a\\x00b': must hold printable characters"),
    ('{"data": {"tokenizer": "\\ud800"}}', r"data\.tokenizer = .*\\ud800': must hold printable characters"),
    ('{"data": {"sequence_length": 1e99}}', r"data\.sequence_length = 1e\+99: must be of type int"),
    ('{"data": {"sequence_length": 10000000000}}', r"data\.sequence_length = 10000000000: must be an integer"),
    ('{"model": {"generation_window": 1000000000}}', r"generation_window = 1000000000: must be an integer from 1 to"),
    ('{"model": {"dtype": {"names": 1}}}', r"model\.dtype = \{'names': 1\}: must be one of"),
])  # fmt: skip
def test_a_configuration_that_is_a_trap_gets_a_line(workdir, text, message):
    (workdir / "config.json").write_text(text)
    check_refused(workdir, message)


def test_files_that_would_never_end_are_not_waited_for(workdir):
    (description,) = workdir.rglob("_METADATA")
    description.unlink()
    os.mkfifo(description)
    check_refused(workdir, "has no usable checkpoint", LOADERS)
    (workdir / "config.json").unlink()
    os.mkfifo(workdir / "config.json")
    check_refused(workdir, r"no readable config\.json \(it is not a regular file\)")
