"""The mesh of devices, and which of its axes splits which dimension of which array."""

import functools
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tlinformer_jax.errors import ConfigError
from tlinformer_jax.parallel.mesh import MeshConfig

# Axes that split the batch in training; the others hold copies of it, or of what they split no part.
BATCH_AXES = ("data", "fsdp")
# In evaluation sequences are independent and whole: every axis that would compute copies takes sequences of its own.
EVALUATION_AXES = (*BATCH_AXES, "window", "context")
# The first pattern that matches a parameter's path decides. FSDP splits the model's width, which every matrix has
# (V = 29 * 1733 divides badly, so the embedding is split on the width too); tensor parallelism splits heads and the
# feed-forward's features. Over the other axes parameters are copies.
PARAMETER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embedding$", PartitionSpec(None, "fsdp")),
    (r"qkv_kernel$", PartitionSpec("fsdp", None, "tensor")),
    (r"qkvg_kernel$", PartitionSpec("fsdp", None, "tensor")),
    (r"conv_kernel$", PartitionSpec(None, None, "tensor")),
    (r"rates_kernel$", PartitionSpec("fsdp", None, "tensor")),
    (r"(A_log|dt_bias)$", PartitionSpec("tensor")),
    (r"qkv_bias$", PartitionSpec(None, "tensor")),
    (r"out_kernel$", PartitionSpec("tensor", None, "fsdp")),
    (r"gate_up_kernel$", PartitionSpec("fsdp", None, "tensor")),
    (r"down_kernel$", PartitionSpec("tensor", "fsdp")),
    (r"(norm\w*_(scale|bias)|out_bias|shift)$", PartitionSpec()),
    (r"^competence/", PartitionSpec()),
)


# ---- The mesh


def build_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), every axis for the compiler to partition (AxisType.Auto)."""
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def connect(mesh: Mesh) -> None:
    """Lets the processes of a mesh connect, group of devices by group; every process calls it.

    On CPUs a group connects when a program first needs it. Of two groups that need not wait for each other, one process
    may begin with the one and another process with the other, and then both wait in vain.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    axes = [name for name, size in mesh.shape.items() if size > 1]
    for count in range(1, len(axes) + 1):
        for names in itertools.combinations(axes, count):
            add = functools.partial(jax.lax.psum, axis_name=names)
            whole = PartitionSpec()
            everywhere = jax.shard_map(add, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
            jax.block_until_ready(jax.jit(everywhere)(np.float32(1)))


def ways(mesh: Mesh, axes: Sequence[str]) -> int:
    """Parts that `axes` of a mesh split something into."""
    return math.prod(mesh.shape[name] for name in axes)


def check_batch_divides(batch_size: int, mesh: Mesh, field: str) -> None:
    """Refuses a batch that the mesh's batch axes cannot split evenly."""
    parts = ways(mesh, BATCH_AXES)
    if batch_size % parts:
        raise ConfigError(field, batch_size, f"must be divisible by {parts}, the devices that split the batch")


# ---- Arrays that a program is given


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of the parameter at `path` ('blocks_0/compress/qkv_kernel')."""
    spec = next((spec for pattern, spec in PARAMETER_RULES if re.search(pattern, path)), None)
    if spec is None:
        raise ConfigError("sharding rules", path, "no rule matches this parameter")
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            allowed = f"must divide {size}, a dimension of {path} {list(shape)}"
            raise ConfigError(f"mesh.{axis}", mesh.shape[axis], allowed)
    return spec


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


# ---- Arrays inside a program, under the mesh that its caller has set (`jax.set_mesh`)


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
