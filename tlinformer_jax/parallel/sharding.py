"""The mesh of devices, the sharding of every array, and the part of the loss that each device computes.

Axes that hold copies of the parameters (`data`, `window`, `context`) are manual in one `jax.shard_map` around loss and
gradient. The compiler partitions over `fsdp`, `tensor` and `expert`, which split parameters.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tlinformer_jax.errors import ConfigError
from tlinformer_jax.parallel.mesh import AXES, mesh_text

# Axes that split the batch in training; the other axes hold copies of it.
BATCH_AXES = ("data", "fsdp", "expert")
# In evaluation `window` and `context` split the batch, too; otherwise their devices would compute the same.
EVALUATION_AXES = (*BATCH_AXES, "window", "context")
# The first pattern that matches a parameter's path decides. FSDP splits the model's width, which every matrix has.
# Tensor parallelism splits heads and the feed-forward's features, `expert` the experts. The other axes hold copies.
PARAMETER_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embedding$", PartitionSpec(None, "fsdp")),
    (r"(qkv|qkvg|rates)_kernel$", PartitionSpec("fsdp", None, "tensor")),
    (r"conv_kernel$", PartitionSpec(None, None, "tensor")),
    (r"(A_log|dt_bias)$", PartitionSpec("tensor")),
    (r"qkv_bias$", PartitionSpec(None, "tensor")),
    (r"out_kernel$", PartitionSpec("tensor", None, "fsdp")),
    (r"experts_gate_up_kernel$", PartitionSpec("expert", "fsdp", None, "tensor")),
    (r"experts_down_kernel$", PartitionSpec("expert", "tensor", "fsdp")),
    (r"gate_up_kernel$", PartitionSpec("fsdp", None, "tensor")),
    (r"down_kernel$", PartitionSpec("tensor", "fsdp")),
    (r"(norm\w*_(scale|bias)|out_bias|shift|taps|router_kernel)$", PartitionSpec()),
    (r"^competence/", PartitionSpec()),
    (r"/ns_coeffs$", PartitionSpec()),  # constants in Muon's state
)
# What a dimension comes from, for error messages: the first pattern that matches "AXIS PATH" decides.
DIMENSIONS = (
    (r"^expert", "model.num_experts = {}"),
    (r"^fsdp", "model.d_model = {}"),
    (r"(A_log|dt_bias)$", "{}, the heads of a Gated DeltaNet layer, which model.d_model sets"),
    (r"(gate_up|down)_kernel$", "{}, the features of a feed-forward, which model.d_ff sets"),
    (r"", "model.num_heads = {}"),
)
# Axes that split parameters.
PARTITIONED = ("fsdp", "tensor", "expert")
# Marks an entry of `assign_windows` without a window.
NO_WINDOW = -1


# ---- The mesh


def build_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh over `devices` (default: all), with every axis of type Auto; `axes` are sizes other than 1."""
    devices = jax.devices() if devices is None else devices
    product = math.prod(axes.values())
    data, left = divmod(len(devices), product)
    if left or not data:
        allowed = f"the product of its sizes must divide the number of devices; it is {product}"
        raise ConfigError("train.mesh", mesh_text(axes), f"{allowed}, and {number_of(devices)}")
    sizes = {"data": data, **dict.fromkeys(AXES, 1), **axes}
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def number_of(devices: Sequence[Any]) -> str:
    """Says how many devices there are, and of which platform, for an error message."""
    count = len(devices)
    return f"there {'is 1 device' if count == 1 else f'are {count} devices'} ({devices[0].platform})"


def connect(mesh: Mesh) -> None:
    """Connects the processes of a mesh for each group of axes, in the same order; every process must call this.

    On CPUs a group connects when it is first used: two processes that begin with different groups would wait forever.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    axes = [name for name, size in mesh.shape.items() if size > 1]
    for count in range(1, len(axes) + 1):
        for names in itertools.combinations(axes, count):
            add, whole = functools.partial(jax.lax.psum, axis_name=names), PartitionSpec()
            everywhere = jax.shard_map(add, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
            jax.block_until_ready(jax.jit(everywhere)(np.float32(1)))


def ways(mesh: Mesh, axes: Sequence[str]) -> int:
    """Returns the number of parts that `axes` of a mesh split an array into."""
    return math.prod(mesh.shape[name] for name in axes)


def mesh_error(mesh: Mesh, allowed: str) -> ConfigError:
    """Returns the error for a mesh that does not fit a run."""
    return ConfigError("train.mesh", mesh_text(mesh.shape), allowed)


def check_batch_divides(batch_size: int, mesh: Mesh, field: str) -> None:
    """Raises a ConfigError if the mesh's batch axes cannot split the batch evenly."""
    parts = ways(mesh, BATCH_AXES)
    if batch_size % parts:
        raise ConfigError(field, batch_size, f"must be divisible by {parts}, the devices that split the batch")


