"""The shapes of a checkpoint's parameters, from its own description, and whether a model has the same."""

import pathlib
from typing import Any

import jax

from tlinformer_jax.errors import DataError
from tlinformer_jax.files import read_json

Shapes = dict[str, tuple[int, ...]]


def stored_shapes(state: pathlib.Path) -> Shapes:
    """Path -> shape of the parameters in `checkpoints/STEP/state`, as Orbax describes them.

    Raises:
      DataError: if the description cannot be read.
    """
    path = state / "_METADATA"
    try:
        entries = read_json(path)["tree_metadata"].values()
        keys = [[part["key"] for part in entry["key_metadata"]] for entry in entries]
        return {
            "/".join(names[1:]): tuple(map(int, entry["value_metadata"]["write_shape"]))
            for names, entry in zip(keys, entries)
            if names[0] == "params"
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error!r})") from None


def check_shapes(state: pathlib.Path, params: Any) -> None:
    """Refuses parameters of other names or shapes than the checkpoint in `state` holds.

    Args:
      state: `checkpoints/STEP/state`.
      params: leaves with a shape, in nested mappings.

    Raises:
      DataError: naming the first that differs.
    """
    there = stored_shapes(state)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(str(key.key) for key in path)
        if there.get(name) != leaf.shape:
            found = list(there[name]) if name in there else "missing"
            raise DataError(
                f"checkpoint {state.parent}: parameter {name} is {found}, and {list(leaf.shape)} by the configuration"
            )
