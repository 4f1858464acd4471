"""The feed-forward of a layer: one SwiGLU, or a mixture of experts, SwiGLUs of which each row takes a few.

A row goes to the experts with its highest router probabilities, and their outputs are added up with these as weights.
Of several experts the weights are made to sum to 1 (as in Mixtral); of a single one it is the probability itself (as in
Switch), or else the router would learn nothing from the loss. No expert has a capacity, and no row is dropped: on TPUs
rows are sorted by expert, and `jax.lax.ragged_dot` multiplies each run of them with its expert. Elsewhere that would
multiply every row with every expert, so rows are laid out in blocks of one expert each, the last of which is padded.

Training adds two losses for each call of the router, so that experts are used alike and logits stay small:

    BALANCE_LOSS * E * sum_e share_e * mean_rows(p_e)  +  Z_LOSS * mean_rows(logsumexp(logits)^2)

with share_e, of the places at experts that the rows take, those at expert e. Nothing reports these two, only their
gradients matter, so they are not handed through all the functions between here and the loss: `_with_losses` is the
identity, and its backward pass adds the losses' gradient to that of the logits. It also knows there what no forward
pass knows, the rows that nobody reads, such as padding and the future: their gradient is 0. They do not count.
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
# Blocks of rows for each expert, if all are given as many; each costs half a block of padding.
BLOCKS = 8
EXPERT_AXIS = "expert"
# Names of the parameters that every expert has of its own begin so.
EXPERTS = "experts_"

Rows = Float[Array, "batch length D"]
Chosen = Int[Array, "batch length top"]
Weights = Float[Array, "batch length top"]


@flax.struct.dataclass
class Router:
    """Chooses the experts of a row.

    Attributes:
      kernel: [D, E].
      top: experts of a row.
      weight: what its losses count in the gradient, float32 []; None where they are not wanted. Its gradient is the
        losses themselves.
      tally: zeros, float32 [E], where there is a weight. Its gradient is how many rows each expert was given.
    """

    kernel: Array
    top: int = flax.struct.field(pytree_node=False)
    weight: Array | None = None
    tally: Array | None = None


def map_routers(function: Any, params: Any) -> Any:
    """A pytree of parameters with `function` applied to each router in it."""

    def is_router(node: Any) -> bool:
        return isinstance(node, Router)

    return jax.tree.map(lambda node: function(node) if is_router(node) else node, params, is_leaf=is_router)


def with_router_losses(params: Any, weight: jax.Array) -> Any:
    """The parameters with routers whose losses count `weight` times in gradients."""
    return map_routers(
        lambda router: router.replace(weight=weight, tally=jnp.zeros(router.kernel.shape[1:], jnp.float32)), params
    )


def with_tallies(params: Any, tallies: Float[Array, "layers E"]) -> Any:
    """The parameters with a tally for each router, in their order, and losses that count nothing."""
    remaining = iter(tallies)
    return map_routers(lambda router: router.replace(weight=jnp.float32(0), tally=next(remaining)), params)


def split_router_losses(params: Any, calls: jax.Array | float) -> Any:
    """The same parameters for each of several `calls` of a router, whose losses then count together as one's do."""
    return map_routers(
        lambda router: router if router.weight is None else router.replace(weight=router.weight / calls), params
    )


def feed_forward(router: Router | None, gate_up_kernel: Array, down_kernel: Array, x: Rows) -> Rows:
    """Of normalised rows; row by row.

    Args:
      router: None for a single SwiGLU.
      gate_up_kernel: [D, 2, F], of experts [E, D, 2, F].
      down_kernel: [F, D], of experts [E, F, D].
      x: the rows.
    """
    if router is None:
        gate_up = jnp.einsum("bld,dpf->blpf", x, gate_up_kernel)
        return jnp.einsum("blf,fd->bld", _gated(gate_up), down_kernel)
    logits = router_logits(router, x)
    weights, chosen = choose(logits, router.top)
    output = _over_devices(x, weights, chosen, gate_up_kernel, down_kernel)
    if router.weight is None:
        return output
    return _with_losses(output, logits, chosen, router.weight, router.tally)


# Elementwise work is done again in the backward pass: cheaper than writing and reading back its float32 values.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _gated(gate_up: Array) -> Array:
    """silu(gate) * up of [batch, length, 2, F]."""
    return nn.silu(gate_up[:, :, 0]) * gate_up[:, :, 1]


# ---- The router


def router_logits(router: Router, x: Rows) -> Float[Array, "batch length E"]:
    """In float32, products too, whatever the model's dtype: a rounded logit would choose another expert."""
    wide, kernel = x.astype(jnp.float32), router.kernel.astype(jnp.float32)
    return jnp.einsum("bld,de->ble", wide, kernel, precision=jax.lax.Precision.HIGHEST)


def choose(logits: Float[Array, "batch length E"], top: int) -> tuple[Weights, Chosen]:
    """The experts of each row, the likeliest first, and their weights, float32."""
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits), top)
    return (weights / jnp.sum(weights, axis=-1, keepdims=True) if top > 1 else weights), chosen


def router_losses(
    logits: Float[Array, "batch length E"], chosen: Chosen, counts: Float[Array, "batch length"]
) -> tuple[Float[Array, ""], Float[Array, " E"]]:
    """Both losses over the rows that count (1, others 0), and how many of these each expert was given."""
    experts, rows = logits.shape[-1], jnp.maximum(jnp.sum(counts), 1.0)
    taken = jnp.sum(jax.nn.one_hot(chosen, experts) * counts[..., None, None], axis=(0, 1, 2))
    mean = jnp.sum(jax.nn.softmax(logits) * counts[..., None], axis=(0, 1)) / rows
    balance = experts * jnp.sum(taken / (rows * chosen.shape[-1]) * mean)
    z = jnp.sum(jnp.square(jax.nn.logsumexp(logits, axis=-1)) * counts) / rows
    return BALANCE_LOSS * balance + Z_LOSS * z, taken