# ---- Inputs of a program


def parameter_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Returns the partition spec of the parameter at `path` ('blocks_0/compress/qkv_kernel')."""
    spec = next((spec for pattern, spec in PARAMETER_RULES if re.search(pattern, path)), None)
    if spec is None:
        raise ConfigError("sharding rules", path, "no rule matches this parameter")
    for size, axis in zip(shape, spec, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            what = next(what for pattern, what in DIMENSIONS if re.search(pattern, f"{axis} {path}"))
            raise mesh_error(mesh, f"{axis} must divide {what.format(size)}")
    return spec


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the shardings of a pytree with parameters, or with arrays at the same paths, by the parameters' rules."""

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = PartitionSpec() if leaf.ndim == 0 else parameter_spec(name, leaf.shape, mesh)
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh, axes: tuple[str, ...] = BATCH_AXES) -> NamedSharding:
    """Returns the sharding of a batch whose sequences are split over `axes`."""
    return NamedSharding(mesh, PartitionSpec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def process_rows(mesh: Mesh, batch_size: int, axes: tuple[str, ...] = BATCH_AXES) -> np.ndarray:
    """Returns the rows of a batch split over `axes` that this process's devices hold: ascending indices, int64.

    The indices may have gaps, because a mesh orders devices by their connections, not by their processes.
    """
    held = batch_sharding(mesh, axes).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in held if index is not None]))


def put_batch(batch: Any, mesh: Mesh, axes: tuple[str, ...] = BATCH_AXES) -> Any:
    """Makes arrays of the global batch on devices, from this process's rows (see `process_rows`)."""
    sharding = batch_sharding(mesh, axes)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)


# ---- Arrays inside a program (under the mesh set by `jax.set_mesh`)


def open_axes() -> dict[str, int]:
    """Returns the sizes of the mesh's axes that the compiler partitions over; empty for a program of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types)
    return {name: mesh.shape[name] for name, kind in kinds if mesh.shape[name] > 1 and kind != AxisType.Manual}


def batch_spec(batch: int) -> PartitionSpec:
    """Returns the partition spec of a batch over the open axes; empty if they cannot split it evenly."""
    axes = open_axes()
    for candidates in (EVALUATION_AXES, BATCH_AXES):
        names = tuple(name for name in candidates if name in axes)
        if names and batch % math.prod(axes[name] for name in names) == 0:
            return PartitionSpec(names)
    return PartitionSpec()


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps the leading axis of x split by `batch_spec`."""
    spec = batch_spec(x.shape[0])
    return jax.lax.with_sharding_constraint(x, spec) if spec else x


def gathered(table: jax.Array) -> jax.Array:
    """Replicates a table if the mesh does not allow a look-up of its rows otherwise."""
    # If both `fsdp` and `tensor` split parameters, XLA's partitioner aborts on a look-up in a table that one splits.
    both = {"fsdp", "tensor"} <= open_axes().keys()
    return jax.lax.with_sharding_constraint(table, PartitionSpec()) if both else table


# ---- A batch split by manual axes
#
# Every device computes a term of the loss, from different sequences (`data`), windows (`window`), or rows of a window
# (`context`). The loss is the sum of these terms, and its gradient the sum of their gradients.


