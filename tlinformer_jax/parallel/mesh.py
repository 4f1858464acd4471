"""The device mesh: one named mesh for every machine, from one CPU to a pod."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tlinformer_jax.errors import ConfigError

if TYPE_CHECKING:
    from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes; at most one may be -1, which takes the devices that are left.

    Attributes:
      data: splits the batch; parameters are replicated over it.
      fsdp: splits the batch and the parameters.
      tensor: splits heads and the feed-forward's features.
      window: splits the generation windows of each sequence in training; parameters are replicated over it.
      context: splits the rows of the history, in training and in generation; parameters are replicated over it.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    window: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        for name, size in dataclasses.asdict(self).items():
            if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
                raise ConfigError(f"mesh.{name}", size, "must be an integer >= 1, or -1 for the devices left")
        left = [name for name, size in dataclasses.asdict(self).items() if size == -1]
        if len(left) > 1:
            raise ConfigError(f"mesh.{left[1]}", -1, f"only one axis of the mesh may be -1, and mesh.{left[0]} is")

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Axis sizes for `num_devices` devices.

        Raises:
          ConfigError: if they do not multiply to that number.
        """
        sizes = dataclasses.asdict(self)
        fixed = math.prod(size for size in sizes.values() if size != -1)
        for name, size in sizes.items():
            if size == -1:
                if num_devices % fixed:
                    raise ConfigError("mesh", sizes, f"must divide the {num_devices} devices of this machine")
                sizes[name] = num_devices // fixed
        if math.prod(sizes.values()) != num_devices:
            raise ConfigError("mesh", sizes, f"must multiply to the {num_devices} devices of this machine")
        return sizes


def build_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> "Mesh":
    """The mesh over `devices` (default: all), every axis for the compiler to partition (AxisType.Auto).

    Raises:
      ConfigError: if the axes do not multiply to the number of devices.
    """
    import jax  # here, because a configuration is read before anything needs devices
    from jax.sharding import AxisType

    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def connect(mesh: "Mesh") -> None:
    """Lets the processes of a mesh connect, group of devices by group; every process calls it.

    On CPUs a group connects when a program first needs it. Of two groups that need not wait for each other, one process
    may begin with the one and another process with the other, and then both wait in vain.
    """
    import jax
    from jax.sharding import PartitionSpec

    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    axes = [name for name, size in mesh.shape.items() if size > 1]
    for count in range(1, len(axes) + 1):
        for names in itertools.combinations(axes, count):
            add = functools.partial(jax.lax.psum, axis_name=names)
            whole = PartitionSpec()
            everywhere = jax.shard_map(add, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
            jax.block_until_ready(jax.jit(everywhere)(np.float32(1)))


def ways(mesh: "Mesh", axes: Sequence[str]) -> int:
    """Parts that `axes` of a mesh split something into."""
    return math.prod(mesh.shape[name] for name in axes)


def check_batch_divides(batch_size: int, mesh: "Mesh", field: str) -> None:
    """Refuses a batch that the mesh's batch axes cannot split evenly.

    Raises:
      ConfigError: naming `field`.
    """
    parts = ways(mesh, ("data", "fsdp"))
    if batch_size % parts:
        raise ConfigError(field, batch_size, f"must be divisible by {parts} (mesh.data * mesh.fsdp)")
