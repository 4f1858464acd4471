"""Paths that mean more to a library than to the file system, and working directories that were tampered with."""

import dataclasses
import errno
import itertools
import os
import pathlib
import shutil
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.training.test_checkpoint import abstract, assert_params, state_of, write
from tests.training.test_checkpoint import sound as sound  # a fixture
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.run import CONFIG_FILE, load_config, run_config
from tlinformer_jax.data.tokenizers import TOKENIZER_FILE, ByteTokenizer, load_tokenizer, save_tokenizer
from tlinformer_jax.errors import ConfigError, DataError, UserError
from tlinformer_jax.files import PLAIN, local_path, write_text
from tlinformer_jax.training.checkpoint import (
    MANIFEST_FILE,
    hash_files,
    misfit,
    read_manifest,
    restore_params,
    write_manifest,
)
from tlinformer_jax.training.metrics import METRICS_FILE, TENSORBOARD_FOLDER, MetricsLog
from tlinformer_jax.training.saving import Checkpoints
from tlinformer_jax.training.workdir import LOCK_FILE, ORIGIN_FILE, find_origin, sole_run

NAMES = {
    "brackets": "lr[0.1]",
    "wildcards": "*?{a,b}",
    "backslash": "a\\b",
    "a URL's characters": "a%20b#c?d=e&f",
    "quotes": "'\"`$(x)",
    "two stars": "**",
    "a tilde at the end": "run~",
    "colon": "s3:",
    "spaces": " a  b ",
    "letters": "ü日本́",
}


@pytest.mark.parametrize("kind", NAMES)
def test_a_working_directory_of_any_name_can_be_written_read_and_copied(kind, tmp_path):
    """Its name and that of a folder above it."""
    workdir = tmp_path / NAMES[kind] / NAMES[kind]
    workdir.mkdir(parents=True)
    write(workdir, 1, 2)
    assert_params(workdir, 2)
    with Checkpoints(workdir, 9) as checkpoints:
        restored, _ = checkpoints.restore(abstract(state_of(0)))
        jax.tree.map(np.testing.assert_array_equal, restored, state_of(2))
        checkpoints.save(state_of(3))
    shutil.copytree(workdir, tmp_path / "plain")
    assert_params(tmp_path / "plain", 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({NAMES[kind], "plain"})


def test_where_open_folders_have_no_path_such_a_name_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("tlinformer_jax.files.OPEN_FILES", tmp_path / "none")
    write(tmp_path, 1)
    (tmp_path / "a[1]").mkdir()
    with pytest.raises(
        DataError, match=r"checkpoints cannot be written \(on this system its path may only have letters"
    ):
        Checkpoints(tmp_path / "a[1]", 1)


@pytest.mark.parametrize(
    "path", ["gs://b/run", "s3://b/run", "file:///tmp/run", "hf://a/b", pathlib.Path("gs://b/run")]
)
def test_urls_are_refused_with_a_way_to_use_buckets(path):
    with pytest.raises(UserError, match=r"--workdir = '.*': must be a local path; to use a bucket, mount it"):
        local_path(path, "--workdir")
    for field in ("train_files", "validation_files", "test_files", "tokenizer"):
        with pytest.raises(ConfigError, match=rf"data\.{field} = .*must be a local path"):
            DataConfig(**{field: str(path)})


@pytest.mark.parametrize("path", ["a\nb", "a\0b", "a\x1bb", "a\udcffb", "~nobody-of-this-name/x", ""])
def test_paths_that_cannot_be_told_in_a_line_or_found_are_refused(path):
    with pytest.raises(UserError) as caught:
        local_path(path, "--out")
    assert str(caught.value).isprintable()


def test_paths_are_absolute_and_know_the_home_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir("/")
    assert local_path("~/a[1]", "--out") == tmp_path / "a[1]"
    assert local_path("b", "--out") == pathlib.Path("/b")
    for special in ("/gs/a", "/a*", "/a~", "/a/?"):
        assert not PLAIN.fullmatch(special)
    assert PLAIN.fullmatch("/a/gs/b.c-d_e")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's tasks, after its errors
def test_what_cannot_be_read_back_never_becomes_a_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 1)
    finish = ocp.AsyncCheckpointer.wait_until_finished

    def lose(self):
        finish(self)
        (tmp_path / "checkpoints" / "2.saving" / "state" / "manifest.ocdbt").unlink(missing_ok=True)

    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", lose)
    with pytest.raises(DataError, match=r"2\.saving: cannot be written \(NOT_FOUND"):
        write(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert_params(tmp_path, 1)


def test_an_array_that_is_missing_or_of_another_shape_or_type_is_named(sound):
    folder = sound / "checkpoints" / "2"
    params = abstract(state_of(2).params)
    assert misfit(folder, {"params": params}, ("shape", "dtype")) is None
    wrong = params | {"embedding": jax.ShapeDtypeStruct((7, 6), np.float32, sharding=params["embedding"].sharding)}
    with pytest.raises(DataError, match=r"array params/embedding has shape \(7, 5\) instead of \(7, 6\)"):
        restore_params(sound, wrong)
    with pytest.raises(DataError, match=r"array params/bias is missing"):
        restore_params(sound, params | {"bias": params["embedding"]})
    with pytest.raises(DataError, match=r"array params/block/bias is not in the model of config.json"):
        restore_params(sound, {"embedding": params["embedding"]})
    other = {"params": params | {"embedding": jax.ShapeDtypeStruct((7, 5), np.float16)}}
    assert "has dtype float32 instead of float16" in misfit(folder, other, ("shape", "dtype"))


@pytest.mark.parametrize("hours", [2, -2])
def test_a_wall_clock_that_jumps_during_a_save_ends_nothing(hours, tmp_path, monkeypatch):
    """It jumps between any two looks at it."""
    real, looks = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: real() + 3600 * hours * next(looks))
    write(tmp_path, 1, 2)
    assert next(looks) > 10
    assert_params(tmp_path, 2)


