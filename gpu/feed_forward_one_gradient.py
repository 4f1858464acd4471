"""The feed-forward of a layer: one SwiGLU, or a mixture of experts, in which each row uses a few of many SwiGLUs.

A row uses the experts with the highest router probabilities; its output is the sum of theirs, weighted by these
probabilities. With several experts per row the weights are normalised to sum to 1 (as in Mixtral). With one expert per
row the weight is the probability itself (as in Switch): a normalised weight would always be 1, and the loss would give
the router no gradient. Experts have no capacity limit, and no row is dropped.

On TPUs rows are sorted by expert, and `jax.lax.ragged_dot` multiplies the rows of each expert with its matrices. On
other devices `ragged_dot` would multiply every row with every expert, so there the rows are copied to blocks. All rows
of a block use the same expert, and the last block of each expert is padded.

Training adds two losses for each call of the router, which balance the load of the experts and keep logits small:

    BALANCE_LOSS * E * sum_e share_e * mean_rows(p_e)  +  Z_LOSS * mean_rows(logsumexp(logits)^2)

where share_e is the fraction of all (row, expert) assignments that go to expert e. Only the gradients of these losses
matter, so they are not passed through all functions up to the training loss. Instead `_with_losses` is the identity,
and its backward pass adds the losses' gradient to that of the logits. The backward pass also knows which rows nobody
reads, such as padding and the future: their gradient is 0. The losses leave these rows out.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from tlinformer_jax.parallel.mesh import platform
from tlinformer_jax.parallel.sharding import batch_spec, constrain_batch, open_axes

BALANCE_LOSS, Z_LOSS = 0.01, 0.001
# Blocks per expert if all experts, also those of other devices, have equally many rows here. More blocks mean less
# padding, but smaller products and more copies of the experts' matrices: each block has its own copy.
BLOCKS = 8
# Fewer rows per block, as in decoding, would copy the matrices more often than they are used.
LEAST_BLOCK = 16
EXPERT_AXIS = "expert"
# Prefix of parameters that have an axis of experts.
EXPERTS = "experts_"

Rows = Float[Array, "batch length D"]
# A copy of a row for each expert that the row uses, and the numbers of these experts.
Assigned = Float[Array, "assignments D"]
Numbers = Int[Array, " assignments"]
Chosen = Int[Array, "batch length top"]
Weights = Float[Array, "batch length top"]


@flax.struct.dataclass
class Router:
    """Parameters of a router, which chooses the experts of each row.

    Attributes:
      kernel: [D, E].
      top: experts per row.
      weight: weight of the router's losses in the gradient, float32 []; None for no losses. The gradient of this
        weight is the value of the losses.
      tally: float32 zeros [E] if there is a weight. Its gradient is the number of rows that each expert was given.
    """

    kernel: Array
    top: int = flax.struct.field(pytree_node=False)
    weight: Array | None = None
    tally: Array | None = None


def map_routers(function: Any, params: Any) -> Any:
    """Applies `function` to each router in a pytree of parameters."""

    def is_router(node: Any) -> bool:
        return isinstance(node, Router)

    return jax.tree.map(lambda node: function(node) if is_router(node) else node, params, is_leaf=is_router)


def with_router_losses(params: Any, weights: jax.Array, divisor: jax.Array | float) -> Any:
    """Sets the weight of all routers' losses to sum(`weights`) / `divisor`, that of these labels; tallies are zeros."""

    def with_losses(router: Any) -> Any:
        tally = jnp.zeros(router.kernel.shape[1:], jnp.float32)
        return router.replace(weight=jnp.sum(weights) / divisor, tally=tally)

    return map_routers(with_losses, params)


def with_tallies(params: Any, tallies: Float[Array, "layers E"]) -> Any:
    """Gives each router its tally, in order, and sets the weight of the losses to 0."""
    remaining = iter(tallies)
    return map_routers(lambda router: router.replace(weight=jnp.float32(0), tally=next(remaining)), params)


def split_router_losses(params: Any, calls: jax.Array | float) -> Any:
    """Divides the weight of the routers' losses by `calls`, so that `calls` calls together count as one."""
    return map_routers(
        lambda router: router if router.weight is None else router.replace(weight=router.weight / calls), params
    )


def without_router_losses(params: Any) -> Any:
    """Removes the routers' losses and tallies."""
    return map_routers(lambda router: router.replace(weight=None, tally=None), params)


def feed_forward(router: Router | None, gate_up_kernel: Array, down_kernel: Array, x: Rows) -> Rows:
    """Applies the feed-forward to normalised rows x, row by row.

    Args:
      router: None for a single SwiGLU.
      gate_up_kernel: [D, 2, F], or [E, D, 2, F] for experts.
      down_kernel: [F, D], or [E, F, D] for experts.
    """
    if router is None:
        gate_up = jnp.einsum("nd,dpf->npf", flat_rows(x), gate_up_kernel)
        return jnp.einsum("nf,fd->nd", _gated(gate_up), down_kernel).reshape(x.shape)
    logits = router_logits(router, x)
    weights, chosen = choose(logits, router.top)
    output = _over_devices(x, weights, chosen, gate_up_kernel, down_kernel)
    if router.weight is None:
        return output
    return _with_losses(output, logits, chosen, router.weight, router.tally)


