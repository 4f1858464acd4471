"""What the kernels share: whether and how they are called, loads and products, dropout's hash."""

import functools
import threading
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from tlinformer_jax.parallel.mesh import is_nvidia_gpu
from tlinformer_jax.parallel.sharding import open_axes

# Operation -> what computes it where `available` says so; plain JAX computes it elsewhere.
OPERATIONS = {
    "norm": "LayerNorm's gradient",
    "loss": "loss and its gradient",
    "dropout": "attention with dropout",
    "decode": "token step",
    "history": "prefill and slide",
}
LOG2_E = 1.4426950408889634
# The matrix units' least inner dimension.
LEAST_PIECE = 16

# Step of the first word from key to key (2^32 over the golden ratio), and two multipliers that mix 32 bits well.
STEP, FIRST, SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B


class Scores(NamedTuple):
    """Which products of queries and keys count; known when a kernel is compiled."""

    scale: float
    causal: bool = False  # query i sees keys 0 .. i only
    window: int | None = None  # the last of those; None for all


class Rotations(Protocol):
    """Rotary tables, [..., d_h / 2] each."""

    @property
    def cos(self) -> jax.Array: ...

    @property
    def sin(self) -> jax.Array: ...


def usable(name: str, dtype: Any) -> bool:
    """Whether the kernel of an operation of training takes arrays of this dtype here.

    Not in a program of several devices: XLA cannot split a kernel's operands over them.
    """
    return is_half(dtype) and available(name) and not open_axes()


def available(name: str) -> bool:
    """Whether there is an NVIDIA GPU for which Pallas has a working back end."""
    assert name in OPERATIONS
    return is_nvidia_gpu() and why_no_triton() is None


def is_half(dtype: Any) -> bool:
    """Whether the kernels for half precision take arrays of this dtype."""
    return dtype in (jnp.bfloat16, jnp.float16)


def serving() -> str:
    """One line on which kernels serve which operations on this machine."""
    if not is_nvidia_gpu():
        return "kernels: none of our own here, plain JAX"
    reason = why_no_triton()
    if reason is not None:
        return f"kernels: Pallas's Triton back end does not work here ({reason}); plain JAX instead"
    return "kernels: " + ", ".join(f"{name} ({operation})" for name, operation in OPERATIONS.items())


@functools.cache
def why_no_triton() -> str | None:
    """Why a Triton kernel cannot be lowered by this JAX; None if it can."""
    found: list[str] = []

    def lower() -> None:
        def copy(source: Any, target: Any) -> None:
            target[...] = source[...]

        shape = jax.ShapeDtypeStruct((16,), jnp.float32)
        try:
            call = functools.partial(call_kernel, copy, (1,), shape, num_warps=1, num_stages=1)
            function = jax.jit(lambda array: call([array], "probe", False))
            function.trace(shape).lower(lowering_platforms=("cuda",))
        except (ImportError, NotImplementedError) as error:
            found.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160])

    # In a thread of its own, where no mesh is set and nothing is being traced.
    thread = threading.Thread(target=lower)
    thread.start()
    thread.join()
    return found[0] if found else None


def call_kernel(
    kernel: Any,
    grid: tuple[int, ...],
    outputs: Any,
    operands: Any,
    name: str,
    interpret: bool,
    aliases: dict[int, int] | None = None,
    **options: int,
) -> Any:
    """Runs a kernel on whole arrays; `aliases` maps operands to outputs in their place."""
    from jax.experimental.pallas import triton  # only where there is a GPU: it is optional in jaxlib

    call = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=outputs,
        input_output_aliases=aliases or {},
        compiler_params=None if interpret else triton.CompilerParams(**options),
        interpret=interpret,
        name=name,
    )
    return call(*operands)


def masked_load(ref: Any, mask: Array | None = None, other: float = 0, **options: Any) -> Array:
    """What a reference points to, `other` where masked out."""
    from jax.experimental.pallas import triton

    if mask is None:
        return triton.load(ref, **options)
    return triton.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=other, **options)


def masked_store(ref: Any, value: Array, mask: Array | None = None, **options: Any) -> None:
    """Writes to what a reference points to, but where masked out."""
    from jax.experimental.pallas import triton

    triton.store(ref, value, mask=mask, **options)


def iota(size: int) -> Array:
    """0 .. size - 1."""
    return jax.lax.broadcasted_iota(jnp.int32, (size,), 0)


def dot(left: Array, right: Array, contracted: int) -> Array:
    """Product of left [m, k] and right over axis `contracted`, in float32."""
    axes = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


def feature_pieces(width: int, least: int = 1) -> tuple[tuple[int, int], ...]:
    """(start, size) of pieces that cover `width` features; sizes are powers of two from `least` on.

    With `least` 16, 36 features are 32 and 16, of which 12 are padding.
    """
    pieces, start = [], 0
    while start < width:
        size = max(least, 1 << ((width - start).bit_length() - 1))
        pieces.append((start, size))
        start += size
    whole = pl.next_power_of_2(width)
    return tuple(pieces) if start < whole else ((0, max(least, whole)),)


def merge_softmaxes(
    output: Float[Array, "*sets d_h"],
    lse: Float[Array, "*sets"],
    axis: int | str,
    total: Float[Array, "*sets"] | float = 1.0,
) -> tuple[Array, Array]:
    """Exact attention to the union of disjoint sets of keys, from the attention to each of them.

    Args:
      output: of each set, [..., d_h]; or sums of values times exp(score - lse), with `total`, the sum of the weights.
      lse: log-sum-exp of the set's scaled scores, [...]; -inf where there is no valid key.
      axis: what counts the sets: an axis of lse, or a manual axis of the mesh by its name.
      total: 1 where `output` is normalised.

    Returns:
      both without that axis, on every device; 0 and -inf where no set has a valid key.
    """
    if isinstance(axis, str):
        largest = functools.partial(jax.lax.pmax, axis_name=axis)
        summed = functools.partial(jax.lax.psum, axis_name=axis)
    else:
        largest, summed = functools.partial(jnp.max, axis=axis), functools.partial(jnp.sum, axis=axis)
    top = largest(jax.lax.stop_gradient(lse))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    factor = jnp.exp(lse - top)
    weight = summed(total * factor)
    seen = weight > 0
    weight = jnp.where(seen, weight, 1.0)
    merged = summed(output * factor[..., None]) / weight[..., None]
    return merged, jnp.where(seen, jnp.log(weight) + top, -jnp.inf)


def threefry(first: jax.Array, second: jax.Array, *counter: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds of a pair of counters, all uint32."""
    schedule = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    x, y = counter[0] + first, counter[1] + second
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn))) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def kept(first: jax.Array, second: jax.Array, keys: jax.Array, rate: float) -> jax.Array:
    """Whether weights are kept, by their row's state and their key's number."""
    bits = mixed(first + keys.astype(jnp.uint32) * np.uint32(STEP), second)
    return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def mixed(bits: jax.Array, joined: jax.Array) -> jax.Array:
    """32 bits through two rounds of shift, xor and multiplication, 32 others joining in between."""
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(FIRST)
    return (bits ^ (bits >> np.uint32(15)) ^ joined) * np.uint32(SECOND)
