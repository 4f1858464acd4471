"""Checkpoints of the train state, by Orbax."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from tlinformer_jax.errors import DataError
from tlinformer_jax.training.step import TrainState

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of a working directory; saving is asynchronous and atomic.

    Use as a context manager: leaving it waits for saves under way.
    """

    def __init__(self, workdir: pathlib.Path, keep: int | None = None) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=keep is not None)
        self._manager = ocp.CheckpointManager((workdir / FOLDER).absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def latest_step(self) -> int | None:
        """The last saved step, or None."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Starts saving `state` under its step; its arrays may be donated as soon as this returns."""
        step = int(state.step)
        if step != self._manager.latest_step():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, state: TrainState) -> TrainState:
        """The last saved state.

        Args:
          state: abstract (jax.ShapeDtypeStruct) leaves whose shardings say where each goes.
        """
        return self._manager.restore(self._manager.latest_step(), args=ocp.args.StandardRestore(state))


def restore_params(workdir: pathlib.Path, abstract_params: Any) -> tuple[int, Any]:
    """Parameters alone of the last checkpoint, as (step, params).

    Args:
      workdir: a working directory.
      abstract_params: jax.ShapeDtypeStruct leaves with shardings.

    Raises:
      DataError: if the directory holds no checkpoint.
    """
    folder = workdir / FOLDER
    if not folder.is_dir():
        raise DataError(f"workdir {workdir}: holds no checkpoint; train into it first")
    with Checkpoints(workdir) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise DataError(f"workdir {workdir}: holds no finished checkpoint; train into it first")
    restore_args = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding), abstract_params)
    with ocp.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(
            (folder / str(step) / "default").absolute(),
            args=ocp.args.PyTreeRestore(
                item={"params": abstract_params}, restore_args={"params": restore_args}, partial_restore=True
            ),
        )
    return step, restored["params"]
