"""The delta rule of Gated DeltaNet by the kernels of jax-linear-attention, an optional package, for Hopper GPUs.

The plain version is `models.delta.delta_chunked`; it runs wherever the kernels cannot (see `why_plain`).
"""

import importlib.util
from typing import Any

from jaxtyping import Array, Float

from tlinformer_jax.config.delta import WIDTHS
from tlinformer_jax.kernels.common import is_half
from tlinformer_jax.parallel.mesh import device_kind, is_nvidia_gpu

HOPPER = ("h100", "h200", "h800", "gh200")
Rows = Float[Array, "batch length heads d"]
Gates = Float[Array, "batch length heads"]
State = Float[Array, "batch heads d d"]


def why_plain(dtype: Any, width: int, partitioned: bool) -> str | None:
    """Returns why the kernels cannot compute heads of `width` features in `dtype` here; None if they can.

    `partitioned` is true if the compiler partitions the program over devices (axes fsdp and tensor).
    """
    if not is_nvidia_gpu() or not any(name in device_kind().lower() for name in HOPPER):
        return "the kernels of jax-linear-attention are for Hopper GPUs"
    if importlib.util.find_spec("jla") is None:
        return "jax-linear-attention is not installed: pip install 'tlinformer-jax[linear-attention]'"
    if not is_half(dtype):
        return f"the kernels need half precision, not {dtype}"
    if width not in WIDTHS:
        return f"the kernels need heads of 64 or 128 features, not {width}"
    return "the kernels cannot be partitioned over the mesh's axes fsdp and tensor" if partitioned else None


def serving(dtype: Any, width: int, partitioned: bool) -> str:
    """Returns a line that says which code computes the delta rule."""
    reason = why_plain(dtype, width, partitioned)
    return f"delta rule: {'kernels of jax-linear-attention' if reason is None else f'plain JAX ({reason})'}"


def delta_rows(query: Rows, key: Rows, value: Rows, decay: Gates, write: Gates, state: State) -> tuple[Rows, State]:
    """Computes `models.delta.delta_chunked` by the kernels; only if `why_plain` returns None."""
    from jla import ops

    return ops.linear_attention(
        "gated_deltanet",
        *(query, key, value),
        g=decay,
        beta=write,
        initial_state=state,
        output_final_state=True,
        impl="mosaic_gpu",
    )
