"""The layer of all architectures, as pure functions of its parameters.

`compress`, `hidden`, `restore` and the baselines' attention layers all use `project` and `update`; they differ only in
which rows attend to which in between. The Flax module here only declares parameters; functions take plain pytrees.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.kernels import norm as norm_kernel
from tlinformer_jax.kernels.common import STEP, kept, mixed, threefry, usable
from tlinformer_jax.models.feed_forward import EXPERTS, Router, feed_forward, flat_rows
from tlinformer_jax.models.rope import Rope, pairs_apart, rotate

LAYER_NORM_EPSILON = 1e-5
INIT_STD = 0.02


# ---- Parameters


@flax.struct.dataclass(kw_only=True)
class ResidualParams:
    """Parameters of a layer with any mixer; model width D, feed-forward width F, h heads of d_h features, E experts."""

    norm1_scale: Array  # [D]. LayerNorm before the mixer
    norm1_bias: Array  # [D]
    out_kernel: Array  # [h, d_h, D]. Output projection of the mixer
    out_bias: Array  # [D]
    norm2_scale: Array  # [D]. LayerNorm before the feed-forward
    norm2_bias: Array  # [D]
    gate_up_kernel: Array  # [D, 2, F], or [E, D, 2, F] for experts. w1 (gate, through silu) and w3 (up) of the SwiGLU
    down_kernel: Array  # [F, D], or [E, F, D] for experts. w2 of the SwiGLU
    router: Router | None = None  # None without a mixture of experts


@flax.struct.dataclass
class LayerParams(ResidualParams):
    """Parameters of one attention layer."""

    qkv_kernel: Array  # [D, 3, h, d_h]. Queries, keys, values in this order
    qkv_bias: Array  # [3, h, d_h]
    taps: Array | None = None  # [K, D], `compress` of later blocks with `config.key_taps`; see `models.key_rows`


class Layer(nn.Module):
    """Declares one layer's parameters, among them the vectors of `taps` key taps."""

    config: ModelConfig
    taps: int = 0

    @nn.compact
    def __call__(self) -> LayerParams:
        config, zeros = self.config, nn.initializers.zeros
        width, heads, head_dim, dtype = config.d_model, config.num_heads, config.head_dim, jnp.float32
        # The order matters: Flax derives each parameter's random key from its number.
        return LayerParams(
            **norm_params(self, "norm1", width),
            qkv_kernel=self.param("qkv_kernel", residual_init(config), (width, 3, heads, head_dim), dtype),
            qkv_bias=self.param("qkv_bias", zeros, (3, heads, head_dim), dtype),
            **params_after_mixer(self, config, heads, head_dim, config.feed_forward_dim),
            taps=self.param("taps", zeros, (self.taps, width), dtype) if self.taps else None,
        )


def residual_init(config: ModelConfig) -> nn.initializers.Initializer:
    """Returns the initializer of matrices whose product is added to the residual stream, and of `qkv_kernel`."""
    return nn.initializers.normal(INIT_STD / math.sqrt(2 * config.num_layers))


def norm_params(module: nn.Module, name: str, width: int) -> dict[str, Any]:
    """Declares the parameters of the LayerNorm `name` in `module`."""
    inits = {f"{name}_scale": nn.initializers.ones, f"{name}_bias": nn.initializers.zeros}
    return {each: module.param(each, init, (width,), jnp.float32) for each, init in inits.items()}


def params_after_mixer(module: nn.Module, config: ModelConfig, heads: int, features: int, inner: int) -> dict[str, Any]:
    """Declares the fields of `ResidualParams` except the first norm in `module`; the feed-forward has width `inner`."""
    normal, residual = nn.initializers.normal(INIT_STD), residual_init(config)
    width, dtype = config.d_model, jnp.float32
    experts, name = ((config.num_experts,), EXPERTS) if config.mixture else ((), "")
    fields: dict[str, Any] = {
        "out_kernel": module.param("out_kernel", residual, (heads, features, width), dtype),
        "out_bias": module.param("out_bias", nn.initializers.zeros, (width,), dtype),
        **norm_params(module, "norm2", width),
        "gate_up_kernel": module.param(f"{name}gate_up_kernel", normal, (*experts, width, 2, inner), dtype),
        "down_kernel": module.param(f"{name}down_kernel", residual, (*experts, inner, width), dtype),
    }
    if config.mixture:
        kernel = module.param("router_kernel", normal, (width, config.num_experts), dtype)
        fields["router"] = Router(kernel, config.experts_per_token)
    return fields


# ---- Dropout
#
# A mask is a function of a key and of each value's index, cheap enough for a GPU kernel. A row of values, such as a
# query's attention weights, has a 64-bit state: Threefry-2x32 of (index of its matrix, index of the row) under the key.
# A few integer operations hash this state and the value's index in the row to 32 bits (`kernels.common`). The value is
# dropped if these bits, as an integer, are below rate * 2^32.


