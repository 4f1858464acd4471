"""The device mesh: one named mesh for every machine, from one CPU to a pod."""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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


def check_sequence_axes(mesh: "Mesh", architecture: str, windowed: bool, windows: int) -> None:
    """Refuses axes that split a sequence where it cannot be split so.

    Args:
      mesh: the mesh.
      architecture: its name, for the message.
      windowed: whether the architecture works by generation windows.
      windows: of a sequence, that are trained on.

    Raises:
      ConfigError: naming the axis.
    """
    for name in ("window", "context"):
        if mesh.shape[name] > 1 and not windowed:
            raise ConfigError(f"mesh.{name}", mesh.shape[name], f"must be 1 for model.architecture = {architecture!r}")
    if mesh.shape["window"] > windows:
        raise ConfigError("mesh.window", mesh.shape["window"], f"must be at most the {windows} windows of a sequence")
