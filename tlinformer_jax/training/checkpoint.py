"""Checkpoints of the train state: by Orbax, with a manifest of our own (`training.manifest`) that is verified first.

`checkpoints/STEP` holds `state/` (Orbax) and `manifest.json`; the whole folder appears by one rename. Other names in
`checkpoints/` are `STEP.saving` and `STEP.deleting`, what a killed run leaves half-done and the next one removes, and
`STEP.damaged`, a checkpoint that failed its verification and was set aside by a run that went on from an older one.

Checkpoints of versions before the manifest (`STEP/default`, no `state`) are still read, with a line on stderr that
their bytes could not be verified.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import tlinformer_jax
from tlinformer_jax.config import CONFIG_FILE, fingerprint, load_config
from tlinformer_jax.errors import DataError
from tlinformer_jax.files import sync_folder
from tlinformer_jax.training.manifest import Manifest, hash_files, read_manifest, verify, write_manifest
from tlinformer_jax.training.memory import copy_on_devices
from tlinformer_jax.training.metrics import say
from tlinformer_jax.training.step import Skips, TrainState

FOLDER = "checkpoints"
STATE, OLD_STATE = "state", "default"
SAVING, DELETING, DAMAGED = ".saving", ".deleting", ".damaged"
# What process 0 tells the others where it has no step to tell.
NONE_THERE, NONE_GOOD = -1, -2


class Checkpoints:
    """The checkpoints of a working directory, for the one run that trains into it.

    Saving is asynchronous: a thread lets Orbax write, hashes the files, writes the manifest, makes the checkpoint
    appear and deletes those no longer wanted, never before there are `keep` newer ones that this run has written or
    verified.
    What is written is a copy of the state on its devices, so that training goes on while it is read from there; where
    the devices' memory may not suffice for that, or processes have to agree, training waits for the reading. Use as a
    context manager: leaving it waits for the save under way.

    Args:
      workdir: the working directory.
      keep: how many of the latest are kept.
      keep_best: how many of those with the lowest validation loss are kept besides.
      config_sha256: of the run's configuration, for the manifests.
      regular_every: steps between regular checkpoints, of which the last is kept whatever else is; 0 for none.

    Raises:
      DataError: by every method where a save has failed (disk full, say), naming it; older checkpoints stay.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        keep: int,
        keep_best: int = 0,
        config_sha256: str = "",
        regular_every: int = 0,
    ) -> None:
        self._folder = (workdir / FOLDER).absolute()
        self._keep, self._keep_best, self._config_sha256 = keep, keep_best, config_sha256
        self._regular_every = regular_every
        self._good: set[int] = set()  # written or verified by this run
        self._latest: int | None = None
        self._main = jax.process_index() == 0
        if self._main:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"workdir {workdir}: {FOLDER} cannot be written ({error.strerror})") from None
            for path in self._folder.iterdir():
                if SAVING in path.suffixes or path.name.endswith(DELETING):
                    shutil.rmtree(path, ignore_errors=True)
        # Compressing float32 saves a tenth of the bytes, and takes the processors from what feeds the devices.
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False))
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            self._settle()
        except DataError as error:
            if kind is None:
                raise
            say(f"error: {error}")  # beside the error that is under way
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def save(self, state: TrainState, overlap: bool = True) -> None:
        """Starts saving `state` under its step, if that is not saved; its arrays may be donated on return.

        Args:
          state: what is saved.
          overlap: read it while training goes on, from a copy; before the first step it is not known what that takes.
        """
        step = int(state.step)
        if step == self._latest:
            return
        self._settle()
        draft, after_skip = self._folder / f"{step}{SAVING}", int(state.skips.in_a_row) > 0
        copy = copy_on_devices(state) if overlap and jax.process_count() == 1 else None
        if copy is None:
            self._write(draft, state)
        self._latest = step
        self._pending = self._thread.submit(self._finish, step, draft, after_skip, copy)

    def restore(self, state: TrainState, regular: bool = False) -> tuple[TrainState, Manifest | None] | None:
        """The newest good state with its manifest (None for one of an older version); None if none was ever saved.

        Newer ones that are damaged are named on stderr and set aside.

        Args:
          state: abstract (jax.ShapeDtypeStruct) leaves whose shardings say where each goes.
          regular: look among the regular ones only: those that are there whenever the run was interrupted.

        Raises:
          DataError: if there are checkpoints, but none that can be used.
        """
        self._settle()
        found = newest_good(self._folder, set_aside=True, regular_every=self._regular_every if regular else 0)
        if found is None:
            return None
        fields = _fields(state)
        if found.manifest is None:
            # Versions before the manifest had no count of skipped updates.
            restored = _read(found.state, {name: fields[name] for name in ("step", "params", "opt_state")})
            return dataclasses.replace(state, **restored, skips=type(state.skips)()), None
        self._good.add(found.step)
        self._latest = found.step
        return _read_state(found.state, state), found.manifest

    def record_validation(self, step: int, loss: float) -> None:
        """Adds the validation loss to the manifest of `step`, if it is saved; deletes what is no longer wanted."""
        self._settle()
        folder = self._folder / str(step)
        if self._main and step in self._good and folder.is_dir():
            write_manifest(folder, dataclasses.replace(read_manifest(folder), validation_loss=loss))
            self._delete_unwanted()

    def is_among_best(self, loss: float) -> bool:
        """Whether a checkpoint with this validation loss would be one of those that `keep_best` keeps."""
        if self._keep_best == 0:
            return False
        self._settle()
        best = sorted(self._validation_losses().values())[: self._keep_best]
        among = len(best) < self._keep_best or loss < best[-1]
        return bool(multihost_utils.broadcast_one_to_all(np.bool_(among)))

    def _settle(self) -> None:
        """Waits for the save under way."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, draft: pathlib.Path, state: TrainState) -> None:
        """Reads the state from its devices; Orbax then goes on writing."""
        try:
            if self._main:
                draft.mkdir(exist_ok=True)
            self._orbax.save(draft / STATE, args=ocp.args.PyTreeSave(_fields(state)))
        except Exception as error:
            raise _failure(draft, error) from error

    def _finish(self, step: int, draft: pathlib.Path, after_skip: bool, state: TrainState | None) -> None:
        """What is done in the background; `state` is what is still to be written, if anything is."""
        if state is not None:
            self._write(draft, state)
        try:
            self._orbax.wait_until_finished()
            if self._main:
                files, version = hash_files(draft), tlinformer_jax.__version__
                manifest = Manifest(step, files, version, self._config_sha256, after_skip=after_skip)
                write_manifest(draft, manifest)
                draft.rename(self._folder / str(step))
                sync_folder(self._folder)
                self._good.add(step)
                self._delete_unwanted()
        except Exception as error:
            raise _failure(draft, error) from error

    def _delete_unwanted(self) -> None:
        latest = sorted(self._good)[-self._keep :]
        if len(latest) < self._keep:
            return
        losses = self._validation_losses()
        kept = sorted(losses, key=lambda step: (losses[step], step))[: self._keep_best]
        if self._regular_every:
            regular = _regular_steps(self._folder, self._regular_every)
            # The last on disk and, since that one may be damaged, the last that is known to be good.
            kept += regular[:1] + [step for step in regular if step in self._good][:1]
        for step in _steps(self._folder):
            if step < latest[0] and step not in kept:
                # Renamed first, so that a half-deleted folder is never taken for a damaged checkpoint.
                gone = (self._folder / str(step)).rename(self._folder / f"{step}{DELETING}")
                shutil.rmtree(gone, ignore_errors=True)
                self._good.discard(step)

    def _validation_losses(self) -> dict[int, float]:
        """Step -> validation loss of those saved steps that have one."""
        losses = {}
        for step in _steps(self._folder):
            try:
                loss = read_manifest(self._folder / str(step)).validation_loss
            except DataError:
                continue
            if loss is not None and math.isfinite(loss):
                losses[step] = loss
        return losses


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint that can be used: its step, Orbax's folder, and the manifest; None for one of an older version."""

    step: int
    state: pathlib.Path
    manifest: Manifest | None


