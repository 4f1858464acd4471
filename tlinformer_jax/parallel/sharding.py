"""Sharding policy: which axis of the mesh splits which dimension of which array, in one place."""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tlinformer_jax.errors import ConfigError
from tlinformer_jax.parallel.constraints import BATCH_AXES

# The first pattern that matches a parameter's path decides. FSDP splits the model's width, which every matrix has
# (V = 29 * 1733 divides badly, so the embedding is split on the width too); tensor parallelism splits heads and the
# feed-forward's features. Over the other axes parameters are copies.
PARAMETER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embedding$", PartitionSpec(None, "fsdp")),
    (r"qkv_kernel$", PartitionSpec("fsdp", None, "tensor")),
    (r"qkv_bias$", PartitionSpec(None, "tensor")),
    (r"out_kernel$", PartitionSpec("tensor", None, "fsdp")),
    (r"gate_up_kernel$", PartitionSpec("fsdp", None, "tensor")),
    (r"down_kernel$", PartitionSpec("tensor", "fsdp")),
    (r"(norm\w*_(scale|bias)|out_bias)$", PartitionSpec()),
    (r"^competence/", PartitionSpec()),
)


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of the parameter at `path` ('blocks_0/compress/qkv_kernel').

    Raises:
      ConfigError: if no rule matches, or the mesh does not divide a dimension it should split.
    """
    for pattern, spec in PARAMETER_RULES:
        if re.search(pattern, path):
            for size, axis in zip(shape, spec, strict=False):
                if axis is not None and size % mesh.shape[axis]:
                    raise ConfigError(
                        f"mesh.{axis}", mesh.shape[axis], f"must divide {size}, a dimension of {path} {list(shape)}"
                    )
            return spec
    raise ConfigError("sharding rules", path, "no rule matches this parameter")


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Shardings of any pytree that holds parameters or their like (optimiser moments): by the parameters' rules.

    Scalars are replicated.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = "/".join(str(getattr(key, "key", getattr(key, "name", key))) for key in path)
        spec = PartitionSpec() if leaf.ndim == 0 else parameter_spec(name, leaf.shape, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh, axes: tuple[str, ...] = BATCH_AXES) -> NamedSharding:
    """Sharding of a batch's arrays: sequences split over `axes`, in training the batch axes."""
    return NamedSharding(mesh, PartitionSpec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of what every device, and so every process, holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def process_rows(mesh: Mesh, batch_size: int, axes: tuple[str, ...] = BATCH_AXES) -> np.ndarray:
    """Which rows of a batch that is split over `axes` this process's devices hold, ascending, int64.

    They need not follow each other: a mesh orders devices by their connections, not by their processes.
    """
    held = batch_sharding(mesh, axes).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held if index is not None]))


def put_batch(batch: Any, mesh: Mesh, axes: tuple[str, ...] = BATCH_AXES) -> Any:
    """Device arrays of the global batch from the rows that `process_rows` names, in their order."""
    sharding = batch_sharding(mesh, axes)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
