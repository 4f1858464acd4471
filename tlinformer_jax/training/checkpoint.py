"""Checkpoints of the train state: by Orbax, with a manifest of our own (`training.manifest`) that is verified first.

`checkpoints/STEP` holds `state/` (Orbax) and `manifest.json`; the whole folder appears by one rename. Other names in
`checkpoints/` are `STEP.saving` and `STEP.deleting`, what a killed run leaves half-done and the next one removes, and
`STEP.damaged`, a checkpoint that failed its verification and was set aside by a run that went on from an older one,
or whatever else had the name under which a checkpoint was to appear.

Nothing is read or written through a link below the working directory. What is passed over is named on stderr.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import itertools
import math
import os
import pathlib
import re
import shutil
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import tlinformer_jax
from tlinformer_jax.config import CONFIG_FILE, fingerprint, load_config
from tlinformer_jax.errors import DataError
from tlinformer_jax.files import own_folder, plain_path, sync_folder
from tlinformer_jax.models.config import ModelConfig
from tlinformer_jax.training.arrays import STATE, first_line, misfit, read_arrays, stored_shapes
from tlinformer_jax.training.manifest import Manifest, hash_files, read_manifest, verify, write_manifest
from tlinformer_jax.training.memory import copy_on_devices
from tlinformer_jax.training.metrics import say
from tlinformer_jax.training.step import TrainState

FOLDER = "checkpoints"
SAVING, DELETING, DAMAGED = ".saving", ".deleting", ".damaged"
# What process 0 tells the others where it has no step to tell.
NONE_THERE, NONE_GOOD = -1, -2
STEP = re.compile(r"0|[1-9][0-9]{0,9}")
LAST_STEP = 2**31 - 1
# Orbax measures how long a save takes by the wall clock, and gives it up when that has jumped by this many seconds. For
# several processes, of which one may hang, it is a day; for one, a century.
PATIENCE, PATIENCE_TOGETHER = 100 * 365 * 86_400, 86_400


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
                _clear(self._folder)
            except OSError as error:
                raise DataError(f"workdir {workdir}: {FOLDER} cannot be written ({error.strerror})") from None
        patience = PATIENCE if jax.process_count() == 1 else PATIENCE_TOGETHER
        self._orbax = ocp.AsyncCheckpointer(
            # Compressing float32 saves a tenth of the bytes, and takes the processors from what feeds the devices.
            ocp.PyTreeCheckpointHandler(use_compression=False),
            # Folders that are made in the background are waited for by the wall clock too, and never for long.
            async_options=ocp.options.AsyncOptions(timeout_secs=patience, create_directories_asynchronously=False),
        )
        self._opened = contextlib.ExitStack()
        self._plain: pathlib.Path | None = None  # the folder as Orbax is given it, from the first save on
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
            self._opened.close()

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
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _fields(state))
        copy = copy_on_devices(state) if overlap and jax.process_count() == 1 else None
        if copy is None:
            self._write(draft, state)
        self._latest = step
        self._pending = self._thread.submit(self._finish, draft, shapes, after_skip, copy)

    def restore(self, state: TrainState, regular: bool = False) -> tuple[TrainState, Manifest] | None:
        """The newest good state with its manifest; None if none was ever saved.

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
        self._good.add(found.step)
        self._latest = found.step
        return TrainState(**read_arrays(self._folder / str(found.step), _fields(state))), found

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
                own_folder(draft)
            if self._plain is None:
                self._plain = self._opened.enter_context(plain_path(self._folder))
            self._orbax.save(self._plain / draft.name / STATE, args=ocp.args.PyTreeSave(_fields(state)))
        except Exception as error:
            raise _failure(draft, error) from error

    def _finish(self, draft: pathlib.Path, shapes: dict[str, Any], after_skip: bool, state: TrainState | None) -> None:
        """What is done in the background; `state` is what is still to be written, if anything is."""
        if state is not None:
            self._write(draft, state)
        try:
            self._orbax.wait_until_finished()
            if self._main:
                if fault := misfit(draft, shapes, ("shape", "dtype")):
                    raise OSError(f"read back, {fault}")
                step, version = int(draft.stem), tlinformer_jax.__version__
                manifest = Manifest(step, hash_files(draft), version, self._config_sha256, after_skip=after_skip)
                write_manifest(draft, manifest)
                if os.path.lexists(self._folder / str(step)):
                    _set_aside(self._folder / str(step))
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
        for step in _listing(self._folder)[0]:
            if step < latest[0] and step not in kept:
                # Renamed first, so that a half-deleted folder is never taken for a damaged checkpoint.
                gone = (self._folder / str(step)).rename(self._folder / f"{step}{DELETING}")
                shutil.rmtree(gone, ignore_errors=True)
                self._good.discard(step)

    def _validation_losses(self) -> dict[int, float]:
        """Step -> validation loss of those saved steps that have one."""
        losses = {}
        for step in _listing(self._folder)[0]:
            try:
                loss = read_manifest(self._folder / str(step)).validation_loss
            except DataError:
                continue
            if loss is not None and math.isfinite(loss):
                losses[step] = loss
        return losses


