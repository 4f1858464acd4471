"""Loops over steps that share arrays: gradients of shared arrays are summed in float32, in the memory of one step.

`jax.checkpoint` in a `jax.lax.scan` would sum these gradients in the arrays' dtype. In bfloat16 a sum over a thousand
windows stops growing after a few hundred.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# One step: (shared, fixed, (rows, number)) -> output. It must not close over traced values.
Branch = Callable[[Any, Any, tuple[Any, Any]], Any]


def wide_zeros(shared: Any) -> Any:
    """Returns float32 zeros in the shapes of a pytree, to sum gradients in."""
    return jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), shared)


def add_wide(total: Any, gradient: Any) -> Any:
    """Adds a gradient to a float32 sum of gradients."""
    return jax.tree.map(lambda sum_, new: sum_ + new.astype(jnp.float32), total, gradient)


def rounded(total: Any, shared: Any) -> Any:
    """Casts a sum of gradients to the dtypes of the arrays in `shared`."""
    return jax.tree.map(lambda sum_, array: sum_.astype(array.dtype), total, shared)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def map_rows(branch: Branch, chunk: int, shared: Any, rows: Any, fixed: Any, count: jax.Array) -> Any:
    """Applies `branch(shared, fixed, (chunk of rows, index))` to the first `count` chunks; concatenates the outputs.

    Later chunks cost nothing although `count` is known only at run time: `jax.lax.scan` would run every chunk, and
    `jax.lax.while_loop` has no gradient. The backward pass computes each chunk again.

    Args:
      branch: one step; returns a pytree of arrays [batch, chunk, ...].
      chunk: rows of one step; divides `length`.
      shared: differentiable values that every step reads; their gradients are summed in float32.
      rows: differentiable arrays [batch, length, ...]. Outputs and gradients of skipped rows are 0.
      fixed: values that every step reads; they get no gradient.
      count: number of chunks, int32 []; at most length / chunk chunks run.
    """

    def body(number, outputs):
        return _put(outputs, branch(shared, fixed, (_take(rows, number, chunk), number)), number * chunk)

    shapes = jax.eval_shape(lambda: branch(shared, fixed, (_take(rows, 0, chunk), jnp.int32(0))))
    outputs = jax.tree.map(lambda s: jnp.zeros((s.shape[0], _length(rows), *s.shape[2:]), s.dtype), shapes)
    return jax.lax.fori_loop(0, jnp.minimum(count, _length(rows) // chunk), body, outputs)


def _rows_forward(branch, chunk, *inputs):
    return map_rows(branch, chunk, *inputs), inputs


def _rows_backward(branch, chunk, inputs, cotangents):
    shared, rows, fixed, count = inputs

    def body(number, state):
        total, row_gradients = state
        part, slope = _take((rows, cotangents), number, chunk)
        _, pull = jax.vjp(lambda shared, part: branch(shared, fixed, (part, number)), shared, part)
        gradient, part_gradient = pull(slope)
        return add_wide(total, gradient), _put(row_gradients, part_gradient, number * chunk)

    zero = wide_zeros(shared), jax.tree.map(jnp.zeros_like, rows)
    total, row_gradients = jax.lax.fori_loop(0, jnp.minimum(count, _length(rows) // chunk), body, zero)
    return rounded(total, shared), row_gradients, None, None


map_rows.defvjp(_rows_forward, _rows_backward)


def _length(rows: Any) -> int:
    return jax.tree.leaves(rows)[0].shape[1]


def _take(arrays: Any, number: jax.Array | int, chunk: int) -> Any:
    return jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, number * chunk, chunk, axis=1), arrays)


def _put(arrays: Any, parts: Any, start: jax.Array) -> Any:
    return jax.tree.map(
        lambda array, part: jax.lax.dynamic_update_slice_in_dim(array, part, start, axis=1), arrays, parts
    )
