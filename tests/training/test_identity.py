"""What a run depends on is told by content: its tokenizer, its texts, and which files its configuration means."""

import dataclasses
import json
import os
import pathlib

import pytest

from tests.training.test_resume import run_config
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.run import load_config, save_config
from tlinformer_jax.data.subwords import HUGGING_FACE_FILE
from tlinformer_jax.data.tokenizers import build_tokenizer, load_tokenizer
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.training.loop import train_and_evaluate
from tlinformer_jax.training.setup import build_run
from tlinformer_jax.training.workdir import TEXTS_FILE, check_tokenizer, check_workdir, save_description


def write_tokenizer(path: pathlib.Path, words: str) -> None:
    """A tokenizer.json whose ids are the words' places."""
    vocabulary = {word: number for number, word in enumerate(["</s>", "<unk>", *words.split()])}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    path.write_text(json.dumps({"version": "1.0", "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}}))


def with_data(config, **changes):
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def begin(config, workdir: pathlib.Path) -> None:
    """What a training does with its directory before the first step."""
    run = build_run(config, build_tokenizer(config.data.tokenizer))
    check_tokenizer(run.tokenizer, config.data.tokenizer, workdir)
    splits = {name: run.split(name) for name in ("train", "validation")}
    check_workdir(run, splits, workdir)
    save_description(run, splits, workdir)


def test_another_tokenizer_under_the_same_path_is_refused_and_the_runs_own_copy_stays(tmp_path):
    pytest.importorskip("tokenizers")
    path, workdir = tmp_path / "tok.json", tmp_path / "run"
    config = with_data(run_config(tmp_path), tokenizer=str(path), sequence_length=1)
    write_tokenizer(path, "one two three")
    for name in ("train", "validation"):
        (tmp_path / f"{name}.txt").write_text("one two three " * 99)
    begin(config, workdir)
    copy, first = (workdir / HUGGING_FACE_FILE).read_bytes(), path.read_text()
    write_tokenizer(path, "three two one")
    with pytest.raises(ConfigError, match=r"^data\.tokenizer = '.*tok\.json': must be the tokenizer of the run in"):
        train_and_evaluate(config, workdir)
    assert (workdir / HUGGING_FACE_FILE).read_bytes() == copy
    assert load_tokenizer(workdir).encode("one three").tolist() == [2, 4]
    # The same content under another path is the same tokenizer.
    (tmp_path / "moved.json").write_text(first)
    begin(with_data(config, tokenizer=str(tmp_path / "moved.json")), workdir)
    with pytest.raises(ConfigError, match=r"^data\.tokenizer = 'bytes'"):
        begin(with_data(config, tokenizer="bytes"), workdir)
    # A copy without its description is not taken for the run's.
    (workdir / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no readable tokenizer"):
        begin(config, workdir)


@pytest.mark.parametrize(
    ("section", "fields", "says"),
    [
        ("model", {"hidden_depth": 1}, r"model\.hidden_depth: 0 -> 1"),
        ("train", {"schedule": "paper", "steps": "1epoch"}, r"train\.schedule: 'cosine:0.1' -> 'paper'"),
        ("data", {"document_masking": True}, r"data\.document_masking: False -> True"),
        ("train", {"optimizer": "muon"}, r"train\.optimizer: 'adamw' -> 'muon'"),
        ("train", {"schedule": "constant"}, None),
    ],
)
def test_another_run_in_the_directory_is_refused_and_another_constant_course_is_named(
    section, fields, says, tmp_path, capfd
):
    config, workdir = run_config(tmp_path), tmp_path / "run"
    begin(config, workdir)
    other = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **fields)})
    if says:
        with pytest.raises(ConfigError, match=f"holds a run with another configuration: .*{says}"):
            begin(other, workdir)
        other, config = config, other
    begin(other, workdir)
    assert (
        "changed since the last run here: train.schedule: 'cosine:0.1' -> 'constant'" in capfd.readouterr().err
    ) != bool(says)


def test_a_text_of_other_content_is_named_and_a_copy_of_the_same_is_not(tmp_path, capfd):
    config, workdir = run_config(tmp_path), tmp_path / "run"
    begin(config, workdir)
    os.utime(tmp_path / "train.txt", ns=(1, 1))
    (tmp_path / "copy.txt").write_bytes((tmp_path / "train.txt").read_bytes())
    begin(config, workdir)
    begin(with_data(config, train_files=str(tmp_path / "copy.txt")), workdir)
    assert "the text of" not in capfd.readouterr().err
    with (tmp_path / "train.txt").open("a") as file:
        file.write("more")
    begin(config, workdir)
    said = [line for line in capfd.readouterr().err.splitlines() if "the text of" in line]
    assert said == ["changed since the last run here: the text of the train split; it has other samples now"]
    begin(config, workdir)  # it is the run's text from now on
    assert "the text of" not in capfd.readouterr().err
    (workdir / TEXTS_FILE).write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"texts\.json: cannot be read \(nested too deeply\)"):
        begin(config, workdir)


def test_a_stored_configuration_means_the_same_files_from_any_directory(tmp_path, monkeypatch):
    one, two = tmp_path / "one[1]", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "t.txt").write_text(f"{folder.name} " * 99)
    monkeypatch.chdir(one)
    paths = {"train_files": "t.txt, *.txt", "validation_files": "t.txt"}
    config = with_data(run_config(tmp_path), **paths, tokenizer="tok.json")
    save_config(config, tmp_path)
    monkeypatch.chdir(two)
    data = load_config(tmp_path).data
    assert data == config.data
    assert data.tokenizer == str(one / "tok.json")
    run = build_run(with_data(load_config(tmp_path), tokenizer="bytes"), build_tokenizer("bytes"))
    assert bytes(run.split("validation").tokens[:3].astype("uint8")) == b"one"
    assert len(run.split("train").tokens) == len(run.split("validation").tokens)  # the pattern is the same file again
    # What a person has written by hand starts from the directory itself.
    text = (tmp_path / "config.json").read_text()
    (two / "config.json").write_text(text.replace(json.dumps(data.validation_files), '"t.txt"'))
    monkeypatch.chdir(one)
    assert load_config(two).data.validation_files == str(two / "t.txt")


def test_a_current_directory_that_paths_cannot_start_from_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "a,b"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert DataConfig(tokenizer="t.json", train_files="/t.txt").train_files == "/t.txt"
    with pytest.raises(ConfigError, match=r"data\.train_files = 't\.txt': must be absolute: .*a,b holds a comma"):
        DataConfig(train_files="t.txt")
    folder.rmdir()
    with pytest.raises(
        ConfigError, match=r"data\.tokenizer = 't\.json': must be absolute: the current directory is gone"
    ):
        DataConfig(tokenizer="t.json")