def newest_good(folder: pathlib.Path, set_aside: bool = False, regular_every: int = 0) -> Found | None:
    """The newest checkpoint in `folder` that passes its verification; None if there is none at all.

    Process 0 looks, all others are told. Those that fail are named on stderr.

    Args:
      folder: `checkpoints` of a working directory.
      set_aside: rename those that fail to STEP.damaged; for the run that trains here only.
      regular_every: above 0, look among the regular checkpoints of this distance only.

    Raises:
      DataError: if there are checkpoints, but none that can be used.
    """
    step = NONE_THERE
    if jax.process_index() == 0:
        steps = _regular_steps(folder, regular_every) if regular_every else _steps(folder)
        damaged = list(itertools.takewhile(lambda step: not _usable(folder / str(step)), steps))
        if len(damaged) < len(steps):
            step = steps[len(damaged)]
        elif steps:
            step = NONE_GOOD
        if set_aside and step >= 0:
            for number in damaged:
                _set_aside(folder / str(number))
    step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if step == NONE_GOOD:
        raise DataError(f"{folder}: none of its checkpoints can be used; see the lines above")
    if step == NONE_THERE:
        return None
    return _found(folder, step)


def restore_params(workdir: pathlib.Path, abstract_params: Any, step: int | None = None) -> tuple[int, Any]:
    """Parameters alone of the newest checkpoint that passes its verification, as (step, params).

    Nothing is written; newer ones that are damaged are named on stderr, and a configuration that has changed since.

    Args:
      workdir: a working directory.
      abstract_params: jax.ShapeDtypeStruct leaves with shardings.
      step: take the checkpoint of this step and no other.

    Raises:
      DataError: if the directory holds no checkpoint that can be used, or not the one that was asked for.
    """
    folder = workdir / FOLDER
    if not folder.is_dir():
        raise DataError(f"workdir {workdir}: holds no checkpoint; train into it first")
    if step is not None:
        steps = _steps(folder)
        if step not in steps:
            there = ", ".join(map(str, reversed(steps))) or "none"
            raise DataError(f"workdir {workdir}: holds no checkpoint of step {step}; there are {there}")
        if not _usable(folder / str(step)):
            raise DataError(f"workdir {workdir}: the checkpoint of step {step} cannot be used; see the line above")
        found: Found | None = _found(folder, step)
    else:
        found = newest_good(folder)
    if found is None:
        raise DataError(f"workdir {workdir}: holds no finished checkpoint; train into it first")
    _tell_changed_config(workdir, found)
    return found.step, _read(found.state, {"params": abstract_params})["params"]


