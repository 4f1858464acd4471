"""A loop whose steps are computed again in the backward pass, with float32 sums of what the steps share.

`jax.checkpoint` around the body of a `jax.lax.scan` gives the same loop, but adds up the gradients of shared arrays in
the arrays' dtype: in bfloat16 the sum over a thousand windows stops growing after a few hundred. Here each step's
gradient is added in float32. Steps of different static shapes can take turns in one loop, too, without the backward
pass holding the intermediate values of them all.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tlinformer_jax.models.config import ModelConfig


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


def map_recomputed(
    branches: tuple[Branch, ...],
    shared: Any,
    parts: Any,
    fixed: Any,
    steps: Any,
    which: jax.Array | None = None,
    count: jax.Array | None = None,
) -> Any:
    """Outputs of `branches[which[i]](shared, parts[i], fixed, steps[i])` for every i, stacked along a new first axis.

    Args:
      branches: functions with outputs of equal shapes; more than one needs `which`.
      shared: pytree of floating arrays that every step reads; differentiated, gradients summed in float32.
      parts: pytree of floating arrays [steps, ...] (or empty), a slice for each step; differentiated.
      fixed: pytree that every step reads; not differentiated.
      steps: pytree of arrays [steps, ...], a slice for each step; not differentiated.
      which: the branch of each step, int32 [steps].
      count: the first so many steps are taken, int32 []; the outputs of the others are 0. None takes all.
    """
    return _map(branches, shared, parts, fixed, steps, which, count)


def _loop(body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, items: Any, count: jax.Array | None) -> Any:
    """`jax.lax.scan`, or the first `count` steps of it, with zeros for the outputs of the others."""
    if count is None:
        return jax.lax.scan(body, carry, items)

    def item(index: jax.Array | int) -> Any:
        return jax.tree.map(lambda array: jax.lax.dynamic_index_in_dim(array, index, keepdims=False), items)

    length = jax.tree.leaves(items)[0].shape[0]
    shapes = jax.eval_shape(lambda carry: body(carry, item(0))[1], carry)
    outputs = jax.tree.map(lambda shape: jnp.zeros((length, *shape.shape), shape.dtype), shapes)

    def step(index: jax.Array, state: Any) -> Any:
        carry, new = body(state[0], item(index))
        return carry, jax.tree.map(
            lambda array, part: jax.lax.dynamic_update_index_in_dim(array, part, index, 0), state[1], new
        )

    return jax.lax.fori_loop(0, jnp.minimum(count, length), step, (carry, outputs))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _map(branches, shared, parts, fixed, steps, which, count):
    def body(_, item):
        part, step, index = item
        return None, _switch(index, branches, shared, part, fixed, step)

    return _loop(body, None, (parts, steps, which), count)[1]


def _map_forward(branches, *inputs):
    return _map(branches, *inputs), inputs


def _map_backward(branches, inputs, cotangents):
    shared, parts, fixed, steps, which, count = inputs
    pulls = tuple(functools.partial(_add_gradient, branch) for branch in branches)

    def body(total, item):
        part, step, index, cotangent = item
        return _switch(index, pulls, total, shared, part, fixed, step, cotangent)

    zero = jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), shared)
    total, part_gradients = _loop(body, zero, (parts, steps, which, cotangents), count)
    gradients = jax.tree.map(lambda sum_, array: sum_.astype(array.dtype), total, shared)
    return gradients, part_gradients, None, None, None, None


_map.defvjp(_map_forward, _map_backward)


def _add_gradient(branch, total, shared, part, fixed, step, cotangent):
    """The running sum of shared's gradient with this step's, and the gradient of the step's part."""
    _, pull = jax.vjp(lambda shared, part: branch(shared, part, fixed, step), shared, part)
    gradient, part_gradient = pull(cotangent)
    return jax.tree.map(lambda sum_, new: sum_ + new.astype(jnp.float32), total, gradient), part_gradient


def _switch(index, branches, *operands):
    return branches[0](*operands) if len(branches) == 1 else jax.lax.switch(index, branches, *operands)
