"""Loops over steps that share arrays: gradients of shared arrays are summed in float32, in the memory of one step.

`jax.checkpoint` in a `jax.lax.scan` would sum these gradients in the arrays' dtype. In bfloat16 a sum over a thousand
windows stops growing after a few hundred.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# One step: (shared, constants, (item, number)) -> output. It must not close over traced values.
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def map_steps(branch: Branch, shared: Any, items: Any, constants: Any, count: jax.Array | int) -> Any:
    """Applies `branch(shared, constants, (item, number))` to the first `count` items, and stacks the outputs.

    Later items cost nothing although `count` is known only at run time: `jax.lax.scan` would run every step, and
    `jax.lax.while_loop` has no gradient. The backward pass computes each step again.

    Args:
      branch: one step; returns a pytree of arrays.
      shared: differentiable values that every step reads; their gradients are summed in float32.
      items: differentiable arrays [steps, ...]. Outputs and gradients of skipped items are 0.
      constants: values that every step reads; they get no gradient.
      count: number of steps, int32 []; at most as many as there are items.
    """

    def body(number, outputs):
        return _put(outputs, branch(shared, constants, (_take(items, number), number)), number)

    shapes = jax.eval_shape(lambda: branch(shared, constants, (_take(items, 0), jnp.int32(0))))
    outputs = jax.tree.map(lambda s: jnp.zeros((_steps(items), *s.shape), s.dtype), shapes)
    return jax.lax.fori_loop(0, jnp.minimum(count, _steps(items)), body, outputs)


def _forward(branch, *inputs):
    return map_steps(branch, *inputs), inputs


def _backward(branch, inputs, cotangents):
    shared, items, constants, count = inputs

    def body(number, state):
        total, item_gradients = state
        item, slope = _take((items, cotangents), number)
        _, pull = jax.vjp(lambda shared, item: branch(shared, constants, (item, number)), shared, item)
        gradient, item_gradient = pull(slope)
        return add_wide(total, gradient), _put(item_gradients, item_gradient, number)

    zero = wide_zeros(shared), jax.tree.map(jnp.zeros_like, items)
    total, item_gradients = jax.lax.fori_loop(0, jnp.minimum(count, _steps(items)), body, zero)
    return rounded(total, shared), item_gradients, None, None


map_steps.defvjp(_forward, _backward)


def _steps(items: Any) -> int:
    return jax.tree.leaves(items)[0].shape[0]


def _take(items: Any, number: jax.Array | int) -> Any:
    return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, number, keepdims=False), items)


def _put(items: Any, item: Any, number: jax.Array) -> Any:
    return jax.tree.map(lambda array, new: jax.lax.dynamic_update_index_in_dim(array, new, number, 0), items, item)