def flat_rows(x: Array) -> Array:
    """Reshapes [batch, length, ...] to [rows, ...] for a product with a matrix.

    The matrix's gradient then sums over one axis. With two, and `jax.vmap` over copies of a model, XLA writes the
    operands a second time, transposed.
    """
    return x.reshape(-1, *x.shape[2:])


# The backward pass repeats this elementwise work: cheaper than to store its float32 values and read them back.
@jax.custom_vjp
def _gated(gate_up: Array) -> Array:
    """Returns silu(gate) * up for [..., 2 (gate, up), F]."""
    return nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]


def _gated_forward(gate_up: Array) -> tuple[Array, Array]:
    return _gated(gate_up), gate_up


def _gated_backward(gate_up: Array, gradient: Array) -> tuple[Array]:
    multiply = jax.vjp(lambda gate, up: nn.silu(gate) * up, gate_up[..., 0, :], gate_up[..., 1, :])[1]
    return (jnp.stack(multiply(gradient), axis=-2),)


_gated.defvjp(_gated_forward, _gated_backward)


# ---- The router


def router_logits(router: Router, x: Rows) -> Float[Array, "batch length E"]:
    """Returns the router's logits: float32 for every compute dtype, since a rounded logit could change the expert."""
    wide, kernel = x.astype(jnp.float32), router.kernel.astype(jnp.float32)
    return jnp.einsum("bld,de->ble", wide, kernel, precision=jax.lax.Precision.HIGHEST)


def choose(logits: Float[Array, "batch length E"], top: int) -> tuple[Weights, Chosen]:
    """Returns the float32 weights and the indices of each row's experts, most probable first."""
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits), top)
    return (weights / jnp.sum(weights, axis=-1, keepdims=True) if top > 1 else weights), chosen


def router_losses(
    logits: Float[Array, "batch length E"], chosen: Chosen, counts: Float[Array, "batch length"]
) -> tuple[Float[Array, ""], Float[Array, " E"]]:
    """Returns the sum of both losses over rows with `counts` 1 (not 0), and the number of these rows per expert."""
    experts, rows = logits.shape[-1], jnp.maximum(jnp.sum(counts), 1.0)
    taken = jnp.sum(jax.nn.one_hot(chosen, experts) * counts[..., None, None], axis=(0, 1, 2))
    mean = jnp.sum(jax.nn.softmax(logits) * counts[..., None], axis=(0, 1)) / rows
    balance = experts * jnp.sum(taken / (rows * chosen.shape[-1]) * mean)
    z = jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * counts) / rows
    return BALANCE_LOSS * balance + Z_LOSS * z, taken


@jax.custom_vjp
def _with_losses(output: Rows, logits: Array, chosen: Chosen, weight: Array, tally: Array) -> Rows:
    """Returns the output; the backward pass adds the gradient of weight * losses + sum(tally * rows per expert)."""
    del logits, chosen, weight, tally
    return output


def _losses_backward(kept: tuple[Array, ...], gradient: Array) -> tuple[Array | None, ...]:
    logits, chosen, weight = kept
    counts = jnp.any(gradient != 0, axis=-1).astype(jnp.float32)
    (losses, taken), slope = jax.value_and_grad(router_losses, has_aux=True)(logits, chosen, counts)
    return gradient, weight * slope, None, losses, taken


_with_losses.defvjp(lambda output, logits, chosen, weight, tally: (output, (logits, chosen, weight)), _losses_backward)


# ---- The experts


def _over_devices(x: Rows, weights: Weights, chosen: Chosen, gate_up_kernel: Array, down_kernel: Array) -> Rows:
    """Runs `_experts` in a `shard_map`, since the compiler cannot partition a sort well.

    Each device sorts the rows of its own sequences. The axis `expert` splits the experts: devices along this axis
    exchange their rows, each device computes the outputs of its experts, and the outputs are summed.
    """
    experts, axes = gate_up_kernel.shape[0], open_axes()
    here = EXPERT_AXIS in axes
    (batch,) = batch_spec(x.shape[0]) or ((),)
    split = tuple(name for name in axes if name in batch and name != EXPERT_AXIS)
    if not here and not split:
        return _experts(x, weights, chosen, gate_up_kernel, down_kernel)

    def compute(x: Array, weights: Array, chosen: Array, gate_up: Array, down: Array, numbers: Array) -> Array:
        output = _experts(x, weights, chosen, gate_up, down, numbers[0] if here else None)
        return jax.lax.psum(output, EXPERT_AXIS) if here else output

    rows, kernels = PartitionSpec(split or None), PartitionSpec(EXPERT_AXIS if here else None)
    names = {*split, EXPERT_AXIS} if here else {*split}
    mapped = jax.shard_map(
        compute, axis_names=names, in_specs=(rows,) * 3 + (kernels,) * 3, out_specs=rows, check_vma=False
    )
    return constrain_batch(mapped(x, weights, chosen, gate_up_kernel, down_kernel, jnp.arange(experts)))


