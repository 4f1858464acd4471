"""Loops over steps that share arrays, whose gradients are summed in float32 and whose memory is that of one step.

`jax.checkpoint` around the body of a `jax.lax.scan` gives a loop whose steps are computed again in the backward pass,
but adds up the gradients of shared arrays in the arrays' dtype: in bfloat16 the sum over a thousand windows stops
growing after a few hundred. Here each step's gradient is added in float32.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import ModelConfig


def recomputed(function: Callable[..., Any], config: ModelConfig, in_loop: bool = False) -> Callable[..., Any]:
    """`function`, all but `config.saved_names` of it computed again in the backward pass.

    Args:
      function: of arrays only.
      config: of the model.
      in_loop: whether it is the body of a loop, where XLA cannot undo this by noticing that it computes twice.
    """
    policy = jax.checkpoint_policies.save_only_these_names(*config.saved_names)
    return jax.checkpoint(function, policy=policy, prevent_cse=not in_loop)


# One step: (shared, part, fixed, step) -> output. It must not close over traced values.
Branch = Callable[[Any, Any, Any, Any], Any]


def map_recomputed(branch: Branch, shared: Any, parts: Any, fixed: Any, steps: Any) -> Any:
    """Outputs of `branch(shared, parts[i], fixed, steps[i])` for every i, stacked along a new first axis.

    Each step is computed again in the backward pass.

    Args:
      branch: one step.
      shared: pytree of floating arrays that every step reads; differentiated, gradients summed in float32.
      parts: pytree of floating arrays [steps, ...] (or empty), a slice for each step; differentiated.
      fixed: pytree that every step reads; not differentiated.
      steps: pytree of arrays [steps, ...], a slice for each step; not differentiated.
    """
    return _map(branch, shared, parts, fixed, steps)


def sum_with_gradients(
    branches: tuple[Branch, ...],
    shared: Any,
    parts: Any,
    fixed: Any,
    steps: Any,
    which: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The sums of `branches[which[i]](shared, parts[i], fixed, steps[i])` over every i, and each step's first value.

    Steps of different static shapes can take turns; what one of them needs exists while it runs only. Where the sum is
    differentiated, each step's gradient is made along with its value, so that nothing is kept from one step for a later
    backward pass, and nothing is computed twice.

    Args:
      branches: each returns two float32 [], of which the first is differentiated; more than one needs `which`.
      shared, parts, fixed, steps: as `map_recomputed` takes them.
      which: the branch of each step, int32 [steps].

    Returns:
      float32 []; and float32 [] and float32 [steps], through which no gradient flows.
    """
    (total, beside), each = _sum(branches, shared, parts, fixed, steps, which)
    return total, jax.lax.stop_gradient(beside), jax.lax.stop_gradient(each)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map(branch, shared, parts, fixed, steps):
    return jax.lax.scan(lambda _, item: (None, branch(shared, item[0], fixed, item[1])), None, (parts, steps))[1]


def _map_forward(branch, *inputs):
    return _map(branch, *inputs), inputs


def _map_backward(branch, inputs, cotangents):
    shared, parts, fixed, steps = inputs

    def body(total, item):
        part, step, cotangent = item
        _, pull = jax.vjp(lambda shared, part: branch(shared, part, fixed, step), shared, part)
        gradient, part_gradient = pull(cotangent)
        return add_wide(total, gradient), part_gradient

    total, part_gradients = jax.lax.scan(body, wide_zeros(shared), (parts, steps, cotangents))
    return rounded(total, shared), part_gradients, None, None


_map.defvjp(_map_forward, _map_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(branches, shared, parts, fixed, steps, which):
    def body(total, item):
        part, step, index = item
        values = _switch(index, branches, shared, part, fixed, step)
        return jax.tree.map(jnp.add, total, values), values[0]

    return jax.lax.scan(body, (jnp.float32(0), jnp.float32(0)), (parts, steps, which))


def _sum_forward(branches, shared, parts, fixed, steps, which):
    pulls = tuple(functools.partial(_add_value_and_gradient, branch) for branch in branches)

    def body(carry, item):
        part, step, index = item
        values, total, part_gradient = _switch(index, pulls, carry[1], shared, part, fixed, step)
        return (jax.tree.map(jnp.add, carry[0], values), total), (values[0], part_gradient)

    start = (jnp.float32(0), jnp.float32(0)), wide_zeros(shared)
    (values, total), (each, part_gradients) = jax.lax.scan(body, start, (parts, steps, which))
    return (values, each), (rounded(total, shared), part_gradients)


def _sum_backward(branches, gradients, cotangents):
    (slope, _), _ = cotangents
    shared, parts = jax.tree.map(lambda array: (array.astype(jnp.float32) * slope).astype(array.dtype), gradients)
    return shared, parts, None, None, None


_sum.defvjp(_sum_forward, _sum_backward)


def _add_value_and_gradient(branch, total, shared, part, fixed, step):
    """A step's values, the running sum of shared's gradient with this step's, and the gradient of the step's part."""
    value, pull, beside = jax.vjp(lambda shared, part: branch(shared, part, fixed, step), shared, part, has_aux=True)
    gradient, part_gradient = pull(jnp.ones_like(value))
    return (value, beside), add_wide(total, gradient), part_gradient


def _switch(index, branches, *operands):
    return branches[0](*operands) if len(branches) == 1 else jax.lax.switch(index, branches, *operands)


def wide_zeros(shared: Any) -> Any:
    """float32 zeros in the shapes of a pytree, to sum its gradients in."""
    return jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), shared)


def add_wide(total: Any, gradient: Any) -> Any:
    """A float32 sum and one more gradient."""
    return jax.tree.map(lambda sum_, new: sum_ + new.astype(jnp.float32), total, gradient)


def rounded(total: Any, shared: Any) -> Any:
    """The sum of gradients in the dtypes of what they are gradients of."""
    return jax.tree.map(lambda sum_, array: sum_.astype(array.dtype), total, shared)
