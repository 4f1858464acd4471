"""Cross-entropy and its gradient in training: a GPU kernel in Pallas for Triton.

The kernel reads a token's logits twice, the plain version (`training.loss`) three times. Without the kernel a
step takes 7.7% longer at N = 512, and 2.1% at 8,192.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from tlinformer_jax.kernels.common import call_kernel, iota, masked_load, masked_store

# Columns per iteration of a program, and its warps. One program fills a multiprocessor, so that the rows in progress
# stay in an H100's cache between the two readings.
COLUMNS = 8192
WARPS = 32
# Below any logit, but finite: the difference of two infinities would be NaN.
LOWEST = -1e30


def loss_and_slope(
    logits: Float[Array, "tokens columns"],
    targets: Int[Array, " tokens"],
    weights: Float[Array, " tokens"],
    vocab_size: int,
    dtype: jnp.dtype,
    z_loss: float = 0.0,
    interpret: bool = False,
) -> tuple[Float[Array, " tokens"], Float[Array, "tokens columns"]]:
    """Returns cross-entropies in nats, and the logits' gradient of sum(weight * (loss + z_loss * log-sum-exp^2)).

    Columns past the vocabulary may contain any finite values; their gradient is 0.
    """
    tokens, columns = logits.shape
    return call_kernel(
        functools.partial(_kernel, vocab_size=vocab_size, columns=columns, z_loss=z_loss),
        (tokens,),
        [jax.ShapeDtypeStruct((tokens,), jnp.float32), jax.ShapeDtypeStruct((tokens, columns), dtype)],
        [logits, targets, weights],
        "loss_and_slope",
        interpret,
        num_warps=WARPS,
        num_stages=2,
    )


def _kernel(
    logits_ref, target_ref, weight_ref, loss_ref, slope_ref, *, vocab_size: int, columns: int, z_loss: float
) -> None:
    """Computes one token. Each of COLUMNS lanes has its own running maximum and sum."""
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
        masked_store(slope_ref.at[token, numbers], slope.astype(slope_ref.dtype), mask, eviction_policy="evict_first")

    # From the last column back, since the last columns are still in the cache.
    for tile in range(full, -(-columns // COLUMNS)):
        scatter(tile, whole=False)
    jax.lax.fori_loop(0, full, lambda index, _: scatter(full - 1 - index, whole=True), None)