def others_of(folder: pathlib.Path) -> dict[str, bytes]:
    """A file for links to lead to, in a folder of its own, and what it holds."""
    folder.mkdir()
    (folder / "precious").write_bytes(b"not ours")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_training_writes_through_no_link(tmp_path):
    """Whatever links are called by, what they lead to stays as it is; what cannot be written without it is refused."""
    outside, workdir = tmp_path / "outside", tmp_path / "run"
    before = others_of(outside)
    workdir.mkdir()

    def link(name: str, target: pathlib.Path = outside / "precious") -> pathlib.Path:
        path = workdir / name
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        return path

    link(LOCK_FILE)
    with pytest.raises(DataError, match=r"\.lock cannot be written \(it is a link\)"), sole_run(workdir):
        pass
    (workdir / LOCK_FILE).unlink()
    link(METRICS_FILE)
    with pytest.raises(DataError, match=r"metrics\.jsonl cannot be written \(it is a link\)"):
        MetricsLog(workdir)
    (workdir / METRICS_FILE).unlink()
    link(f"{METRICS_FILE}.draft")
    link(TENSORBOARD_FOLDER, outside)
    with pytest.raises(DataError, match=r"tensorboard cannot be written \(it is a link\)"):
        MetricsLog(workdir)
    (workdir / TENSORBOARD_FOLDER).unlink()
    MetricsLog(workdir).close()
    for name in (TOKENIZER_FILE, f"{TOKENIZER_FILE}.draft", f"{CONFIG_FILE}.draft", CONFIG_FILE):
        link(name)
    save_tokenizer(ByteTokenizer(), workdir)
    write_text(workdir / CONFIG_FILE, "{}")
    assert not any(path.is_symlink() for path in workdir.iterdir())
    link("checkpoints", outside)
    with pytest.raises(DataError, match=r"checkpoints cannot be written \(it is a link\)"):
        write(workdir, 1)
    (workdir / "checkpoints").unlink()
    (workdir / "checkpoints").mkdir()
    for name in ("1.saving", "1.deleting", "2", "3.saving"):
        link(f"checkpoints/{name}", outside)
    link("checkpoints/1")
    write(workdir, 1, 2, 3)
    assert_params(workdir, 3)
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


def test_loading_follows_no_link_and_waits_for_no_pipe(sound, tmp_path, capfd):
    outside, workdir = tmp_path / "outside", tmp_path / "run"
    shutil.copytree(sound, outside)
    shutil.copytree(sound, workdir)
    (workdir / "checkpoints" / "2" / MANIFEST_FILE).unlink()
    (workdir / "checkpoints" / "2" / MANIFEST_FILE).symlink_to(outside / "checkpoints" / "2" / MANIFEST_FILE)
    assert_params(workdir, 1)
    assert "2: has no readable manifest.json (it is a link); it is not used" in capfd.readouterr().err
    save_tokenizer(ByteTokenizer(), outside)
    for name, read in ((CONFIG_FILE, load_config), (TOKENIZER_FILE, load_tokenizer)):
        (workdir / name).symlink_to(outside / TOKENIZER_FILE)
        with pytest.raises(DataError, match="it is a link"):
            read(workdir)
        (workdir / name).unlink()
        os.mkfifo(workdir / name)
        with pytest.raises(DataError, match="it is not a regular file"):
            read(workdir)
    os.mkfifo(workdir / ORIGIN_FILE)
    with pytest.raises(DataError, match=r"init_from\.json: cannot be read"):
        find_origin(run_config({}), workdir, None)
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").symlink_to(outside / "checkpoints")
    (workdir / CONFIG_FILE).unlink()
    with pytest.raises(DataError, match="checkpoints is a link, which is not followed"):
        restore_params(workdir, abstract(state_of(0).params))


