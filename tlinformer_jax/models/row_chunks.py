"""A loop over chunks of rows whose number is known at run time only: rows past it cost nothing.

`jax.lax.scan` takes every chunk, and a `jax.lax.while_loop` has no gradient. Here the backward pass goes through as
many chunks as the forward pass did and computes each again, so that its intermediate values never exist for all rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tlinformer_jax.models.recompute import add_wide, rounded, wide_zeros

# One step: (shared, chunk of rows, fixed, number of the chunk) -> outputs. It must not close over traced values.
RowBranch = Callable[[Any, Any, Any, jax.Array], Any]


def map_rows(branch: RowBranch, shared: Any, rows: Any, fixed: Any, chunk: int, count: jax.Array) -> Any:
    """Outputs of `branch(shared, chunk of rows, fixed, number)` for the first `count` chunks, side by side.

    Args:
      branch: one step; returns a pytree of arrays [batch, chunk, ...].
      shared: pytree of floating arrays that every step reads; differentiated, gradients summed in float32.
      rows: pytree of floating arrays [batch, length, ...]; differentiated.
      fixed: pytree that every step reads; not differentiated.
      chunk: rows of a step; divides length.
      count: int32 [], at most length / chunk; what is above it counts as that.

    Returns:
      arrays [batch, length, ...]; rows of chunks that are left out are 0, and so are their gradients.
    """
    return _map_rows(branch, chunk, shared, rows, fixed, jnp.minimum(count, _length(rows) // chunk))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _map_rows(branch, chunk, shared, rows, fixed, count):
    def body(number, outputs):
        return _put(outputs, branch(shared, _take(rows, number, chunk), fixed, number), number * chunk)

    shapes = jax.eval_shape(lambda: branch(shared, _take(rows, 0, chunk), fixed, jnp.int32(0)))
    outputs = jax.tree.map(lambda s: jnp.zeros((s.shape[0], _length(rows), *s.shape[2:]), s.dtype), shapes)
    return jax.lax.fori_loop(0, count, body, outputs)


def _forward(branch, chunk, *inputs):
    return _map_rows(branch, chunk, *inputs), inputs


def _backward(branch, chunk, inputs, cotangents):
    shared, rows, fixed, count = inputs

    def body(number, state):
        total, row_gradients = state
        part, slope = _take((rows, cotangents), number, chunk)
        _, pull = jax.vjp(lambda shared, part: branch(shared, part, fixed, number), shared, part)
        gradient, part_gradient = pull(slope)
        return add_wide(total, gradient), _put(row_gradients, part_gradient, number * chunk)

    zero = wide_zeros(shared), jax.tree.map(jnp.zeros_like, rows)
    total, row_gradients = jax.lax.fori_loop(0, count, body, zero)
    return rounded(total, shared), row_gradients, None, None


_map_rows.defvjp(_forward, _backward)


def _length(rows: Any) -> int:
    return jax.tree.leaves(rows)[0].shape[1]


def _take(arrays: Any, number: jax.Array | int, chunk: int) -> Any:
    return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, number * chunk, chunk, axis=1), arrays)


def _put(arrays: Any, parts: Any, start: jax.Array) -> Any:
    return jax.tree.map(
        lambda array, part: jax.lax.dynamic_update_slice_in_dim(array, part, start, axis=1), arrays, parts
    )
