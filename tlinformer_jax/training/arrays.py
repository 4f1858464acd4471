"""The arrays of a checkpoint as Orbax stores them: their shapes without reading them, and reading them."""

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from tlinformer_jax.errors import DataError
from tlinformer_jax.files import plain_path

STATE = "state"  # Orbax's folder in that of a checkpoint


def stored_shapes(folder: pathlib.Path) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of the parameters in a checkpoint that has not been verified.

    Raises:
      DataError: if they cannot be told.
    """
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise DataError(f"checkpoint {folder}: {path.name} is no regular file")  # Orbax would wait for a pipe
    try:
        stored = _stored(folder)
    except Exception as error:  # of many kinds, for files that are missing, damaged or somebody else's
        raise DataError(f"checkpoint {folder}: its arrays cannot be told ({first_line(error)})") from None
    return {path: leaf.shape for path, leaf in stored.items() if path[0] == "params" and hasattr(leaf, "shape")}


def misfit(folder: pathlib.Path, tree: dict[str, Any], attributes: Sequence[str] = ("shape",)) -> str | None:
    """The first array of `tree` that a checkpoint lacks, or in which it differs, in words; None if there is none.

    Args:
      folder: of the checkpoint.
      tree: of arrays or jax.ShapeDtypeStruct; the checkpoint may hold more.
      attributes: of the arrays that are compared.

    Raises:
      Exception: whatever Orbax and TensorStore raise where they cannot open an array.
    """
    stored = _stored(folder)
    for path, leaf in ocp.tree.to_flat_dict(tree).items():
        if path not in stored:
            return f"array {'/'.join(path)} is missing"
        for name in attributes:
            found, expected = getattr(stored[path], name, None), getattr(leaf, name)
            if found != expected:
                return f"array {'/'.join(path)} has {name} {found} instead of {expected}"
    return None


def _stored(folder: pathlib.Path) -> dict[tuple[str, ...], Any]:
    """Path -> what Orbax tells of each array."""
    with plain_path(folder) as plain:
        return ocp.tree.to_flat_dict(ocp.PyTreeCheckpointHandler().metadata(plain / STATE).tree)


def read_arrays(folder: pathlib.Path, tree: dict[str, Any]) -> dict[str, Any]:
    """The arrays of a checkpoint that `tree` names, in the dtype that is stored.

    Args:
      folder: of the checkpoint.
      tree: of jax.ShapeDtypeStruct with shardings.

    Raises:
      DataError: if one is missing, has another shape, or cannot be read.
    """
    how = jax.tree.map(lambda leaf: ocp.ArrayRestoreArgs(sharding=leaf.sharding), tree)
    try:
        fault = misfit(folder, tree)
        if fault is None:
            with plain_path(folder) as plain, ocp.PyTreeCheckpointer() as checkpointer:
                args = ocp.args.PyTreeRestore(item=tree, restore_args=how, partial_restore=True)
                return checkpointer.restore(plain / STATE, args=args)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # of Orbax, whatever it finds amiss
        fault = f"cannot be read ({first_line(error)})"
    raise DataError(f"checkpoint {folder}: {fault}")


def first_line(error: Exception) -> str:
    """What to say of an error of a library: the first line of its message, cut where that is endless."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
