"""Checkpoints on disk: `checkpoints/STEP` holds Orbax's `state/` and `manifest.json`, and appears by one rename.

The manifest lists every file with its size and SHA-256, and a hash of itself, so damage is noticed before use.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import math
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.config.run import CONFIG_FILE, fingerprint, load_config
from tlinformer_jax.data.given import TokenData, given_loader
from tlinformer_jax.data.sources import load_stored_split
from tlinformer_jax.data.tokenizers import load_tokenizer
from tlinformer_jax.errors import DataError, first_line
from tlinformer_jax.files import local_path, open_own, plain_path, read_own, sealed_text, unsealed, write_text
from tlinformer_jax.models.model import parameter_shapes
from tlinformer_jax.training.console import say
from tlinformer_jax.training.setup import LoadSplit, TrainedRun, build_run

FOLDER = "checkpoints"
STATE = "state"  # Orbax's folder within a checkpoint
MANIFEST_FILE = "manifest.json"
DAMAGED = ".damaged"
STEP = re.compile(r"0|[1-9][0-9]{0,9}")
LAST_STEP = 2**31 - 1
# Broadcast by process 0 instead of a step.
NO_CHECKPOINT, NO_GOOD_CHECKPOINT = -1, -2


# ---- The manifest


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a checkpoint."""

    step: int  # updates done, which is also the position in the data
    files: dict[str, tuple[int, str]]  # path -> (bytes, SHA-256), without the manifest
    code_version: str
    config_sha256: str  # `config.run.fingerprint`; empty if unknown
    validation_loss: float | None = None  # nats per token; None if not evaluated
    after_skip: bool = False  # whether the last update was skipped; no rollback returns to such a step


def hash_files(folder: pathlib.Path) -> dict[str, tuple[int, str]]:
    """Returns sizes and hashes of all files below `folder`, after flushing each to disk."""
    found = {}
    for path in _files_below(folder):
        with open_own(folder / path, "rb") as file:
            os.fsync(file.fileno())
            found[path] = (os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())
    return found


def write_manifest(folder: pathlib.Path, manifest: Manifest) -> None:
    """Writes the manifest of the checkpoint in `folder`, atomically."""
    write_text(folder / MANIFEST_FILE, sealed_text(dataclasses.asdict(manifest)))


def read_manifest(folder: pathlib.Path) -> Manifest:
    """Reads the manifest of the checkpoint in `folder`; does not check the other files."""
    try:
        values = unsealed(read_own(folder / MANIFEST_FILE))
        files = {name: (int(size), str(digest)) for name, (size, digest) in values.pop("files").items()}
        manifest = Manifest(files=files, **values)
        if not isinstance(manifest.step, int) or not isinstance(manifest.validation_loss, float | None):
            raise TypeError(values)
    except OSError as error:
        raise DataError(f"checkpoint {folder}: has no readable {MANIFEST_FILE} ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise DataError(f"checkpoint {folder}: {MANIFEST_FILE} is damaged") from None
    if folder.name != str(manifest.step):
        raise DataError(f"checkpoint {folder}: {MANIFEST_FILE} belongs to step {manifest.step}")
    return manifest


def verify(folder: pathlib.Path) -> Manifest:
    """Compares every file of the checkpoint in `folder` with the manifest, and returns the manifest."""
    manifest = read_manifest(folder)
    present = set(_files_below(folder))
    for path in sorted(present - set(manifest.files)):
        raise DataError(f"checkpoint {folder}: file {path} does not belong to it")
    for path, (size, digest) in sorted(manifest.files.items()):
        if path not in present:
            raise DataError(f"checkpoint {folder}: file {path} is missing")
        try:
            with open_own(folder / path, "rb") as file:
                found = os.fstat(file.fileno()).st_size
                if found != size:
                    raise DataError(f"checkpoint {folder}: file {path} has {found:,} bytes instead of {size:,}")
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise DataError(f"checkpoint {folder}: the bytes of file {path} have changed")
        except OSError as error:
            raise DataError(f"checkpoint {folder}: file {path} cannot be read ({error.strerror})") from None
    return manifest


def _files_below(folder: pathlib.Path) -> list[str]:
    """Lists the paths of all files and links below `folder`, without the manifest."""
    own = (MANIFEST_FILE, f"{MANIFEST_FILE}.draft")
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for name in (path.relative_to(folder).as_posix() for path in paths) if name not in own)


# ---- Finding an intact checkpoint


