"""Sharding constraints on activations, read from the mesh that the caller has set (`jax.set_mesh`)."""

import math

import jax
from jax.sharding import PartitionSpec

BATCH_AXES = ("data", "fsdp")


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps the leading axis of x split over the mesh's batch axes; without such a mesh, or where it
    does not divide the batch, x as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in BATCH_AXES if name in mesh.axis_names)
    if not axes or x.shape[0] % math.prod(mesh.shape[name] for name in axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *(None,) * (x.ndim - 1)))