@flax.struct.dataclass
class Dropout:
    """Dropout at a given rate, with its random key. Functions that take a Dropout take None for no dropout.

    Attributes:
      words: the two words of the key and the index of this device's part of the batch, uint32 [3]. With this index,
        masks do not depend on how many devices a batch is split over.
      rate: fraction of values that are dropped, in [0, 1).
    """

    words: jax.Array
    rate: float = flax.struct.field(pytree_node=False)

    @classmethod
    def by_key(cls, key: jax.Array, rate: float, shard: jax.Array | int = 0) -> "Dropout":
        """Makes a dropout from a `jax.random` key, which must not be used again; `shard` is the part of the batch."""
        return cls(jnp.append(jax.random.bits(key, (2,), jnp.uint32), jnp.asarray(shard).astype(jnp.uint32)), rate)

    def fold_in(self, number: jax.Array | int) -> "Dropout":
        """Returns an independent dropout for part `number`."""
        # A program has hundreds of parts. Threefry for each part would take long to compile.
        number = jnp.asarray(number).astype(jnp.uint32)
        first = mixed(self.words[0] + (number + np.uint32(1)) * np.uint32(STEP), self.words[1])
        return Dropout(jnp.stack([first, mixed(self.words[1] + first, number), self.words[2]]), self.rate)

    def __call__(self, x: jax.Array, first_row: jax.Array | int = 0) -> jax.Array:
        """Drops values of x [..., rows, features] and scales the others up; the first row has index `first_row`."""
        return _drop(x, self.words, first_row, self.rate)


def part_of(dropout: Dropout | None, number: jax.Array | int) -> Dropout | None:
    """Returns an independent dropout for part `number`; None if `dropout` is None."""
    return None if dropout is None else dropout.fold_in(number)


@functools.partial(jax.checkpoint, static_argnums=3, prevent_cse=False)
def _drop(x: jax.Array, words: jax.Array, first_row: jax.Array | int, rate: float) -> jax.Array:
    # The backward pass computes the mask again: storing it would take half as many bytes as x.
    *leading, rows, width = (1,) * max(0, 2 - x.ndim) + x.shape
    mask = dropout_mask(words, math.prod(leading), 1, rows, width, rate, first_row).reshape(x.shape)
    return jnp.where(mask, x / (1.0 - rate), jnp.zeros_like(x))


def dropout_mask(
    words: jax.Array, batch: int, heads: int, queries: int, keys: int, rate: float, first_row: jax.Array | int = 0
) -> jax.Array:
    """Returns which attention weights are kept, bool [batch, heads, queries, keys]."""
    softmax = jnp.arange(batch * heads, dtype=jnp.uint32).reshape(batch, heads, 1, 1)
    softmax += words[2] * np.uint32(batch * heads)
    row = jnp.arange(queries, dtype=jnp.uint32)[:, None] + jnp.asarray(first_row).astype(jnp.uint32)
    state = threefry(words[0], words[1], *jnp.broadcast_arrays(softmax, row))
    return kept(*state, jnp.arange(keys), rate)


# ---- Inputs and preparation


@flax.struct.dataclass
class Embedded:
    """Embedded tokens, the input of the first layer.

    Attributes:
      rows: the embeddings, [batch, length, D]; the first layer's queries and values and the residual stream.
      key_rows: input of the first layer's keys with `config.token_shift`; None if that is `rows`.
      documents: the document of each row of the whole sequence, int32 [batch, length], counted from 0; a row sees only
        its own document. None if the sample is a single document.
      key_sums: for each later block, what is added to the input of the keys of C', [batch, length, D]; empty without
        `config.key_taps`.
    """

    rows: Array
    key_rows: Array | None = None
    documents: Array | None = None
    key_sums: tuple[Array, ...] = ()


def chain_layers(
    function: Callable[[Any, tuple[Any, Dropout | None]], tuple[Any, None]],
    layers: Sequence[ResidualParams],
    x: Any,
    dropout: Dropout | None,
    scan: bool,
    period: int = 1,
) -> Any:
    """Applies layers in order: `x, _ = function(x, (layer, dropout of the layer))` for each.

    Kinds of layers repeat after `period` layers. With `scan`, one period of layers is compiled, and a loop runs it with
    stacked parameters; layers after the last whole period are compiled separately.
    """
    items = [(layer, part_of(dropout, depth)) for depth, layer in enumerate(layers)]

    def several(x: Any, items: Sequence[tuple[Any, Dropout | None]]) -> tuple[Any, None]:
        for item in items:
            x, _ = function(x, item)
        return x, None

    looped = len(items) // period * period if scan and len(items) >= 2 * period else 0
    if looped:
        groups = [tuple(items[first : first + period]) for first in range(0, looped, period)]
        x, _ = jax.lax.scan(several, x, jax.tree.map(lambda *arrays: jnp.stack(arrays), *groups))
    return several(x, items[looped:])[0]


