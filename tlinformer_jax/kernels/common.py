"""Code that kernels share: checks whether they can run, calls, loads, products, and the hash of dropout."""

import functools
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from tlinformer_jax.parallel.mesh import is_nvidia_gpu
from tlinformer_jax.parallel.sharding import open_axes

# Kernel -> operation that it computes if `available`; otherwise plain JAX does.
OPERATIONS = {
    "norm": "LayerNorm's gradient",
    "loss": "loss and its gradient",
    "dropout": "attention with dropout",
    "decode": "token step",
    "history": "prefill and slide",
}
LOG2_E = 1.4426950408889634
# Smallest inner dimension of the matrix units.
LEAST_PIECE = 16

# Step of the first word from key to key (2^32 / golden ratio), and two multipliers that mix 32 bits well.
STEP, FIRST, SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B


class Scores(NamedTuple):
    """Scale of the scores and which of them are computed; known when a kernel is compiled."""

    scale: float
    causal: bool = False  # query i sees only keys 0 .. i
    window: int | None = None  # query i sees only the last `window` of these keys; None for all


def usable(name: str, dtype: Any) -> bool:
    """Returns whether a training kernel can run here for arrays of this dtype.

    False if the compiler partitions the program over devices: XLA cannot split a kernel's operands.
    """
    return is_half(dtype) and available(name) and not open_axes()


def available(name: str) -> bool:
    """Returns whether there is an NVIDIA GPU and Pallas has a working back end for it."""
    assert name in OPERATIONS
    return is_nvidia_gpu() and why_no_triton() is None


def addressable(arrays: Any) -> bool:
    """Returns whether kernels reach every element of a tree of arrays.

    JAX's Triton back end counts an array's elements in signed 32 bits up to 2^32 bytes, and in 64 bits beyond. So in an
    int8 array of up to 2^32 elements, those from 2^31 on would have negative offsets.
    """
    return all(array.size <= 2**31 or array.size * array.dtype.itemsize > 2**32 for array in jax.tree.leaves(arrays))


def is_half(dtype: Any) -> bool:
    """Returns whether this is a dtype of the half-precision kernels."""
    return dtype in (jnp.bfloat16, jnp.float16)


def serving() -> str:
    """Returns a line that says which kernels compute which operations on this machine."""
    if not is_nvidia_gpu():
        return "kernels: plain JAX, because this is not an NVIDIA GPU"
    reason = why_no_triton()
    if reason is not None:
        return f"kernels: Pallas's Triton back end does not work here ({reason}); plain JAX instead"
    return "kernels: " + ", ".join(f"{name} ({operation})" for name, operation in OPERATIONS.items())


@functools.cache
def why_no_triton() -> str | None:
    """Returns why this JAX cannot lower a Triton kernel; None if it can."""
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
        except RuntimeError as error:
            # JAX 0.12 lowers for a GPU only where there is one, which says nothing about Triton.
            if "No supported GPU" not in str(error):
                raise

    # A separate thread has no mesh set and no trace under way.
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
    """Runs a kernel on whole arrays; `aliases` maps operands to outputs that share their memory."""
    from jax.experimental.pallas import triton  # imported only with a GPU: optional in jaxlib

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
    """Loads the values of a reference; masked-out values are `other`."""
    from jax.experimental.pallas import triton

    if mask is None:
        return triton.load(ref, **options)
    return triton.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=other, **options)


def masked_store(ref: Any, value: Array, mask: Array | None = None, **options: Any) -> None:
    """Stores values to a reference, except masked-out ones."""
    from jax.experimental.pallas import triton

    triton.store(ref, value, mask=mask, **options)


def iota(size: int) -> Array:
    """Returns int32 0 .. size - 1."""
    return jax.lax.broadcasted_iota(jnp.int32, (size,), 0)


def dot(left: Array, right: Array, contracted: int) -> Array:
    """Multiplies left [m, k] and right over right's axis `contracted`, in float32."""
    axes = (((1,), (contracted,)), ((), ()))
    return jax.lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)


def powers(
    scores: Float[Array, "queries rows"], shift: Float[Array, " queries"], scale: float, interpret: bool
) -> Float[Array, "queries rows"]:
    """Returns 2^(scores * scale - shift), by one multiplication with addition and one exponential each.

    XLA would compile `jnp.exp2` to a multiplication, a subtraction and an exponential that keeps results below 2^-126.
    Here these are 0.
    """
    if interpret:
        return jnp.exp2(scores * scale - shift[:, None])
    from jax.experimental.pallas import triton

    factor = np.float32(scale).view(np.uint32)
    code = f"{{ .reg .f32 power; fma.rn.f32 power, $1, 0f{factor:08X}, $2; ex2.approx.ftz.f32 $0, power; }}"
    shape = jax.ShapeDtypeStruct(scores.shape, jnp.float32)
    operands = [scores, jnp.broadcast_to(-shift[:, None], scores.shape)]
    return triton.elementwise_inline_asm(
        code, args=operands, constraints="=f,f,f", pack=1, result_shape_dtypes=[shape]
    )[0]


def feature_pieces(width: int, least: int = 1) -> tuple[tuple[int, int], ...]:
    """Returns (start, size) of pieces that cover `width` features; sizes are powers of two, at least `least`.

    For example with `least` 16, 36 features become pieces of 32 and 16, the latter with 12 features of padding.
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
    """Merges attention to disjoint sets of keys into exact attention to their union.

    Args:
      output: each set's output; or its sum of values times exp(score - lse), not normalised, with `total`.
      lse: log-sum-exp of each set's scaled scores; -inf if the set has no valid key.
      axis: the axis of the sets: an axis of `lse`, or the name of a manual axis of the mesh.
      total: each set's sum of exp(score - lse); 1 if `output` is normalised.

    Returns:
      output and log-sum-exp without that axis, on every device; 0 and -inf if no set has a valid key.
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
    """Applies Threefry-2x32 with 20 rounds under the key (first, second) to a pair of counters, all uint32."""
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
    """Returns which weights dropout keeps, given their row's state (first, second) and their keys' indices."""
    bits = mixed(first + keys.astype(jnp.uint32) * np.uint32(STEP), second)
    return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def mixed(bits: jax.Array, joined: jax.Array) -> jax.Array:
    """Hashes 32 bits by two rounds of shift, xor and multiplication; `joined` enters between the rounds."""
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(FIRST)
    return (bits ^ (bits >> np.uint32(15)) ^ joined) * np.uint32(SECOND)