def newest_good(folder: pathlib.Path, set_aside: bool = False, every: int = 0) -> Manifest | None:
    """Returns the manifest of the newest checkpoint that passes verification; None if there is no checkpoint at all.

    Process 0 looks and tells the others. Unusable checkpoints are named on stderr. With `set_aside`, used by the run
    that trains here, damaged ones are renamed to STEP.damaged. With `every`, only the `regular_steps` are considered.
    """
    step = NO_CHECKPOINT
    if jax.process_index() == 0:
        steps, others = (regular_steps(folder, every), {}) if every else list_steps(folder)
        damaged = list(itertools.takewhile(lambda step: not is_usable(folder / str(step)), steps))
        if len(damaged) < len(steps):
            step = steps[len(damaged)]
        elif steps or others:
            step = NO_GOOD_CHECKPOINT
        passed_over = [name for name in others if int(name) >= step]
        for name in passed_over[:1]:
            more = f" (and {len(passed_over) - 1} more)" if passed_over[1:] else ""
            say(f"checkpoint {folder / name}: {others[name]}; it is not used{more}")
        for number in damaged if set_aside and step >= 0 else ():
            set_aside_damaged(folder / str(number))
    step = int(multihost_utils.broadcast_one_to_all(np.int32(step)))
    if step == NO_GOOD_CHECKPOINT:
        raise DataError(f"{folder}: has no usable checkpoint; see the lines above")
    return None if step == NO_CHECKPOINT else read_manifest(folder / str(step))


def existing_folder(workdir: pathlib.Path) -> pathlib.Path:
    """Returns the folder of the checkpoints; raises DataError if there is none."""
    folder = (workdir / FOLDER).absolute()
    if folder.is_symlink():
        raise DataError(f"workdir {workdir}: {FOLDER} is a link, which is not followed")
    if not os.path.isdir(folder):
        raise DataError(f"workdir {workdir}: holds no checkpoint; train into it first")
    return folder


def restore_params(workdir: pathlib.Path, abstract_params: Any, step: int | None = None) -> tuple[int, Any]:
    """Returns step and parameters of the newest intact checkpoint, or of the one at `step`; writes nothing.

    The parameters are the averaged ones if the run has `train.ema`, as in its evaluations. `abstract_params` has
    jax.ShapeDtypeStruct leaves with shardings. Raises DataError if no such checkpoint can be used.
    """
    folder = existing_folder(workdir)
    found = newest_good(folder) if step is None else _checkpoint_of(workdir, step)
    if found is None:
        raise DataError(f"workdir {workdir}: holds no finished checkpoint; train into it first")
    here, name = folder / str(found.step), "params"
    if (workdir / CONFIG_FILE).exists() and found.config_sha256 not in ("", fingerprint(load_config(workdir))):
        say(f"checkpoint {here}: {CONFIG_FILE} has changed since it was written")
    with contextlib.suppress(Exception):  # of many types; `read_arrays` will report it
        name = "ema" if any(path[0] == "ema" for path in _stored_arrays(here)) else name
    return found.step, read_arrays(here, {name: abstract_params})[name]


def _checkpoint_of(workdir: pathlib.Path, step: int) -> Manifest:
    folder = existing_folder(workdir)
    steps, _ = list_steps(folder)
    if step not in steps:
        there = f", only of {', '.join(map(str, reversed(steps)))}" if steps else ""
        raise DataError(f"workdir {workdir}: holds no checkpoint of step {step}{there}")
    if not is_usable(folder / str(step)):
        raise DataError(f"workdir {workdir}: the checkpoint of step {step} cannot be used; see the line above")
    return read_manifest(folder / str(step))


