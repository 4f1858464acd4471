"""The device that a program is traced for: JAX's default one, or, inside `target`, one that is not there.

What depends on the kind of device, such as the choice of a kernel, asks here and not JAX, so that a program can be
compiled for a TPU on a machine without one (`tools/training_topology.py`).
"""

import contextlib
import contextvars
from collections.abc import Iterator

_TARGET: contextvars.ContextVar[tuple[str, str] | None] = contextvars.ContextVar("target", default=None)


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