def newest_good(folder: pathlib.Path, set_aside: bool = False, regular_every: int = 0) -> Manifest | None:
    """The manifest of the newest checkpoint in `folder` that passes its verification; None if there is none at all.

    Process 0 looks, all others are told. Those that fail are named on stderr, and so is what only has the name of one.

    Args:
      folder: `checkpoints` of a working directory.
      set_aside: rename those that fail to STEP.damaged; for the run that trains here only.
      regular_every: above 0, look among the regular checkpoints of this distance only.

    Raises:
      DataError: if there are checkpoints, but none that can be used.
    """
    step = NONE_THERE
    if jax.process_index() == 0:
        steps, others = _listing(folder)
        if regular_every:
            steps, others = _regular_steps(folder, regular_every), {}
        damaged = list(itertools.takewhile(lambda step: not _usable(folder / str(step)), steps))
        if len(damaged) < len(steps):
            step = steps[len(damaged)]
        elif steps or others:
            step = NONE_GOOD
        passed_over = [name for name in others if int(name) >= step]
        for name in passed_over[:1]:
            more = f" (and {len(passed_over) - 1} more)" if passed_over[1:] else ""
            say(f"checkpoint {folder / name}: {others[name]}; it is not used{more}")
        if set_aside and step >= 0:
            for number in damaged:
                _set_aside(folder / str(number))
    step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if step == NONE_GOOD:
        raise DataError(f"{folder}: none of its checkpoints can be used; see the lines above")
    return None if step == NONE_THERE else read_manifest(folder / str(step))


def restore_params(workdir: pathlib.Path, abstract_params: Any, step: int | None = None) -> tuple[int, Any]:
    """Parameters alone of the newest checkpoint that passes its verification, as (step, params).

    Nothing is written; newer ones that are damaged are named on stderr, and a configuration that has changed since.

    Args:
      workdir: a working directory.
      abstract_params: jax.ShapeDtypeStruct leaves with shardings.
      step: take the checkpoint of this step and no other.

    Raises:
      DataError: if the directory holds no checkpoint that can be used, or not the one that was asked for, or one whose
        parameters are not those of `abstract_params`.
    """
    folder = (workdir / FOLDER).absolute()
    if folder.is_symlink():
        raise DataError(f"workdir {workdir}: {FOLDER} is a link, which is not followed")
    if not os.path.isdir(folder):
        raise DataError(f"workdir {workdir}: holds no checkpoint; train into it first")
    if step is not None:
        steps, _ = _listing(folder)
        if step not in steps:
            there = ", ".join(map(str, reversed(steps))) or "none"
            raise DataError(f"workdir {workdir}: holds no checkpoint of step {step}; there are {there}")
        if not _usable(folder / str(step)):
            raise DataError(f"workdir {workdir}: the checkpoint of step {step} cannot be used; see the line above")
        found: Manifest | None = read_manifest(folder / str(step))
    else:
        found = newest_good(folder)
    if found is None:
        raise DataError(f"workdir {workdir}: holds no finished checkpoint; train into it first")
    here = folder / str(found.step)
    if (workdir / CONFIG_FILE).exists() and found.config_sha256 not in ("", fingerprint(load_config(workdir))):
        say(f"checkpoint {here}: {CONFIG_FILE} has changed since it was written")
    return found.step, read_arrays(here, {"params": abstract_params})["params"]


