"""Sharding constraints on activations, read from the mesh that the caller has set (`jax.set_mesh`)."""

import jax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps the leading axis of x split over the mesh's batch axes; without such a mesh, x as it is."""
    axes = tuple(name for name in BATCH_AXES if name in jax.sharding.get_abstract_mesh().axis_names)
    if not axes:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *(None,) * (x.ndim - 1)))
