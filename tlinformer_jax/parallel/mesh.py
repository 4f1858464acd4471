"""The sizes of the device mesh, and the kind of device that a program is compiled for; importable without JAX.

Code that depends on the kind of device must ask this module, not JAX. The kind is that of JAX's default device, or
inside `target` that of a device which need not exist, so that programs for a TPU compile on a machine without one.
"""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator

from tlinformer_jax.errors import ConfigError, check_fields, integer

_TARGET: contextvars.ContextVar[tuple[str, str] | None] = contextvars.ContextVar("target", default=None)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes. One more axis, `data`, splits the batch over the remaining devices.

    Attributes:
      fsdp: splits the batch and the parameters, of which `data`, `window` and `context` hold copies.
      tensor: splits heads and the feed-forward's features.
      window: splits the generation windows of each sequence, in training.
      context: splits the rows of the history, in training and in generation.
      expert: splits the batch and the experts of `model.num_experts`.
    """

    fsdp: int = 1
    tensor: int = 1
    window: int = 1
    context: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        check_fields("mesh", self, dict.fromkeys(dataclasses.asdict(self), integer(1)))

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Returns the sizes of all axes for `num_devices` devices."""
        sizes = dataclasses.asdict(self)
        data, left = divmod(num_devices, math.prod(sizes.values()))
        if left or not data:
            raise ConfigError("mesh", sizes, f"must have a product that divides {num_devices}, the number of devices")
        return {"data": data, **sizes}


@contextlib.contextmanager
def target(platform: str, kind: str) -> Iterator[None]:
    """Sets the platform ('tpu') and kind ('TPU v5 lite') of device for functions that are traced inside.

    JAX may reuse a cached trace of a function from another target, so create the functions to trace inside.
    """
    token = _TARGET.set((platform, kind))
    try:
        yield
    finally:
        _TARGET.reset(token)


def platform() -> str:
    """Returns the device's platform: 'cpu', 'gpu' or 'tpu'."""
    import jax  # imported here, because reading a configuration must not need JAX

    chosen = _TARGET.get()
    return jax.default_backend() if chosen is None else chosen[0]


def device_kind() -> str:
    """Returns the vendor's name of the device."""
    import jax

    chosen = _TARGET.get()
    return jax.devices()[0].device_kind if chosen is None else chosen[1]


def is_nvidia_gpu() -> bool:
    """Returns whether the device is an NVIDIA GPU, which cuDNN and Triton need."""
    return platform() == "gpu" and "nvidia" in device_kind().lower()