def _experts(
    x: Rows, weights: Weights, chosen: Chosen, gate_up_kernel: Array, down_kernel: Array, first: Array | None = None
) -> Rows:
    """Returns the weighted sum of the experts' outputs; `first` is the index of the first expert on this device."""
    experts, width = gate_up_kernel.shape[:2]
    top, number = chosen.shape[-1], chosen.reshape(-1) - (0 if first is None else first)
    # Assignments to experts on other devices get the number `experts`, which no expert here has.
    number = jnp.where((number >= 0) & (number < experts), number, experts)
    by_expert = _by_groups if platform() == "tpu" else _by_blocks
    copies = jnp.repeat(x.reshape(-1, width), top, axis=0)
    output = by_expert(copies, number, gate_up_kernel, down_kernel).reshape(*chosen.shape, width)
    return jnp.sum(output.astype(jnp.float32) * weights[..., None], axis=2).astype(x.dtype)


def _by_groups(copies: Assigned, number: Numbers, gate_up_kernel: Array, down_kernel: Array) -> Assigned:
    """Applies expert number[i] to copies[i]; returns 0 for numbers past the last expert.

    `copies` has a copy of a row for each expert that the row uses, and `number` is the index of that expert.
    """
    experts, width = gate_up_kernel.shape[:2]
    order = jnp.argsort(number, stable=True)
    inverse = jnp.argsort(order)
    sizes = jnp.sum(number[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    # Values of rows past the last group, and their gradients, are undefined.
    own = (jnp.arange(number.size) < jnp.sum(sizes))[:, None]
    rows = jnp.where(own, _moved(copies, order, inverse), 0)
    gate_up = jax.lax.ragged_dot(rows, gate_up_kernel.reshape(experts, width, -1), sizes)
    inner = _gated(gate_up.reshape(1, number.size, 2, -1))[0]
    return _moved(jnp.where(own, jax.lax.ragged_dot(inner, down_kernel, sizes), 0), inverse, order)


def _by_blocks(copies: Assigned, number: Numbers, gate_up_kernel: Array, down_kernel: Array) -> Assigned:
    """Computes `_by_groups` by batched products; each block of rows has its own copy of the matrices."""
    experts, width = gate_up_kernel.shape[:2]
    size, target, source, expert = _blocks(number, experts)
    rows = _moved(copies, source, target).reshape(-1, size, width)
    gate_up = jnp.einsum("bid,bdpf->bipf", rows, _kernels_of(gate_up_kernel, experts, expert))
    output = jnp.einsum("bif,bfd->bid", _gated(gate_up), _kernels_of(down_kernel, experts, expert))
    return _moved(output.reshape(-1, width), target, source)


def _blocks(number: Numbers, experts: int) -> tuple[int, Array, Array, Array]:
    """Assigns rows to blocks; there are as many blocks as any routing needs, so shapes do not depend on the routing.

    Returns:
      the rows per block; the index of each row in the concatenated blocks, past the end for rows without an expert; the
      row at each index of the blocks, past the end for padding; the expert of each block.
    """
    size = max(1, min(LEAST_BLOCK, number.size // experts), number.size // (BLOCKS * experts))
    blocks = (number.size + experts * (size - 1)) // size
    chosen = number[:, None] == jnp.arange(experts)
    count = jnp.cumsum(chosen, axis=0, dtype=jnp.int32)
    ends = jnp.cumsum(-(-count[-1] // size))
    begins = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    target = jnp.sum(jnp.where(chosen, begins * size + count - 1, 0), axis=1)
    index = jnp.arange(number.size, dtype=jnp.int32)
    target = jnp.where(number < experts, target, blocks * size + index)
    nowhere = jnp.full(blocks * size, number.size, jnp.int32)
    source = nowhere.at[target].set(index, mode="drop", unique_indices=True)
    expert = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
    return size, target, source, jnp.minimum(expert, experts - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _kernels_of(kernels: Array, experts: int, expert: Array) -> Array:
    """Returns kernels[expert]. JAX's gradient would be a scatter, which is not deterministic on a GPU."""
    del experts
    return kernels[expert]


def _kernels_backward(experts: int, expert: Array, gradient: Array) -> tuple[Array, None]:
    chosen = jax.nn.one_hot(expert, experts, dtype=gradient.dtype)
    return jnp.einsum("be,b...->e...", chosen, gradient, precision=jax.lax.Precision.HIGHEST), None


_kernels_of.defvjp(lambda kernels, experts, expert: (kernels[expert], expert), _kernels_backward)


@jax.custom_vjp
def _moved(rows: Array, source: Array, target: Array) -> Array:
    """Returns rows[source], and 0 where `source` is past the end; `target` is the inverse of `source`.

    JAX's gradient would be a scatter, which is slow and, on a GPU, not deterministic.
    """
    del target
    return jnp.take(rows, source, axis=0, mode="fill", fill_value=0)


_moved.defvjp(
    lambda rows, source, target: (_moved(rows, source, target), (source, target)),
    lambda kept, gradient: (_moved(gradient, *kept[::-1]), None, None),
)
