"""Saves a run's checkpoints while it trains, and deletes old ones.

Besides `checkpoints/STEP` there are `STEP.saving` and `STEP.deleting`, which a killed run may leave behind and the next
run removes, and `STEP.damaged`: a checkpoint that failed verification, or a path that was in the way of a new one.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import tlinformer_jax
from tlinformer_jax.errors import DataError, first_line
from tlinformer_jax.files import own_folder, plain_path, sync_folder, writing
from tlinformer_jax.training import checkpoint as stored
from tlinformer_jax.training.checkpoint import FOLDER, STATE, Manifest, read_manifest
from tlinformer_jax.training.console import say
from tlinformer_jax.training.device_memory import is_out_of_memory
from tlinformer_jax.training.step import TrainState

SAVING, DELETING = ".saving", ".deleting"
# Seconds after which Orbax gives up a save, even if the clock has jumped: a day with several processes.
TIMEOUT, TIMEOUT_DISTRIBUTED = 100 * 365 * 86_400, 86_400


class Checkpoints(contextlib.AbstractContextManager["Checkpoints"]):
    """The checkpoints of a working directory, for the one run that trains into it.

    A thread lets Orbax write, hashes the files, writes the manifest, renames the checkpoint to its final name and
    deletes older ones. The thread reads a copy of the state on its devices. If there may be no memory for a copy, or
    with several processes, training waits until the state is read.

    Args:
      keep: number of latest checkpoints to keep, among those that this run wrote or verified.
      keep_best: number of checkpoints with the lowest validation loss to keep in addition.
      config_sha256: hash of the run's configuration, for the manifests.
      regular: updates between the checkpoints that a rollback may return to, the last of which is always kept; 0: none.
    """

    def __init__(
        self, workdir: pathlib.Path, keep: int, keep_best: int = 0, config_sha256: str = "", regular: int = 0
    ) -> None:
        self._folder = (workdir / FOLDER).absolute()
        self._keep, self._keep_best, self._config_sha256, self._regular = keep, keep_best, config_sha256, regular
        self._good: set[int] = set()  # written or verified by this run
        self._latest: int | None = None
        self._main = jax.process_index() == 0
        if self._main:
            with writing(f"workdir {workdir}: {FOLDER}"):
                _clear(self._folder)
        timeout = TIMEOUT if jax.process_count() == 1 else TIMEOUT_DISTRIBUTED
        self._orbax = ocp.AsyncCheckpointer(
            # Compressing float32 saves a tenth of the bytes, and takes CPU time from the input pipeline.
            ocp.PyTreeCheckpointHandler(use_compression=False),
            # Orbax waits only briefly for folders that are made in the background.
            async_options=ocp.options.AsyncOptions(timeout_secs=timeout, create_directories_asynchronously=False),
        )
        self._opened = contextlib.ExitStack()
        self._plain: pathlib.Path | None = None  # the folder's path for Orbax; set by the first save
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            self._wait()
        except DataError as error:
            if kind is None:
                raise
            say(f"error: {error}")  # do not replace the exception that ends the run
        finally:
            self._thread.shutdown()
            self._orbax.close()
            self._opened.close()

    def save(self, state: TrainState) -> None:
        """Starts saving `state` under its step; the caller may donate its arrays on return."""
        step = int(state.step)
        if step == self._latest:
            return
        self._wait()
        draft, after_skip = self._folder / f"{step}{SAVING}", int(state.skips.in_a_row) > 0
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _fields(state))
        # Before the first update it is not known how much memory an update needs beside a copy.
        copy = copy_on_devices(state) if step and jax.process_count() == 1 else None
        if copy is None:
            self._write(draft, state)
        self._latest = step
        self._pending = self._thread.submit(self._finish, draft, shapes, after_skip, copy)

    def restore(self, state: TrainState, regular: bool = False) -> tuple[TrainState, Manifest] | None:
        """Returns the newest intact state with its manifest, None if none was saved; sets newer damaged ones aside.

        `state` has jax.ShapeDtypeStruct leaves with shardings. With `regular`, for a rollback, only regular checkpoints
        count; these do not depend on where a run was interrupted.
        """
        self._wait()
        found = stored.newest_good(self._folder, set_aside=True, every=self._regular if regular else 0)
        if found is None:
            return None
        self._good.add(found.step)
        self._latest = found.step
        return TrainState(**stored.read_arrays(self._folder / str(found.step), _fields(state))), found

    def record_validation(self, step: int, loss: float) -> None:
        """Adds the validation loss to the manifest of `step`, if this step is saved."""
        self._wait()
        folder = self._folder / str(step)
        if self._main and step in self._good and folder.is_dir():
            stored.write_manifest(folder, dataclasses.replace(read_manifest(folder), validation_loss=loss))
            self._delete_unwanted()

    def is_among_best(self, loss: float) -> bool:
        """Returns whether `keep_best` would keep a checkpoint with this loss."""
        if self._keep_best == 0:
            return False
        self._wait()
        best = sorted(stored.validation_losses(self._folder).values())[: self._keep_best]
        among = len(best) < self._keep_best or loss < best[-1]
        return bool(multihost_utils.broadcast_one_to_all(np.bool_(among)))

    def _wait(self) -> None:
        """Waits for the running save."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, draft: pathlib.Path, state: TrainState) -> None:
        """Reads the state from its devices; Orbax then continues to write."""
        try:
            if self._main:
                own_folder(draft)
            if self._plain is None:
                self._plain = self._opened.enter_context(plain_path(self._folder))
            self._orbax.save(self._plain / draft.name / STATE, args=ocp.args.PyTreeSave(_fields(state)))
        except Exception as error:
            raise DataError(f"checkpoint {draft}: cannot be written ({first_line(error)})") from error

    def _finish(self, draft: pathlib.Path, shapes: dict[str, Any], after_skip: bool, state: TrainState | None) -> None:
        """Finishes a save in the thread; writes `state` first if given."""
        if state is not None:
            self._write(draft, state)
        try:
            self._orbax.wait_until_finished()
            if self._main:
                if fault := stored.misfit(draft, shapes, ("shape", "dtype")):
                    raise OSError(f"read back, {fault}")
                step, version, final = int(draft.stem), tlinformer_jax.__version__, draft.with_suffix("")
                hashes = stored.hash_files(draft)
                manifest = Manifest(step, hashes, version, self._config_sha256, after_skip=after_skip)
                stored.write_manifest(draft, manifest)
                if os.path.lexists(final):
                    stored.set_aside_damaged(final)
                draft.rename(final)
                sync_folder(self._folder)
                self._good.add(step)
                self._delete_unwanted()
        except Exception as error:
            raise DataError(f"checkpoint {draft}: cannot be written ({first_line(error)})") from error

    def _delete_unwanted(self) -> None:
        latest = sorted(self._good)[-self._keep :]
        if len(latest) < self._keep:
            return
        losses = stored.validation_losses(self._folder)
        kept = sorted(losses, key=lambda step: (losses[step], step))[: self._keep_best]
        if self._regular:
            regular = stored.regular_steps(self._folder, self._regular)
            # The last on disk and, because that may be damaged, the last known to be intact.
            kept += regular[:1] + [step for step in regular if step in self._good][:1]
        for step in stored.list_steps(self._folder)[0]:
            if step < latest[0] and step not in kept:
                # Renamed first, or a half-deleted folder would look like a damaged checkpoint.
                gone = (self._folder / str(step)).rename(self._folder / f"{step}{DELETING}")
                shutil.rmtree(gone, ignore_errors=True)
                self._good.discard(step)


def _clear(folder: pathlib.Path) -> None:
    """Creates the folder, or removes what a killed run has left half-done in it."""
    own_folder(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    with plain_path(folder):
        pass  # raises now, before training, if the folder has no such path
    for path in folder.iterdir():
        if SAVING in path.suffixes or path.name.endswith(DELETING):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            else:
                shutil.rmtree(path)


def copy_on_devices(tree: Any) -> Any:
    """Copies a pytree on its devices; returns None if there may be no memory for it."""
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    for device in jax.local_devices():
        stats = device.memory_stats()
        size = sum(shard.data.nbytes for shard in shards if shard.device == device)
        limit = (stats or {}).get("bytes_limit")
        if stats and (limit is None or stats.get("peak_bytes_in_use", limit) + size > limit):
            return None
    try:
        return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding, may_alias=False), tree)
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):  # enough room, but fragmented
            return None
        raise


def _fields(state: TrainState) -> dict[str, Any]:
    """Returns the state as the mapping that is saved, without None values."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if value is not None}
