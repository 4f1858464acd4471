"""The shapes of a checkpoint's parameters, from its own description, and whether a model has the same."""

import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from tlinformer_jax.errors import DataError

Shapes = dict[str, tuple[int, ...]]


def stored_shapes(state: pathlib.Path) -> Shapes:
    """Path -> shape of the parameters in `checkpoints/STEP/state`, as Orbax describes them.

    Raises:
      DataError: if the description cannot be read.
    """
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            params = checkpointer.metadata(state.absolute()).item_metadata.tree["params"]
        return {name: tuple(map(int, leaf.shape)) for name, leaf in _named(params)}
    except Exception as error:  # of many kinds, for files that are missing, damaged or somebody else's
        reason = str(error).strip().splitlines()
        raise DataError(
            f"{state}: its arrays cannot be told ({reason[0] if reason else type(error).__name__})"
        ) from None


def check_shapes(state: pathlib.Path, params: Any) -> None:
    """Refuses parameters of other names or shapes than the checkpoint in `state` holds.

    Args:
      state: `checkpoints/STEP/state`.
      params: leaves with a shape, in nested mappings.

    Raises:
      DataError: naming the first that differs.
    """
    there = stored_shapes(state)
    for name, leaf in _named(params):
        if there.get(name) != leaf.shape:
            found = list(there[name]) if name in there else "missing"
            raise DataError(
                f"checkpoint {state.parent}: parameter {name} is {found}, and {list(leaf.shape)} by the configuration"
            )


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield "/".join(str(key.key) for key in path), leaf
