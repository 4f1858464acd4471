"""A run that is taken up on another number, or another shape, of devices."""

import dataclasses
import shutil

import jax
import pytest

from tests.training.test_resume import events, run_config
from tlinformer_jax.parallel.sharding import build_mesh
from tlinformer_jax.training import callbacks, setup
from tlinformer_jax.training.loop import train_and_evaluate

pytestmark = pytest.mark.slow
LOSSES = ("train/loss", "eval/loss")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A configuration over 8 devices, what the whole run logs, and a directory that crashed after step 3 of 6."""
    folder = tmp_path_factory.mktemp("devices")
    # Without accumulation: each of 8 devices has rows of its own, whose dropout must not depend on where they are.
    often = {"log_every": 1, "eval_every": 3, "checkpoint_every": 3, "keep_checkpoints": 2}
    config = run_config(folder, dropout=0.1, **often, accumulation=1, mesh="fsdp=2")
    train_and_evaluate(config, folder / "whole")
    log_step = callbacks.log_step

    def crashing(log, step, *rest):
        log_step(log, step, *rest)
        if step == 4:
            raise RuntimeError("crash")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "log_step", crashing)
        with pytest.raises(RuntimeError, match="crash"):
            train_and_evaluate(config, folder / "stopped")
    return config, events(folder / "whole"), folder / "stopped"


@pytest.mark.parametrize(("devices", "mesh"), [(8, ""), (2, "fsdp=2"), (1, "")])
def test_a_run_on_eight_devices_goes_on_with_others_and_the_losses_are_the_same(
    devices, mesh, stopped, tmp_path, monkeypatch, capfd
):
    config, whole, workdir = stopped
    shutil.copytree(workdir, tmp_path / "run")
    monkeypatch.setattr(setup, "build_mesh", lambda axes, _: build_mesh(axes, jax.devices()[:devices]))
    train = dataclasses.replace(config.train, mesh=mesh)
    train_and_evaluate(dataclasses.replace(config, train=train), tmp_path / "run")
    assert "continuing from step 3" in capfd.readouterr().err
    found = events(tmp_path / "run")
    assert [event["step"] for event in found] == [event["step"] for event in whole] == [1, 2, 3, 3, 4, 5, 6, 6]
    for mine, other in zip(found, whole, strict=True):
        for name in mine.keys() & set(LOSSES):
            assert mine[name] == pytest.approx(other[name], abs=1e-5), (mine["step"], name)