LOOKALIKES = {
    "file": (lambda path: path.write_text("x"), "is not a folder"),
    "pipe": (os.mkfifo, "is not a folder"),
    "link to a folder": (lambda path: path.symlink_to(path.parent / "2"), "is a link, which is not followed"),
    "loop": (lambda path: path.symlink_to(path), "is a link, which is not followed"),
}


@pytest.mark.parametrize("kind", LOOKALIKES)
def test_what_only_has_the_name_of_a_checkpoint_is_named_and_in_no_saves_way(kind, sound, tmp_path, capfd):
    make, says = LOOKALIKES[kind]
    workdir = tmp_path / "run"
    shutil.copytree(sound, workdir)
    make(workdir / "checkpoints" / "3")
    assert_params(workdir, 2)
    assert capfd.readouterr().err == f"checkpoint {workdir}/checkpoints/3: {says}; it is not used\n"
    with Checkpoints(workdir, 9) as checkpoints:
        assert checkpoints.restore(abstract(state_of(0)))[1].step == 2
        checkpoints.save(state_of(3))
    assert capfd.readouterr().err.endswith("checkpoints/3: set aside as 3.damaged\n")
    assert_params(workdir, 3)
    for step in "123":
        shutil.rmtree(workdir / "checkpoints" / step)
    make(workdir / "checkpoints" / "2")
    with pytest.raises(DataError, match="has no usable checkpoint"):
        assert_params(workdir, 2)  # nor is a run begun anew beside it


@pytest.mark.parametrize("name", ["03", "9999999999", "2147483648", "9" * 250])
def test_folders_that_are_not_called_as_a_step_is_written_are_passed_over(name, sound, tmp_path, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(sound, workdir)
    shutil.copytree(workdir / "checkpoints" / "1", workdir / "checkpoints" / name)
    (workdir / "checkpoints" / "٣").mkdir()
    assert_params(workdir, 2)
    assert f"/{name}: has no valid step number as its name; it is not used" in capfd.readouterr().err


def test_the_layout_of_versions_that_were_never_released_is_no_checkpoint(sound, tmp_path, capfd):
    """It could not be verified: a changed byte gave wrong parameters."""
    workdir = tmp_path / "run"
    shutil.copytree(sound, workdir)
    newest = workdir / "checkpoints" / "2"
    (newest / "state").rename(newest / "default")
    assert_params(workdir, 1)
    assert "checkpoints/2: file default/" in capfd.readouterr().err
    (newest / MANIFEST_FILE).unlink()
    assert_params(workdir, 1)


def test_a_folder_that_cannot_be_read_or_written_is_told_in_a_line(sound, tmp_path, monkeypatch, capfd):
    """Faked, since nothing is unreadable to root."""
    workdir = tmp_path / "run"
    shutil.copytree(sound, workdir)
    names, denied = os.listdir, PermissionError(errno.EACCES, "Permission denied")

    def listdir(path):
        if str(path).endswith("/checkpoints"):
            raise denied
        return names(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", listdir)
        with pytest.raises(DataError, match=r"checkpoints: cannot be read \(Permission denied\)"):
            restore_params(workdir, abstract(state_of(0).params))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *_: False)
        with pytest.raises(DataError, match=r"checkpoints cannot be written \(Permission denied\)"):
            Checkpoints(workdir, 1)
    (workdir / "checkpoints" / "2" / "state" / "_METADATA").unlink()

    def rename(*_):
        raise denied

    with monkeypatch.context() as patch, Checkpoints(workdir, 1) as checkpoints:
        patch.setattr(pathlib.Path, "rename", rename)
        assert checkpoints.restore(abstract(state_of(0)))[1].step == 1
    assert "2: cannot be set aside (Permission denied)" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's tasks, after its errors
def test_what_agrees_with_a_manifest_and_is_no_checkpoint_is_an_error_of_one_line(sound, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(sound, workdir)
    folder = workdir / "checkpoints" / "2"
    (folder / "state" / "_METADATA").write_text("[1]")
    write_manifest(folder, dataclasses.replace(read_manifest(folder), files=hash_files(folder)))
    with pytest.raises(DataError, match=r"checkpoints/2: cannot be read \(") as caught:
        restore_params(workdir, abstract(state_of(0).params))
    assert "\n" not in str(caught.value)
    write_manifest(folder, dataclasses.replace(read_manifest(folder), validation_loss="low"))
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        read_manifest(folder)
