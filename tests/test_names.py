"""Configurations by name, and what is said of names that are misspelt."""

import pathlib
import resource
import sys

import pytest
from absl import flags

from tests.support.commands import ROOT, check_refusal, command_line, in_fork, in_forks, run_line
from tlinformer_jax.commands import cli
from tlinformer_jax.config.named import config_file, load_python
from tlinformer_jax.config.run import run_config, unknown_field
from tlinformer_jax.errors import ConfigError, UserError
from tlinformer_jax.experiments.plan import load_sweep

CONFIGS = ROOT / "configs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> pathlib.Path:
    """Another directory than the checkout."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def from_flags(*argv: str):
    """The configuration that a command line makes."""
    values = flags.FlagValues()
    cli.define_config_flag(flag_values=values, sys_argv=["main", *argv])
    values(["main", *argv])
    return run_config(values.config)


@pytest.mark.parametrize("config", [None, "tiny", 3, [("model", {})]])
def test_what_is_no_configuration_is_said(config):
    said = "must be a mapping of the sections model, train and data"
    with pytest.raises(ConfigError, match=rf"^config = .*: {said}"):
        run_config(config)


def test_every_config_and_sweep_has_a_name():
    for path in CONFIGS.glob("*.py"):
        sweep = path.stem.startswith("sweep_")
        name, flag = (path.stem.removeprefix("sweep_"), "--sweep") if sweep else (path.stem, "--config")
        assert pathlib.Path(config_file(name, flag)).samefile(path)


@pytest.mark.parametrize("variant", ["tiny", "wt103", "wt103:paper-1k-512-0.5", "books:4k-1k-0.5"])
def test_a_name_is_its_file_from_anywhere(variant):
    name, _, rest = variant.partition(":")
    by_file = from_flags(f"--config={CONFIGS / name}.py{':' if rest else ''}{rest}", "--config.train.seed=7")
    by_name = from_flags(f"--config={variant}", "--config.train.seed=7")
    assert by_name == by_file
    assert by_name.train.seed == 7


def test_sweeps_by_name():
    assert load_sweep("windows:tiny") == load_sweep(f"{CONFIGS}/sweep_windows.py:tiny")


def test_a_file_wins_over_a_name(elsewhere):
    (elsewhere / "tiny").mkdir()
    assert config_file("tiny") == f"{CONFIGS}/tiny.py"  # a folder does not
    (elsewhere / "tiny").rmdir()
    (elsewhere / "tiny").write_text((CONFIGS / "tiny.py").read_text().replace("steps=450", "steps=11"))
    assert config_file("tiny:x") == "tiny:x"
    assert from_flags("--config=tiny").train.steps == 11
    for path in ("configs/tiny.py", "./tiny", "/tiny", "tiny.py:x", ""):
        assert config_file(path) == path
    with pytest.raises(UserError, match="must be a Python file, or one of"):
        config_file("n" * 300)  # longer than any file's name


def test_an_unknown_name_lists_the_names():
    names = "audio, books, copy, genome, images, large, long, niah, passkey, proteins, recall, state, tiny, wt103"
    with pytest.raises(
        UserError, match=f"--config=tinny:x: must be a Python file, or one of {names}; did you mean tiny?"
    ):
        config_file("tinny:x")
    sweeps = "architectures, capacity, comparators, copy, evidence, niah, options, passkey, recall, state, windows"
    with pytest.raises(UserError, match=f"--sweep=q: must be a Python file, or one of {sweeps}$"):
        config_file("q", "--sweep")
    refused = in_fork("tlinformer_jax.main", "--config=tinny", "--workdir=run")
    check_refusal(refused, f"one of {names}; did you mean tiny?")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a\0b", "--config={file}: source code string cannot contain null bytes"),
        ("def get_config():\n    raise SystemExit(3)\n", "--config={file}: SystemExit in {file}, line 2: 3"),
    ],
)
def test_a_file_that_cannot_run_is_refused_in_one_line(elsewhere, content, says):
    file = elsewhere / "config.py"
    file.write_text(content)
    with pytest.raises(UserError) as caught:
        load_python(str(file), "--config", "get_config")
    assert str(caught.value) == says.format(file=file)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("train.stpes", "no such field; did you mean train.steps?"),
        ("model.history_windwo", "no such field; did you mean model.history_window?"),
        ("model.steps", "no such field; did you mean train.steps?"),
        ("modle.d_model", "no such field; did you mean model.d_model?"),
        ("modle.dmodel", "no such field; did you mean model.d_model?"),
        ("modle", "no such section; did you mean model?"),
        ("mesh", "no such section; did you mean train.mesh?"),
        ("mesh.fsdp", "no such field; did you mean train.mesh?"),
        ("train.fsdp", "no such field; did you mean train.mesh?"),
        ("train.mesh.fsdp", "no such field; did you mean train.mesh?"),
        ("data.cache_dir", "no such field; the environment variable TLINFORMER_CACHE names the folder of the cache"),
        ("train.stop_at_accuracy", "no such field; train.steps = '5000@0.99' ends a task's run at an accuracy"),
        ("train.num_epochs", "no such field; train.steps = '10epochs' counts epochs"),
        (
            "data.zzz",
            "no such field; the fields are curriculum, dataset, document_masking, examples, num_items, "
            "sequence_length, shingle, test_files, text_field, tokenizer, train_files, validation_files",
        ),
        ("zzz.yyy", "no such section; the sections are model, train, data"),
        ("train.steps", None),
        ("data", None),
    ],
)
def test_unknown_fields(name, says):
    assert unknown_field(name) == says
    if says:
        section, _, field = name.partition(".")
        with pytest.raises(ConfigError) as caught:
            run_config({section: {field: 3} if field else 3})
        # From Python, the section is looked at first.
        assert str(caught.value).endswith(says) or section not in ("model", "train", "data")


MISSPELT = {
    "a field": (("train", "--config=tiny", "--config.train.stpes=3"), "did you mean train.steps?"),
    "a flag": (("train", "--config=tiny", "--wrokdir=x"), "Did you mean: workdir ?"),
    "a command": (("trian", "--config=tiny"), "error: trian: must be one of train, "),
    "capitals": (("train", "--config=TINY"), "; did you mean tiny?"),
    "a variant of none": (("train", "--config=tiny:x"), "--config=tiny:x: must be tiny; it has no variants"),
    "nothing": (("train", "--config="), "--config: must name a config file"),
}


@pytest.mark.parametrize("what", MISSPELT)
def test_misspelt_on_the_command_line(what):
    arguments, says = MISSPELT[what]
    check_refusal(in_fork("tlinformer_jax.__main__", *arguments), says)


def test_a_wrong_command_is_told_at_once():
    """Two seconds of processor time, which other work on the machine does not change; and without JAX."""
    line, environment = command_line("tlinformer_jax.__main__", "trian", blocked=("jax", "numpy"))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    check_refusal(run_line(line, environment), "; did you mean train?")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_check_is_a_command():
    shrunk = ["--config=tiny", "--config.model.d_model=24"]
    checked, same = in_forks([("check", shrunk), ("tlinformer_jax.main", ["--check", *shrunk])])
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout == same.stdout
    assert "parameters" in checked.stdout
    assert sys.executable not in checked.stdout