def load_params(workdir: pathlib.Path, config: ModelConfig, step: int | None = None) -> tuple[int, Any]:
    """Loads parameters by `restore_params` to the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), parameter_shapes(config)
    )
    return restore_params(workdir, abstract, step)


def load_run(
    workdir: str | pathlib.Path, step: int | None = None, *, validation_data: TokenData | None = None
) -> TrainedRun:
    """Loads a run with the parameters of its newest intact checkpoint, or of the one at `step`, on all devices.

    `validation_data` replaces the configuration's, as in `train_and_evaluate`.
    """
    workdir = local_path(workdir, "workdir")
    # The mesh of the training does not matter here: use all devices of this machine.
    config = load_config(workdir)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, mesh=""))
    load: LoadSplit = load_stored_split
    if validation_data is not None:
        load = given_loader({"validation": validation_data}, config.model.vocab_size)
    run = dataclasses.replace(build_run(config, load_tokenizer(workdir)), load_split=load)
    step, params = restore_params(workdir, run.abstract_state.params, step)
    return TrainedRun(run, params, step)


def list_steps(folder: pathlib.Path) -> tuple[list[int], dict[str, str]]:
    """Returns the steps that have a folder, and other numeric names with their faults; newest first."""
    try:
        names = [name for name in os.listdir(folder) if name.isascii() and name.isdigit()]
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from None
    names.sort(key=lambda name: name.lstrip("0").rjust(256, "0"), reverse=True)
    faults = {name: _fault_of_step(folder / name) for name in names}
    return [int(name) for name in names if not faults[name]], {name: faults[name] for name in names if faults[name]}


def _fault_of_step(path: pathlib.Path) -> str:
    if path.is_symlink():
        return "is a link, which is not followed"
    if not path.is_dir():
        return "is not a folder"
    valid = STEP.fullmatch(path.name) and int(path.name) <= LAST_STEP
    return "" if valid else "has no valid step number as its name"


def manifests(folder: pathlib.Path) -> Iterator[tuple[int, Manifest]]:
    """Yields the steps that have a readable manifest, newest first."""
    for step in list_steps(folder)[0]:
        with contextlib.suppress(DataError):
            yield step, read_manifest(folder / str(step))


def regular_steps(folder: pathlib.Path, every: int) -> list[int]:
    """Returns the checkpoints at multiples of `every`, newest first, without those right after a skipped update."""
    return [step for step, manifest in manifests(folder) if step % every == 0 and not manifest.after_skip]


def validation_losses(folder: pathlib.Path) -> dict[int, float]:
    """Maps step -> validation loss, for the checkpoints in `folder` that have one."""
    losses = {step: manifest.validation_loss for step, manifest in manifests(folder)}
    return {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}


def is_usable(path: pathlib.Path) -> bool:
    """Returns whether the checkpoint in `path` passes verification; prints why if not."""
    try:
        verify(path)
    except DataError as error:
        say(f"{error}; it is not used")
        return False
    return True


def set_aside_damaged(path: pathlib.Path) -> None:
    """Renames an unusable checkpoint, so that its step can be saved again."""
    number = sum(other.name.startswith(f"{path.name}{DAMAGED}") for other in path.parent.iterdir())
    aside = path.with_name(f"{path.name}{DAMAGED}{f'-{number}' if number else ''}")
    try:
        path.rename(aside)
    except OSError as error:
        say(f"checkpoint {path}: cannot be set aside ({error.strerror})")
    else:
        say(f"checkpoint {path}: set aside as {aside.name}")


# ---- Orbax's stored arrays


def misfit(folder: pathlib.Path, tree: dict[str, Any], attributes: Sequence[str] = ("shape",)) -> str | None:
    """Names the first array of `tree` that is missing from a checkpoint or differs there; None if all fit.

    All stored parameters must be in `tree`: those of a deeper model would fit too.
    """
    stored, wanted = _stored_arrays(folder), ocp.tree.to_flat_dict(tree)
    for path, leaf in wanted.items():
        if path not in stored:
            return f"array {'/'.join(path)} is missing"
        for name in attributes:
            found, expected = getattr(stored[path], name, None), getattr(leaf, name)
            if found != expected:
                return f"array {'/'.join(path)} has {name} {found} instead of {expected}"
    for path in stored:
        if path[0] in ("params", "ema") and path[0] in tree and path not in wanted:
            return f"array {'/'.join(path)} is not in the model of {CONFIG_FILE}"
    return None


def _stored_arrays(folder: pathlib.Path) -> dict[tuple[str, ...], Any]:
    """Returns path -> Orbax's metadata of each array."""
    with plain_path(folder) as plain:
        return ocp.tree.to_flat_dict(ocp.PyTreeCheckpointHandler().metadata(plain / STATE).tree)


def read_arrays(folder: pathlib.Path, tree: dict[str, Any]) -> dict[str, Any]:
    """Reads the arrays of a checkpoint that `tree` names, in their stored dtype."""
    how = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding), tree)
    try:
        fault = misfit(folder, tree)
        if fault is None:
            with plain_path(folder) as plain, ocp.PyTreeCheckpointer() as checkpointer:
                args = ocp.args.PyTreeRestore(item=tree, restore_args=how, partial_restore=True)
                return checkpointer.restore(plain / STATE, args=args)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # raised by Orbax
        fault = f"cannot be read ({first_line(error)})"
    raise DataError(f"checkpoint {folder}: {fault}")