def _tell_changed_config(workdir: pathlib.Path, found: Found) -> None:
    """Says so where the directory's configuration is not the one that the checkpoint was written with."""
    written = found.manifest.config_sha256 if found.manifest else ""
    if written and (workdir / CONFIG_FILE).exists() and written != fingerprint(load_config(workdir)):
        say(f"checkpoint {workdir / FOLDER / str(found.step)}: {CONFIG_FILE} has changed since it was written")


def _steps(folder: pathlib.Path) -> list[int]:
    """The steps that have a folder, the newest first."""
    return sorted(
        (int(path.name) for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()), reverse=True
    )


def _regular_steps(folder: pathlib.Path, every: int) -> list[int]:
    """The multiples of `every` among the steps, the newest first; without those that were saved amid bad updates."""
    found = []
    for step in _steps(folder):
        if step % every == 0:
            with contextlib.suppress(DataError):
                found += [] if read_manifest(folder / str(step)).after_skip else [step]
    return found


def _usable(path: pathlib.Path) -> bool:
    """Whether the checkpoint in `path` passes its verification; says so if not."""
    if _is_old(path):
        say(f"checkpoint {path}: written by a version without manifests; its bytes cannot be verified")
        return True
    try:
        verify(path)
    except DataError as error:
        print(f"{error}; it is not used", file=sys.stderr, flush=True)
        return False
    return True


def _set_aside(path: pathlib.Path) -> None:
    """Renames a damaged checkpoint, so that its step can be saved anew."""
    number = sum(other.name.startswith(f"{path.name}{DAMAGED}") for other in path.parent.iterdir())
    place = path.rename(path.with_name(f"{path.name}{DAMAGED}{f'-{number}' if number else ''}"))
    print(f"checkpoint {path}: set aside as {place.name}", file=sys.stderr, flush=True)


def _found(folder: pathlib.Path, step: int) -> Found:
    """The checkpoint of a step that has passed its verification."""
    here = folder / str(step)
    return Found(step, here / OLD_STATE, None) if _is_old(here) else Found(step, here / STATE, read_manifest(here))


def _is_old(path: pathlib.Path) -> bool:
    """Whether a step's folder is laid out as by versions without manifests."""
    return (path / OLD_STATE).is_dir() and not (path / STATE).exists()


def _fields(state: TrainState) -> dict[str, Any]:
    """The state as a plain mapping, the form in which it is saved; without what the run does not have."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if value is not None}


def _read(folder: pathlib.Path, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a checkpoint that `tree` names, each by its leaf's shape, dtype and sharding."""
    how = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding), dict(tree))
    with ocp.PyTreeCheckpointer() as checkpointer:
        return checkpointer.restore(
            folder.absolute(),
            args=ocp.args.PyTreeRestore(item=dict(tree), restore_args=how, partial_restore=True),
        )


def _read_state(folder: pathlib.Path, state: TrainState) -> TrainState:
    """A whole state; of one that was saved before there were rollbacks, their number is 0."""
    fields = _fields(state)
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder.absolute()).item_metadata.tree["skips"]
    missing = {field.name for field in dataclasses.fields(Skips)} - set(saved)
    fields["skips"] = {
        field.name: getattr(state.skips, field.name) for field in dataclasses.fields(Skips) if field.name not in missing
    }
    read = _read(folder, fields)
    read["skips"] = Skips(**read["skips"])
    return TrainState(**read)


def _failure(draft: pathlib.Path, error: Exception) -> DataError:
    """What to say of a save that did not succeed."""
    reason = str(error).strip().splitlines()
    return DataError(f"checkpoint {draft}: cannot be written ({reason[0] if reason else type(error).__name__})")
