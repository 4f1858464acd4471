"""What code that is traced may ask of the mesh that its caller has set (`jax.set_mesh`)."""

import math

import jax
from jax.sharding import AxisType, PartitionSpec

# Axes that split the batch in training; the others hold copies of it, or of what they split no part.
BATCH_AXES = ("data", "fsdp")
# In evaluation sequences are independent and whole: every axis that would compute copies takes sequences of its own.
EVALUATION_AXES = (*BATCH_AXES, "window", "context")


def open_axes() -> dict[str, int]:
    """Sizes of the mesh's axes that the compiler partitions over: longer than 1, and not manual (`jax.shard_map`).

    Without any, the program being traced is that of one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types)
    return {name: mesh.shape[name] for name, kind in kinds if mesh.shape[name] > 1 and kind != AxisType.Manual}


def batch_spec(batch: int) -> PartitionSpec:
    """How the leading axis of arrays with a batch of so many sequences is split over the open axes, if evenly."""
    axes = open_axes()
    for candidates in (EVALUATION_AXES, BATCH_AXES):
        names = tuple(name for name in candidates if name in axes)
        if names and batch % math.prod(axes[name] for name in names) == 0:
            return PartitionSpec(names)
    return PartitionSpec()


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps the leading axis of x split as `batch_spec` says; x as it is where nothing splits it."""
    spec = batch_spec(x.shape[0])
    return jax.lax.with_sharding_constraint(x, spec) if spec else x