def prepare_layers(params: Any, dtype: jnp.dtype, head_multiple: int = 1) -> Any:
    """Converts a pytree of layer parameters to the form that the functions below take.

    Called once per forward pass, outside all scans. Matrices are cast to the compute dtype; vectors, including the rows
    of `taps`, keep their dtype. For attention, the features of queries and keys are reordered for `rotate`, and heads
    are padded with zero weights to a multiple of `head_multiple` features, so that projections come out in the layout
    that the kernel needs.
    """

    def prepare(layer: ResidualParams) -> ResidualParams:
        router, taps = layer.router, getattr(layer, "taps", None)  # stay float32
        layer = jax.tree.map(lambda array: array.astype(dtype) if array.ndim > 1 else array, layer)
        layer = dataclasses.replace(layer, router=router)
        if not isinstance(layer, LayerParams):
            return _pad_feed_forward(layer, 8 if jnp.dtype(dtype).itemsize < 4 else 1)
        return dataclasses.replace(
            layer,
            qkv_kernel=_pad_heads(_rotary_order(layer.qkv_kernel), -1, head_multiple),
            qkv_bias=_pad_heads(_rotary_order(layer.qkv_bias), -1, head_multiple),
            out_kernel=_pad_heads(layer.out_kernel, -2, head_multiple),
            taps=taps,
        )

    return jax.tree.map(prepare, params, is_leaf=lambda node: isinstance(node, ResidualParams))


def _rotary_order(qkv: Array) -> Array:
    """Reorders the features of queries and keys in [..., 3, heads, d_h] for `rotate`; values stay as they are."""
    return jnp.concatenate([pairs_apart(qkv[..., :2, :, :]), qkv[..., 2:, :, :]], axis=-3)


def _pad_heads(array: Array, axis: int, multiple: int) -> Array:
    """Pads the features of each head, along `axis`, with zeros to a multiple of `multiple`."""
    padding = [(0, 0)] * array.ndim
    padding[axis] = (0, -array.shape[axis] % multiple)
    return jnp.pad(array, padding) if padding[axis][1] else array


def _pad_feed_forward(layer: ResidualParams, multiple: int) -> ResidualParams:
    """Pads the inner features with zero weights to a multiple, so that loads of matrix units are aligned."""
    padding, experts = (0, -layer.down_kernel.shape[-2] % multiple), ((0, 0),) * (layer.down_kernel.ndim - 2)
    return dataclasses.replace(
        layer,
        gate_up_kernel=jnp.pad(layer.gate_up_kernel, (*experts, (0, 0), (0, 0), padding)),
        down_kernel=jnp.pad(layer.down_kernel, (*experts, padding, (0, 0))),
    )


# ---- The layer's computations


@jax.custom_vjp
def layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    """Applies LayerNorm over the last axis with the biased variance, in float32; returns x's dtype."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    centred = wide - mean
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON)
    return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


@jax.custom_vjp
def norm_branch(x: Array, scale: Array, bias: Array) -> tuple[Array, Array]:
    """Returns x and `layer_norm(x)`, so that one backward pass adds the gradients of residual and branch."""
    return x, layer_norm(x, scale, bias)


def _norm_backward(skips: bool, kept: tuple[Array, ...], gradients: Any) -> tuple[Array, ...]:
    """Returns gradients of x, scale and bias; recomputes the normalised rows from x instead of storing them."""
    x, scale, bias = kept
    skip, gradient = gradients if skips else (None, gradients)
    # The history of the first window has no rows.
    if x.size > 0 and x.shape[-1] <= norm_kernel.MOST_WIDTH and usable("norm", x.dtype):
        x_gradient, *sums = norm_kernel.layer_norm_backward(x, gradient, skip, scale, LAYER_NORM_EPSILON)
    else:
        x_gradient, *sums = _plain_norm_backward(x, gradient, scale)
        x_gradient = x_gradient if skip is None else x_gradient + skip
    return x_gradient, *(total.astype(array.dtype) for total, array in zip(sums, (scale, bias)))


def _plain_norm_backward(x: Array, gradient: Array, scale: Array) -> tuple[Array, ...]:
    """Returns the gradient of x in x's dtype, and those of scale and bias in float32."""
    wide, slope = x.astype(jnp.float32), gradient.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + LAYER_NORM_EPSILON)
    normed, scaled = centred * inverse, slope * scale.astype(jnp.float32)
    shift, along = (jnp.mean(part, axis=-1, keepdims=True) for part in (scaled, scaled * normed))
    rows = tuple(range(x.ndim - 1))
    x_gradient = ((scaled - shift - normed * along) * inverse).astype(x.dtype)
    return x_gradient, jnp.sum(slope * normed, axis=rows), jnp.sum(slope, axis=rows)


