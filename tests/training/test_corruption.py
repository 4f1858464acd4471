"""Damage to a real run's working directory: detected with a message and the older checkpoint used, or harmless."""

import json
import os
import pathlib
import shutil
import zlib

import jax
import numpy as np
import pytest

from tests.training.test_resume import run_config
from tlinformer_jax.config.run import CONFIG_FILE, load_config
from tlinformer_jax.data.tokenizers import load_tokenizer
from tlinformer_jax.errors import DataError, UserError
from tlinformer_jax.training import checkpoint as checkpoint_module
from tlinformer_jax.training.checkpoint import (
    MANIFEST_FILE,
    Manifest,
    hash_files,
    read_manifest,
    restore_params,
    verify,
    write_manifest,
)
from tlinformer_jax.training.loop import train_and_evaluate
from tlinformer_jax.training.saving import Checkpoints
from tlinformer_jax.training.setup import build_run


def flipped(data: bytes, place: int) -> bytes:
    """One bit of the byte at `place` changed; which one depends on the place."""
    return data[:place] + bytes([data[place] ^ (1 << place % 8)]) + data[place + 1 :]


@pytest.fixture
def small(tmp_path) -> pathlib.Path:
    folder = tmp_path / "12"
    folder.mkdir()
    (folder / "data").write_bytes(b"some bytes")
    write_manifest(folder, Manifest(12, hash_files(folder), "1.0", "c0ffee", 1.25))
    return folder


def test_a_manifest_with_any_byte_flipped_or_cut_off_anywhere_is_refused_or_says_the_same(small):
    sound, path = read_manifest(small), small / MANIFEST_FILE
    text = path.read_bytes()
    refused = 0
    for wrong in (
        *(flipped(text, place) for place in range(len(text))),
        *(text[:size] for size in range(len(text))),
    ):
        path.write_bytes(wrong)
        try:
            assert verify(small) == sound
        except DataError:
            refused += 1
    assert refused == 2 * len(text)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of six steps with checkpoints of steps 3, 5 and 6: configuration, workdir, abstract and true states."""
    folder = tmp_path_factory.mktemp("trained")
    config = run_config(folder)
    train_and_evaluate(config, folder / "run")
    run = build_run(config, load_tokenizer(folder / "run"))
    states = {}
    for step in ("6", "5"):
        workdir = folder / step
        shutil.copytree(folder / "run" / "checkpoints" / step, workdir / "checkpoints" / step)
        with Checkpoints(workdir, 9) as checkpoints:
            states[int(step)] = checkpoints.restore(run.abstract_state)[0]
    jax.tree.map(np.testing.assert_array_equal, states[6].step, 6)
    return config, folder / "run", run.abstract_state, states


def damages(name: str, data: bytes) -> dict[str, bytes]:
    """Contents of a file that is cut off at its end or middle, or changed at a place that depends on its name."""
    place = int(np.random.default_rng(zlib.crc32(name.encode())).integers(len(data)))
    return {"cut off": data[:-1], "cut in half": data[: len(data) // 2], f"flipped at {place}": flipped(data, place)}


@pytest.mark.slow
def test_no_damage_of_any_file_of_a_checkpoint_gives_a_wrong_parameter(trained, tmp_path, capfd):
    """By both ways to read one: parameters alone, and the whole state to train on."""
    _, sound, abstract, states = trained
    newest, cases = sound / "checkpoints" / "6", 0
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        name = path.relative_to(sound)
        for damage, wrong in damages(str(name), path.read_bytes()).items():
            workdir = tmp_path / f"{cases}"
            shutil.copytree(sound, workdir)
            (workdir / name).write_bytes(wrong)
            step, params = restore_params(workdir, abstract.params)
            told = capfd.readouterr().err
            assert (step, path.name in told) == (5, True), f"{name} {damage}: {told}"
            jax.tree.map(np.testing.assert_array_equal, params, states[5].params)
            with Checkpoints(workdir, 2) as checkpoints:
                state, manifest = checkpoints.restore(abstract)
            assert manifest.step == 5
            jax.tree.map(np.testing.assert_array_equal, state, states[5])
            told = capfd.readouterr().err
            assert (path.name in told, "set aside as 6.damaged" in told) == (True, True), f"{name} {damage}: {told}"
            shutil.rmtree(workdir)
            cases += 1
    assert cases >= 27
    print(f"{cases} cases")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's tasks, after its errors
def test_without_the_manifest_some_damage_would_give_wrong_parameters_silently(trained, tmp_path, monkeypatch):
    """What the test above looks for happens where nothing is verified."""
    _, sound, abstract, states = trained
    monkeypatch.setattr(checkpoint_module, "verify", read_manifest)
    outcomes = []
    for path in sorted((sound / "checkpoints" / "6" / "state").rglob("d/*")):
        data = path.read_bytes()
        for place in np.linspace(0, len(data) - 1, 12).astype(int) if len(data) > 10_000 else ():
            workdir = tmp_path / f"{path.name}-{place}"
            shutil.copytree(sound, workdir)
            (workdir / path.relative_to(sound)).write_bytes(flipped(data, int(place)))
            try:
                step, params = restore_params(workdir, abstract.params)
            except Exception as error:
                outcomes.append(type(error).__name__)
                continue
            assert step == 6
            same = jax.tree.all(jax.tree.map(np.array_equal, params, states[6].params))
            outcomes.append("the same" if same else "wrong")
    assert "wrong" in outcomes, outcomes


@pytest.mark.slow
def test_a_configuration_that_has_changed_since_the_checkpoint_is_told_or_refused(trained, tmp_path, capfd):
    config, sound, abstract, states = trained
    workdir = tmp_path / "run"
    shutil.copytree(sound, workdir)
    text = (workdir / CONFIG_FILE).read_bytes()
    restore_params(workdir, abstract.params)
    assert capfd.readouterr().err == ""
    outcomes = {"same": 0, "refused": 0, "told": 0}
    for place in range(0, len(text), 7):
        (workdir / CONFIG_FILE).write_bytes(flipped(text, place))
        try:
            changed = load_config(workdir) != config
        except UserError as error:
            outcomes["refused"] += "\n" not in str(error)
            continue
        _, params = restore_params(workdir, abstract.params)
        jax.tree.map(np.testing.assert_array_equal, params, states[6].params)
        assert ("config.json has changed since it was written" in capfd.readouterr().err) == changed, place
        outcomes["told" if changed else "same"] += 1
    assert outcomes["refused"] > 100
    assert outcomes["told"] > 0, outcomes


@pytest.mark.slow
def test_a_tokenizer_file_with_any_byte_flipped_is_the_same_or_refused(trained, tmp_path):
    _, sound, *_ = trained
    tokenizer = load_tokenizer(sound)
    (name,) = (file.name for file in sound.iterdir() if "tokenizer" in file.name)
    path = tmp_path / name
    text = (sound / name).read_bytes()
    refused = 0
    for place in range(len(text)):
        path.write_bytes(flipped(text, place))
        try:
            found = load_tokenizer(tmp_path)
            assert (found.name, found.encode("aé")) == (tokenizer.name, tokenizer.encode("aé"))
        except DataError:
            refused += 1
    assert refused > len(text) // 2
    assert json.loads(text)
    assert os.listdir(tmp_path) == [name]
