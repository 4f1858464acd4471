"""The axes of the device mesh, and the kind of device that a program is compiled for; importable without JAX.

Code that depends on the kind of device must ask this module, not JAX. The kind is that of JAX's default device, or
inside `target` that of a device which need not exist, so that programs for a TPU compile on a machine without one.
"""

import contextlib
import contextvars
import re
from collections.abc import Iterator, Mapping

from tlinformer_jax.errors import Rule

_TARGET: contextvars.ContextVar[tuple[str, str] | None] = contextvars.ContextVar("target", default=None)

# Axes of a mesh that a configuration names. One more, `data`, splits the batch over the remaining devices.
AXES = ("fsdp", "tensor", "window", "context", "expert")
_AXIS = rf"(?:{'|'.join(AXES)})=[1-9][0-9]{{0,8}}"
_MESH = re.compile(rf"(?!.*\b(\w+)=.*\b\1=)(?: *{_AXIS} *(?:, *{_AXIS} *)*)?")  # no axis twice
MESH_RULE = Rule(
    f"must be '' or AXIS=SIZE, separated by commas, such as 'fsdp=4,tensor=2'; the axes are {', '.join(AXES)}, each at "
    "most once; the remaining devices split the batch",
    lambda mesh: isinstance(mesh, str) and _MESH.fullmatch(mesh) is not None,
)


def axes_of(mesh: str) -> dict[str, int]:
    """Returns the sizes of the axes that a mesh such as 'fsdp=4,tensor=2' names."""
    return {name: int(size) for name, size in re.findall(r"(\w+)=(\d+)", mesh)}


def mesh_text(sizes: Mapping[str, int]) -> str:
    """Inverts `axes_of`; the text has the axes in the order of AXES and none of size 1."""
    return ",".join(f"{name}={sizes[name]}" for name in AXES if sizes.get(name, 1) > 1)


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
