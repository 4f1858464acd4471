"""GPU kernels of training that read each row once, in Pallas for Triton: LayerNorm's backward pass, and the loss.

By plain operations LayerNorm's sums over rows and those over features go apart: XLA writes a product of x and the
gradient in float32 and reads it back. Plain twin: `models.layers._plain_norm_backward`. Gain: without the kernel a step
takes 4.4% longer at N = 512, and 6.3% at 8,192.

By plain operations the logits of a chunk of tokens, by far the largest values of a training step, are read three times.
The kernel reads a token's logits for the log-sum-exp and again, from the cache, for the gradient. Plain twin:
`training.cross_entropy`. Gain: without the kernel a step takes 7.7% longer at N = 512, and 2.1% at 8,192.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from tlinformer_jax.kernels.common import available, call_kernel, iota, is_half, masked_load, masked_store, unsplit

# Rows that a program works on at once, its warps, and programs to aim for: four for each of an H100's multiprocessors.
ROWS = 8
NORM_WARPS = 8
PROGRAMS = 528
# Wider rows would not fit a program's registers.
MOST_WIDTH = 2048
# Columns that a program works on at once, and its warps: one program fills a multiprocessor, so that the rows under
# way on all 132 of an H100 stay in its 50 MB cache between the two readings.
COLUMNS = 8192
LOSS_WARPS = 32
# Below any logit, yet finite: the difference of two infinities would not be a number.
LOWEST = -1e30


# ---- LayerNorm


def use_norm_kernel(x: jax.Array) -> bool:
    """Whether the kernel takes rows of this dtype and width here; there must be some."""
    return is_half(x.dtype) and x.size > 0 and x.shape[-1] <= MOST_WIDTH and available("norm") and unsplit()


# Compiled on its own: XLA compiles a kernel once for all calls that are equal in every byte, line numbers included.
@functools.partial(jax.jit, static_argnames=("epsilon", "interpret"))
def layer_norm_backward(
    x: Float[Array, "*any D"],
    gradient: Float[Array, "*any D"],
    skip: Float[Array, "*any D"] | None,
    scale: Float[Array, " D"],
    epsilon: float,
    interpret: bool = False,
) -> tuple[Float[Array, "*any D"], Float[Array, " D"], Float[Array, " D"]]:
    """Gradients of x, in its dtype, and of scale and bias, float32; `skip` is added to the first."""
    width, rows = x.shape[-1], math.prod(x.shape[:-1])
    programs = min(PROGRAMS, pl.cdiv(rows, ROWS))
    operands = [array.reshape(rows, width) for array in (x, gradient, *(() if skip is None else (skip,)))]
    sums = jax.ShapeDtypeStruct((programs, width), jnp.float32)
    kernel = functools.partial(
        _norm_kernel, rows=rows, width=width, programs=programs, epsilon=epsilon, skips=skip is not None
    )
    x_gradient, scale_sums, bias_sums = call_kernel(
        kernel,
        (programs,),
        [jax.ShapeDtypeStruct((rows, width), x.dtype), sums, sums],
        [scale.astype(jnp.float32), *operands],
        "layer_norm_backward",
        interpret,
        num_warps=NORM_WARPS,
        num_stages=2,
    )
    return x_gradient.reshape(x.shape), jnp.sum(scale_sums, axis=0), jnp.sum(bias_sums, axis=0)


def _norm_kernel(
    scale_ref, x_ref, gradient_ref, *refs, rows: int, width: int, programs: int, epsilon: float, skips: bool
):
    """Every `programs`-th tile of the rows."""
    skip_ref = refs[0] if skips else None
    output_ref, scale_sum_ref, bias_sum_ref = refs[-3:]
    block, program = pl.next_power_of_2(width), pl.program_id(0)
    features = iota(block)
    inside = features < width
    scale = masked_load(scale_ref.at[features], inside)[None, :]

    def tile(index, carry):
        scale_sum, bias_sum = carry
        numbers = (index * programs + program) * ROWS + iota(ROWS)
        mask = (numbers < rows)[:, None] & inside[None, :]

        def read(ref) -> jax.Array:
            return masked_load(ref.at[numbers[:, None], features[None, :]], mask).astype(jnp.float32)

        x, gradient = read(x_ref), read(gradient_ref)
        centred = jnp.where(mask, x - jnp.sum(x, axis=1, keepdims=True) / width, 0.0)
        inverse = jax.lax.rsqrt(jnp.sum(centred * centred, axis=1, keepdims=True) / width + epsilon)
        normed, scaled = centred * inverse, gradient * scale
        shift = jnp.sum(scaled, axis=1, keepdims=True) / width
        slope = jnp.sum(scaled * normed, axis=1, keepdims=True) / width
        result = (scaled - shift - normed * slope) * inverse
        if skip_ref is not None:
            result += read(skip_ref)
        place = output_ref.at[numbers[:, None], features[None, :]]
        masked_store(place, result.astype(output_ref.dtype), mask)
        return scale_sum + gradient * normed, bias_sum + gradient

    zero = jnp.zeros((ROWS, block), jnp.float32)
    sums = jax.lax.fori_loop(0, pl.cdiv(rows, ROWS * programs), tile, (zero, zero))
    for ref, values in zip((scale_sum_ref, bias_sum_ref), sums):
        masked_store(ref.at[program, features], jnp.sum(values, axis=0), inside)


# ---- The loss


def use_loss_kernel() -> bool:
    """Whether the kernel runs here: on an NVIDIA GPU, where no mesh of several splits the batch."""
    return available("loss") and unsplit()


def loss_and_slope(
    logits: Float[Array, "tokens columns"],
    targets: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    vocab_size: int,
    dtype: jnp.dtype,
    z_loss: float = 0.0,
    interpret: bool = False,
) -> tuple[Float[Array, " tokens"], Float[Array, "tokens columns"]]:
    """Cross-entropy of tokens in nats, and the gradient of its weighted sum by their logits, in `dtype`.

    The gradient is that of cross-entropy + z_loss * Z^2, where Z is the log-sum-exp of a token's logits.

    Columns of the logits past the vocabulary may hold anything finite; the gradient is 0 there.
    """
    tokens, columns = logits.shape
    return call_kernel(
        functools.partial(_loss_kernel, vocab_size=vocab_size, columns=columns, z_loss=z_loss),
        (tokens,),
        [jax.ShapeDtypeStruct((tokens,), jnp.float32), jax.ShapeDtypeStruct((tokens, columns), dtype)],
        [logits, targets, weights],
        "loss_and_slope",
        interpret,
        num_warps=LOSS_WARPS,
        num_stages=2,
    )


def _loss_kernel(
    logits_ref, target_ref, weight_ref, loss_ref, slope_ref, *, vocab_size: int, columns: int, z_loss: float
) -> None:
    """One token. Each of COLUMNS lanes has a running maximum and sum of its own until the last column is read."""
    token = pl.program_id(0)
    lanes = iota(COLUMNS)
    full = vocab_size // COLUMNS

    def read(tile, whole: bool, policy: str) -> jax.Array:
        numbers = tile * COLUMNS + lanes
        mask = None if whole else numbers < vocab_size
        return masked_load(logits_ref.at[token, numbers], mask, LOWEST, eviction_policy=policy)

    def gather(tile, carry, whole: bool = True):
        top, total = carry
        values = read(tile, whole, "evict_last")
        smaller = jnp.exp(-jnp.abs(values - top))
        return jnp.maximum(values, top), jnp.where(values > top, total * smaller + 1.0, total + smaller)

    carry = jnp.full((COLUMNS,), LOWEST, jnp.float32), jnp.zeros((COLUMNS,), jnp.float32)
    carry = jax.lax.fori_loop(0, full, gather, carry)
    if vocab_size % COLUMNS:
        carry = gather(full, carry, whole=False)
    tops, totals = carry
    top = jnp.max(tops)
    norm = top + jnp.log(jnp.sum(totals * jnp.exp(tops - top)))
    target, weight = masked_load(target_ref.at[token]), masked_load(weight_ref.at[token])
    masked_store(loss_ref.at[token], norm - masked_load(logits_ref.at[token, target]))

    def scatter(tile, whole: bool) -> None:
        numbers = tile * COLUMNS + lanes
        share = jnp.exp(read(tile, whole, "evict_first") - norm)
        if z_loss:
            share *= 1.0 + 2.0 * z_loss * norm
        slope = (share - (numbers == target)) * weight
        mask = None if whole else numbers < columns
        place = slope_ref.at[token, numbers]
        masked_store(place, slope.astype(slope_ref.dtype), mask, eviction_policy="evict_first")

    # From the last column back: the cache has those for certain.
    for tile in range(full, -(-columns // COLUMNS)):
        scatter(tile, whole=False)
    jax.lax.fori_loop(0, full, lambda index, _: scatter(full - 1 - index, whole=True), None)
