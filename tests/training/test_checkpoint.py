"""Checkpoints on disk: whatever happens to their files, what is restored is right, and what is not is named."""

import errno
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tlinformer_jax.errors import DataError
from tlinformer_jax.training import saving
from tlinformer_jax.training.checkpoint import read_manifest, restore_params
from tlinformer_jax.training.saving import Checkpoints, copy_on_devices
from tlinformer_jax.training.step import Skips, TrainState

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def state_of(step: int) -> TrainState:
    """A state all of whose arrays tell its step."""
    rng = np.random.default_rng(step)
    params = {"embedding": jnp.asarray(rng.standard_normal((7, 5)), jnp.float32), "block": {"bias": jnp.full(3, step)}}
    moments = jax.tree.map(lambda leaf: leaf + step, OPTIMIZER.init(params))
    return TrainState(jnp.int32(step), params, moments, Skips(total=jnp.int32(step)))


def abstract(tree):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), tree)


def write(workdir: pathlib.Path, *steps: int, keep: int = 9) -> None:
    with Checkpoints(workdir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(step))


def assert_params(workdir: pathlib.Path, step: int) -> None:
    """What evaluation and generation restore is exactly the state of `step`."""
    found, params = restore_params(workdir, abstract(state_of(0).params))
    assert found == step
    jax.tree.map(np.testing.assert_array_equal, params, state_of(step).params)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> pathlib.Path:
    """A working directory with sound checkpoints of steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("sound")
    write(workdir, 1, 2)
    return workdir


def truncate(path: pathlib.Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: pathlib.Path) -> None:
    os.truncate(path, 0)


def flip(part: float):
    def damage(path: pathlib.Path) -> None:
        data = bytearray(path.read_bytes())
        data[int(part * (len(data) - 1))] ^= 1
        path.write_bytes(data)

    return damage


DAMAGES = {
    "truncated": truncate,
    "emptied": empty,
    "first byte": flip(0),
    "a byte in it": flip(0.37),
    "middle byte": flip(0.5),
    "last byte": flip(1),
    "missing": pathlib.Path.unlink,
    "another beside it": lambda path: path.with_name(path.name + "x").write_bytes(path.read_bytes()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_every_file_is_named_and_the_older_checkpoint_used(damage, sound, tmp_path, capfd):
    names = [path.relative_to(sound) for path in (sound / "checkpoints" / "2").rglob("*") if path.is_file()]
    assert len(names) > 8
    for number, name in enumerate(names):
        workdir = tmp_path / str(number)
        shutil.copytree(sound, workdir)
        DAMAGES[damage](workdir / name)
        assert_params(workdir, 1)
        told = capfd.readouterr().err.strip()
        assert len(told.splitlines()) == 1, told
        assert told.startswith(f"checkpoint {workdir}/checkpoints/2: ")
        assert name.name in told
        assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"], "readers change nothing"


def test_a_step_that_is_asked_for_is_that_or_an_error(sound, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(sound, workdir)
    shape = abstract(state_of(0).params)
    step, params = restore_params(workdir, shape, 1)
    assert step == 1
    jax.tree.map(np.testing.assert_array_equal, params, state_of(1).params)
    with pytest.raises(DataError, match=r"no checkpoint of step 3, only of 1, 2"):
        restore_params(workdir, shape, 3)
    flip(0.5)(workdir / "checkpoints" / "2" / "state" / "_METADATA")
    with pytest.raises(DataError, match=r"checkpoint of step 2 cannot be used"):
        restore_params(workdir, shape, 2)


def test_an_empty_folder_or_another_steps_is_no_checkpoint(sound, tmp_path, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(sound, workdir)
    (workdir / "checkpoints" / "9").mkdir()
    shutil.copytree(workdir / "checkpoints" / "1", workdir / "checkpoints" / "8")
    assert_params(workdir, 2)
    told = capfd.readouterr().err
    assert "checkpoints/9: has no readable manifest.json" in told
    assert "checkpoints/8: manifest.json belongs to step 1" in told


def test_where_no_checkpoint_is_good_nothing_is_used_renamed_or_begun_anew(sound, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(sound, workdir)
    for step in "12":
        flip(0.5)(workdir / "checkpoints" / step / "state" / "_METADATA")
    for _ in range(2):
        with pytest.raises(DataError, match="has no usable checkpoint"):
            restore_params(workdir, abstract(state_of(0).params))
        with Checkpoints(workdir, 1) as checkpoints, pytest.raises(DataError, match="has no usable checkpoint"):
            checkpoints.restore(abstract(state_of(0)))
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2"]


def test_training_goes_on_from_the_older_one_and_can_save_the_damaged_step_anew(sound, tmp_path, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(sound, workdir)
    for time in range(2):
        flip(0.5)(workdir / "checkpoints" / "2" / "state" / "_METADATA")
        with Checkpoints(workdir, 9) as checkpoints:
            restored, manifest = checkpoints.restore(abstract(state_of(0)))
            jax.tree.map(np.testing.assert_array_equal, restored, state_of(1))
            assert manifest.step == 1
            checkpoints.save(state_of(2))
        assert f"set aside as 2.damaged{'-1' if time else ''}" in capfd.readouterr().err
        assert_params(workdir, 2)


def test_what_a_kill_left_half_done_is_ignored_and_cleared_by_the_next_run(sound, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(sound, workdir)
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "2" / "state", folder / "3.saving" / "state")  # killed before the manifest
    (folder / "1").rename(folder / "1.deleting")
    (folder / "1.deleting" / "manifest.json").unlink()
    assert_params(workdir, 2)
    with Checkpoints(workdir, 1) as checkpoints:
        assert checkpoints.restore(abstract(state_of(0)))[1].step == 2
    assert [path.name for path in folder.iterdir()] == ["2"]


def test_a_failed_save_is_an_error_and_costs_no_older_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving.stored, "write_manifest", full)
    with pytest.raises(DataError, match=r"2\.saving: cannot be written .*No space left"):
        write(tmp_path, 2, keep=1)
    assert_params(tmp_path, 1)


class Device:
    """A device whose memory is nearly full."""

    def memory_stats(self):
        return {"peak_bytes_in_use": 90, "bytes_limit": 80}


@pytest.mark.parametrize("room", [True, False])
def test_what_is_saved_is_the_state_at_that_moment_though_its_memory_is_used_again(room, tmp_path, monkeypatch):
    if not room:
        monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    state = state_of(3)
    assert (copy_on_devices(state) is None) is not room
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf * 0 - 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state)
        overwrite(state)
        assert state.params["embedding"].is_deleted() or not room  # what is read in place is not given away
    assert_params(tmp_path, 3)


def test_the_latest_and_the_best_are_kept(tmp_path):
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: 4.0, 10: 0.5}
    left = {2: "2", 4: "2 4", 6: "4 6", 8: "4 6 8", 10: "8 10"}
    for step, loss in losses.items():
        # A run a step: what an earlier run has saved counts too.
        with Checkpoints(tmp_path, keep=2, keep_best=1, config_sha256="c0ffee") as checkpoints:
            checkpoints.restore(abstract(state_of(0)))
            best = [losses[before] for before in losses if before < step]
            assert checkpoints.is_among_best(loss) == (not best or loss < min(best))
            checkpoints.save(state_of(step))
            checkpoints.record_validation(step, loss)
        steps = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
        assert " ".join(map(str, steps)) == left[step]
    manifest = read_manifest(tmp_path / "checkpoints" / "10")
    assert (manifest.validation_loss, manifest.config_sha256) == (0.5, "c0ffee")
    assert_params(tmp_path, 10)


def test_older_ones_go_only_when_enough_newer_ones_are_known_to_be_good(tmp_path):
    write(tmp_path, 1, 2, 3)
    left = {4: "1 2 3 4", 5: "3 4 5", 6: "4 5 6"}  # of those before 4, the new run has verified 3 alone
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.restore(abstract(state_of(0)))
        for step, names in left.items():
            checkpoints.save(state_of(step))
            checkpoints.record_validation(step, 1.0)
            assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names.split()