@jax.custom_vjp
def _with_losses(output: Rows, logits: Array, chosen: Chosen, weight: Array, tally: Array) -> Rows:
    """The output as it is. To its gradient that of weight * losses + tally . (rows given to each expert) is added."""
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
    """`_experts` over the axes of the mesh that the compiler would partition: it cannot partition a sort well.

    Each device sorts its own sequences' rows. The axis `expert` splits the experts: its devices exchange their rows,
    each computes those of its experts, and the results are added up.
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
    """The weighted sum of the experts' outputs; of the experts from number `first` on alone, where that is given."""
    experts, width = gate_up_kernel.shape[:2]
    top, number = chosen.shape[-1], chosen.reshape(-1) - (0 if first is None else first)
    # Places at experts elsewhere come last, and belong to none of those here.
    number = jnp.where((number >= 0) & (number < experts), number, experts)
    by_expert = _by_runs if platform() == "tpu" else _by_blocks
    places = jnp.repeat(x.reshape(-1, width), top, axis=0)
    output = by_expert(places, number, gate_up_kernel, down_kernel).reshape(*chosen.shape, width)
    return jnp.sum(output.astype(jnp.float32) * weights[..., None], axis=2).astype(x.dtype)


def _by_runs(places: Array, number: Array, gate_up_kernel: Array, down_kernel: Array) -> Array:
    """Each place's row through expert `number`, [places, D]; 0 where that is past the last expert."""
    experts, width = gate_up_kernel.shape[:2]
    order = jnp.argsort(number, stable=True)
    inverse = jnp.argsort(order)
    sizes = jnp.sum(number[:, None] == jnp.arange(experts), axis=0, dtype=jnp.int32)
    # What lies past the last run is not defined, nor is its gradient.
    own = (jnp.arange(number.size) < jnp.sum(sizes))[:, None]
    rows = jnp.where(own, _moved(places, order, inverse), 0)
    gate_up = jax.lax.ragged_dot(rows, gate_up_kernel.reshape(experts, width, -1), sizes)
    inner = _gated(gate_up.reshape(1, number.size, 2, -1))[0]
    return _moved(jnp.where(own, jax.lax.ragged_dot(inner, down_kernel, sizes), 0), inverse, order)


def _by_blocks(places: Array, number: Array, gate_up_kernel: Array, down_kernel: Array) -> Array:
    """The same, by a product of batches."""
    experts, width = gate_up_kernel.shape[:2]
    size, place, source, expert = _blocks(number, experts)
    rows = _moved(places, source, place).reshape(-1, size, width)
    gate_up = jnp.einsum("bid,bdpf->bipf", rows, _kernels_of(gate_up_kernel, experts, expert))
    output = jnp.einsum("bif,bfd->bid", _gated(gate_up), _kernels_of(down_kernel, experts, expert))
    return _moved(output.reshape(-1, width), place, source)


def _blocks(number: Array, experts: int) -> tuple[int, Array, Array, Array]:
    """Rows of a block; of each place its row in the blocks, of each such row its place, of each block its expert.

    As many blocks as there may be at most, so that shapes do not depend on the routing. Past the end of the other
    array: the row of a place without an expert, and the place of a row that is padding.
    """
    size = max(1, number.size // (BLOCKS * experts))
    blocks = (number.size + experts * (size - 1)) // size
    chosen = number[:, None] == jnp.arange(experts)
    count = jnp.cumsum(chosen, axis=0, dtype=jnp.int32)
    ends = jnp.cumsum(-(-count[-1] // size))
    begins = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    place = jnp.sum(jnp.where(chosen, begins * size + count - 1, 0), axis=1)
    index = jnp.arange(number.size, dtype=jnp.int32)
    place = jnp.where(number < experts, place, blocks * size + index)
    nowhere = jnp.full(blocks * size, number.size, jnp.int32)
    source = nowhere.at[place].set(index, mode="drop", unique_indices=True)
    expert = jnp.searchsorted(ends, jnp.arange(blocks), side="right")
    return size, place, source, jnp.minimum(expert, experts - 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _kernels_of(kernels: Array, experts: int, expert: Array) -> Array:
    """kernels[expert]. JAX would make the gradient a scatter, which on a GPU is not the same every time."""
    del experts
    return kernels[expert]


def _kernels_backward(experts: int, expert: Array, gradient: Array) -> tuple[Array, None]:
    chosen = jax.nn.one_hot(expert, experts, dtype=gradient.dtype)
    return jnp.einsum("be,b...->e...", chosen, gradient, precision=jax.lax.Precision.HIGHEST), None


_kernels_of.defvjp(lambda kernels, experts, expert: (kernels[expert], expert), _kernels_backward)


@jax.custom_vjp
def _moved(rows: Array, source: Array, place: Array) -> Array:
    """rows[source], 0 where that is past the end; `place` says where each row went.

    JAX would make the gradient a scatter, which is slow, and on a GPU not the same every time.
    """
    del place
    return jnp.take(rows, source, axis=0, mode="fill", fill_value=0)


_moved.defvjp(
    lambda rows, source, place: (_moved(rows, source, place), (source, place)),
    lambda kept, gradient: (_moved(gradient, *kept[::-1]), None, None),
)