layer_norm.defvjp(lambda *arrays: (layer_norm(*arrays), arrays), functools.partial(_norm_backward, False))
norm_branch.defvjp(lambda *arrays: (norm_branch(*arrays), arrays), functools.partial(_norm_backward, True))


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """Adds bias [...] to x [rows..., ...]."""
    # cuBLAS can add a bias in the epilogue of its product only if the bias is a vector.
    return (x.reshape(-1, bias.size) + bias.astype(x.dtype).reshape(-1)).reshape(x.shape)


def _add_bias_backward(bias: Array, gradient: Array) -> tuple[Array, Array]:
    # The barrier keeps the sum out of the kernel that rotates the gradient: fused, it would take three times as long.
    gradient = jax.lax.optimization_barrier(gradient)
    axes = tuple(range(gradient.ndim - bias.ndim))
    return gradient, jnp.sum(gradient.astype(jnp.float32), axis=axes).astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _add_bias_backward)


def projections(
    params: LayerParams,
    x: Float[Array, "batch length D"],
    parts: str = "qkv",
    key_rows: Float[Array, "batch length D"] | None = None,
) -> Float[Array, "batch length parts heads d_h"]:
    """Normalises and projects rows to the given parts, without rotation.

    `parts` is a substring of 'qkv'; other parts are not computed. Keys come from `key_rows` if given (see `Embedded`).
    """
    projected, bias = unbiased_projections(params, x, parts, key_rows)
    return add_bias(projected, bias)


def unbiased_projections(
    params: LayerParams, x: Array, parts: str, key_rows: Array | None = None
) -> tuple[Array, Array]:
    """Returns the summands of `projections`: products [batch, length, parts, heads, d_h], bias [parts, heads, d_h]."""
    first = "qkv".index(parts)
    if key_rows is not None and "k" in parts and len(parts) > 1:
        each = [unbiased_projections(params, key_rows if part == "k" else x, part) for part in parts]
        products, biases = zip(*each)
        return jnp.concatenate(products, axis=2), jnp.concatenate(biases)
    kernel = params.qkv_kernel[:, first : first + len(parts)]
    projected = jnp.einsum("nd,dphk->nphk", flat_rows(first_norm(params, x)), kernel)
    projected = projected.reshape(*x.shape[:2], *projected.shape[1:])
    return projected, params.qkv_bias[first : first + len(parts)].astype(x.dtype)


def first_norm(params: LayerParams, x: Float[Array, "batch length D"]) -> Float[Array, "batch length D"]:
    """Returns the rows that the layer projects to queries, keys and values."""
    return layer_norm(x, params.norm1_scale, params.norm1_bias)


def project(
    params: LayerParams,
    x: Float[Array, "batch length D"],
    rope: Rope,
    parts: str = "qkv",
    key_rows: Float[Array, "batch length D"] | None = None,
) -> tuple[Float[Array, "batch length heads d_h"], ...]:
    """Returns Q, K and V (those in `parts`) of rows at the positions of `rope`, Q and K rotated; see `projections`."""
    if not x.shape[1]:  # no history: nothing to compile
        return (jnp.zeros((*x.shape[:2], *params.qkv_bias.shape[1:]), x.dtype),) * len(parts)
    projected = projections(params, x, parts, key_rows)
    turned = len(parts.rstrip("v"))  # one call rotates queries and keys, with the parts as additional heads
    batch, length, _, heads, width = projected.shape
    rotated = rotate(projected[:, :, :turned].reshape(batch, length, turned * heads, width), rope)
    values = [projected[:, :, -1]] if parts.endswith("v") else []
    return (*jnp.split(rotated, turned, axis=2), *values)


def update(
    params: ResidualParams,
    x: Float[Array, "batch length D"],
    attended: Float[Array, "batch length heads d_h"],
    dropout: Dropout | None = None,
) -> Float[Array, "batch length D"]:
    """Applies the output projection to `attended` (the mixer's output), then the feed-forward, each with its residual.

    Dropout is applied to the feed-forward's output only.
    """
    if not x.shape[1]:
        return x
    output = jnp.einsum("nhk,hkd->nd", flat_rows(attended), params.out_kernel).reshape(x.shape)
    x = x + add_bias(output, params.out_bias)
    x, normed = norm_branch(x, params.norm2_scale, params.norm2_bias)
    output = feed_forward(params.router, params.gate_up_kernel, params.down_kernel, normed)
    return x + (output if dropout is None else dropout(output))
