"""The one merge of softmaxes over disjoint sets of keys: parts of a kernel, chunks of a history, rows of devices."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