def check_size(workdir: pathlib.Path, model: ModelConfig, step: int | None = None) -> None:
    """Refuses a model of more or larger arrays than the checkpoints hold, before any of them is built.

    Somebody else's config.json may ask for a model of any size. That all shapes fit is checked when they are read.

    Args:
      workdir: a working directory.
      model: that its configuration describes.
      step: of the checkpoint that is to be read; None for the newest good one.

    Raises:
      DataError: naming the field, or why no checkpoint can be used.
    """
    folder = (workdir / FOLDER).absolute()
    steps = _listing(folder)[0] if os.path.isdir(folder) and not folder.is_symlink() else []
    shapes = None
    for number in [number for number in steps if step in (None, number)]:
        with contextlib.suppress(DataError):
            shapes = stored_shapes(folder / str(number))
            break
    if shapes is None:
        restore_params(workdir, {}, step)  # tells why there is none
        return
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    most = {"hidden_depth": len(shapes), "num_blocks": len(shapes) // model.layers_per_block}
    most |= dict.fromkeys(("vocab_size", "d_model", "d_ff"), largest)
    for name, limit in most.items():
        value = getattr(model, name)
        if value is not None and value > limit:
            raise DataError(
                f"workdir {workdir}: model.{name} = {value} in its {CONFIG_FILE} does not fit its checkpoints, which "
                f"hold {len(shapes):,} parameters of at most {largest:,} rows or columns"
            )


def _clear(folder: pathlib.Path) -> None:
    """Makes the folder of the checkpoints, or removes from it what a killed run has left half-done.

    Raises:
      OSError: if it is a link, cannot be written, has a path that Orbax cannot take, or something half-done stays.
    """
    own_folder(folder)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    with plain_path(folder):
        pass  # it has one, or training need not begin
    for path in folder.iterdir():
        if SAVING in path.suffixes or path.name.endswith(DELETING):
            if path.is_symlink() or not path.is_dir():
                path.unlink()
            else:
                shutil.rmtree(path)


def _listing(folder: pathlib.Path) -> tuple[list[int], dict[str, str]]:
    """The steps that have a folder, and what else is called by a number with what is wrong with it; newest first."""
    steps, others = [], {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.isascii() or not entry.name.isdigit():
                    continue
                if entry.is_symlink():
                    others[entry.name] = "is a link, which is not followed"
                elif not entry.is_dir(follow_symlinks=False):
                    others[entry.name] = "is no folder"
                elif not STEP.fullmatch(entry.name) or int(entry.name) > LAST_STEP:
                    others[entry.name] = "has no valid step number as its name"
                else:
                    steps.append(int(entry.name))
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
    newest_first = sorted(others.items(), key=lambda item: item[0].lstrip("0").rjust(256, "0"), reverse=True)
    return sorted(steps, reverse=True), dict(newest_first)


def _regular_steps(folder: pathlib.Path, every: int) -> list[int]:
    """The multiples of `every` among the steps, the newest first; without those that were saved amid bad updates."""
    found = []
    for step in _listing(folder)[0]:
        if step % every == 0:
            with contextlib.suppress(DataError):
                found += [] if read_manifest(folder / str(step)).after_skip else [step]
    return found


def _usable(path: pathlib.Path) -> bool:
    """Whether the checkpoint in `path` passes its verification; says so if not."""
    try:
        verify(path)
    except DataError as error:
        print(f"{error}; it is not used", file=sys.stderr, flush=True)
        return False
    return True


def _set_aside(path: pathlib.Path) -> None:
    """Renames what has the name of a checkpoint and is none that can be used, so that its step can be saved anew."""
    number = sum(other.name.startswith(f"{path.name}{DAMAGED}") for other in path.parent.iterdir())
    place = path.with_name(f"{path.name}{DAMAGED}{f'-{number}' if number else ''}")
    try:
        path.rename(place)
    except OSError as error:
        say(f"checkpoint {path}: cannot be set aside ({error.strerror})")
    else:
        say(f"checkpoint {path}: set aside as {place.name}")


def _fields(state: TrainState) -> dict[str, Any]:
    """The state as a plain mapping, the form in which it is saved; without what the run does not have."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    return {name: value for name, value in fields.items() if value is not None}


def _failure(draft: pathlib.Path, error: Exception) -> DataError:
    """What to say of a save that did not succeed."""
    return DataError(f"checkpoint {draft}: cannot be written ({first_line(error)})")