@dataclasses.dataclass(frozen=True)
class SplitRows:
    """A split of a sequence's rows over an axis of the mesh with `parts` devices, for use inside `jax.shard_map`.

    Row r is on device r mod parts, with index r div parts, so that new rows are appended at the end on every device.
    Each device attends to its own rows; the results are merged by their log-sum-exps.
    """

    axis: str
    parts: int

    def count(self, length: jax.Array | int) -> jax.Array:
        """Returns how many of rows 0 .. length - 1 are on this device, int32."""
        return jnp.maximum(length - self.index() + self.parts - 1, 0) // self.parts

    def positions(self, start: jax.Array | int, count: int) -> jax.Array:
        """Returns the positions of this device's rows start .. start + count - 1, int32."""
        return (start + jnp.arange(count, dtype=jnp.int32)) * self.parts + self.index()

    def take(self, rows: jax.Array, axis: int = 1) -> jax.Array:
        """Takes this device's rows from an array that every device holds whole, with a multiple of `parts` rows."""
        shape = rows.shape[:axis], rows.shape[axis + 1 :]
        parted = rows.reshape(*shape[0], rows.shape[axis] // self.parts, self.parts, *shape[1])
        return jax.lax.dynamic_index_in_dim(parted, self.index(), axis + 1, keepdims=False)

    def gather(self, rows: jax.Array, start: jax.Array | int, length: int, axis: int = 1) -> jax.Array:
        """Returns rows start .. start + length - 1 of the sequence on every device.

        `rows` are this device's rows, an array whose axis `axis` counts them; start + length is at most rows * parts.
        """
        # The first row may be anywhere in its round of `parts` rows.
        held = rows.shape[axis]
        rounds = min(-(-(length + self.parts - 1) // self.parts), held)
        first = jnp.minimum(jnp.asarray(start, jnp.int32) // self.parts, held - rounds)
        part = jax.lax.dynamic_slice_in_dim(rows, first, rounds, axis)
        whole = jax.lax.all_gather(part, self.axis, axis=axis + 1)
        whole = whole.reshape(*rows.shape[:axis], -1, *rows.shape[axis + 1 :])
        return jax.lax.dynamic_slice_in_dim(whole, start - first * self.parts, length, axis)

    def index(self) -> jax.Array:
        """Returns this device's index on the axis, int32 []."""
        return jax.lax.axis_index(self.axis)


@dataclasses.dataclass(frozen=True)
class SequenceSplit:
    """How each sequence is split: its windows over the axis `window`, and its rows."""

    window_parts: int = 1
    rows: SplitRows | None = None

    @property
    def row_parts(self) -> int:
        return self.rows.parts if self.rows else 1

    @property
    def axes(self) -> tuple[str, ...]:
        return ("window",) * (self.window_parts > 1) + ((self.rows.axis,) if self.rows else ())


WHOLE = SequenceSplit()


@dataclasses.dataclass(frozen=True)
class BatchSplit:
    """How a batch is split: the mesh's manual axes, those that split the batch, and the split of each sequence.

    No axis is manual if the compiler partitions everything, or there is one device.
    """

    manual: tuple[str, ...] = ()
    batch: tuple[str, ...] = ()
    sequence: SequenceSplit = WHOLE

    @classmethod
    def of(cls, mesh: AbstractMesh) -> "BatchSplit":
        sizes = dict(mesh.shape)
        manual = tuple(name for name, size in sizes.items() if name not in PARTITIONED or size == 1)
        if all(sizes[name] == 1 for name in manual):
            return cls()
        context = sizes.get("context", 1)
        split = SequenceSplit(sizes.get("window", 1), SplitRows("context", context) if context > 1 else None)
        return cls(manual, tuple(name for name in BATCH_AXES if name in manual and sizes[name] > 1), split)

    def shard_index(self) -> jax.Array | int:
        """Returns the index of this device's part of the batch."""
        return jax.lax.axis_index(self.batch) if self.batch else 0

    def psum(self, values: Any) -> Any:
        """Sums values over the parts of the batch and of its sequences."""
        axes = (*self.batch, *self.sequence.axes)
        return jax.lax.psum(values, axes) if axes else values

    def over_devices(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Maps `function(batch, *whole)` over the devices, each with its part of the batch; all return the same."""
        if not self.manual:
            return function

        def split(batch: Any, *whole: Any) -> Any:
            specs = (PartitionSpec(self.batch or None), *(PartitionSpec() for _ in whole))
            mapped = jax.shard_map(
                function, axis_names=set(self.manual), in_specs=specs, out_specs=PartitionSpec(), check_vma=False
            )
            return mapped(batch, *whole)

        return split


UNSPLIT = BatchSplit()


def assign_windows(count: int, parts: int, rounds_before: int = 0) -> np.ndarray:
    """Assigns windows 0 .. count - 1 to `parts` devices, in rounds of neighbouring windows, which have similar shapes.

    Every other round is reversed, counted over all loops of a sequence, the earlier of which had `rounds_before`. Thus
    all devices get as much work, although a later window has a longer history.
    Returns int32 [rounds, parts]. If the first round is not full, it contains NO_WINDOW.
    """
    missing = -count % parts
    assigned = np.append(np.full(missing, NO_WINDOW), np.arange(count)).astype(np.int32).reshape(-1, parts)
    odd = slice(1 - rounds_before % 2, None, 2)
    assigned[odd] = assigned[odd, ::-1]
    return assigned
