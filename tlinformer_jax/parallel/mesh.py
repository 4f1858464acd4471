"""The devices that a program is for, without JAX: the sizes of their mesh, and their kind.

What depends on the kind of device asks here. It is that of JAX's default device or, inside `target`, of one that is not
there: so programs for a TPU compile without one.
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
    """Sizes of the mesh's axes. A further axis, `data`, takes the devices that these leave, and splits the batch.

    Attributes:
      fsdp: splits the batch and the parameters, which are replicated over the other axes but `tensor` and `expert`.
      tensor: splits heads and the feed-forward's features.
      window: splits the generation windows of each sequence in training.
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
        """Sizes of all axes for `num_devices` devices."""
        sizes = dataclasses.asdict(self)
        data, left = divmod(num_devices, math.prod(sizes.values()))
        if left or not data:
            raise ConfigError("mesh", sizes, f"must multiply to a divisor of the {num_devices} devices of this machine")
        return {"data": data, **sizes}


@contextlib.contextmanager
def target(platform: str, kind: str) -> Iterator[None]:
    """Lets what is traced inside be for a device of this platform ('tpu') and kind ('TPU v5 lite').

    What JAX has traced before, for another target, it may take from its cache: trace functions of your own inside.
    """
    token = _TARGET.set((platform, kind))
    try:
        yield
    finally:
        _TARGET.reset(token)


def platform() -> str:
    """The device's platform: 'cpu', 'gpu' or 'tpu'."""
    import jax  # here, because a configuration is read before anything needs devices

    chosen = _TARGET.get()
    return jax.default_backend() if chosen is None else chosen[0]


def device_kind() -> str:
    """What the device's maker calls it."""
    import jax

    chosen = _TARGET.get()
    return jax.devices()[0].device_kind if chosen is None else chosen[1]


def is_nvidia_gpu() -> bool:
    """Whether it is an NVIDIA GPU, which cuDNN is for and Triton compiles for."""
    return platform() == "gpu" and "nvidia" in device_kind().lower()
