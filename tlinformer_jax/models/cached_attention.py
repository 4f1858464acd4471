"""The layer of a generated token, and functions by which `prefill` and `slide` write and read many cached rows.

Cached keys and values are [batch, heads, d_h, rows]: the row axis is contiguous, so that a GPU streams memory and a TPU
needs no padding. The number of valid rows differs between sequences and is known only at run time. Rows may be int8
(`kernels.key_value`).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.kernels import decode as decode_kernel
from tlinformer_jax.kernels import history as history_kernel
from tlinformer_jax.kernels import storing as storing_kernel
from tlinformer_jax.kernels.common import Scores, addressable, available, is_half
from tlinformer_jax.kernels.key_value import KeyValue
from tlinformer_jax.models.attention import OutputAndLse, attend, attend_parts, merge_parts, no_parts
from tlinformer_jax.models.cached_rows import CachedRows, attend_cached, merge_sources
from tlinformer_jax.models.layers import (
    LAYER_NORM_EPSILON,
    LayerParams,
    first_norm,
    project,
    projections,
    unbiased_projections,
    update,
)
from tlinformer_jax.models.rope import Rope, Rotations

# With more sequences than this, XLA's products on the matrix units are faster than those of `kernels.decode.dense`.
MAX_FUSED_ROWS = 4


@flax.struct.dataclass
class TokenLayerParams(LayerParams):
    """A layer's parameters for a single row: the weights of each output feature are contiguous.

    The matrices are [3, h, d_h, D], [D, h, d_h], [2, F, D] and [D, F]; those of experts are as in `LayerParams`.
    """

    @classmethod
    def of(cls, params: LayerParams) -> "TokenLayerParams":
        """Converts parameters from `prepare_layers`, whose heads must not be padded."""
        moved = {name: jnp.moveaxis(getattr(params, name), *axes) for name, axes in _moved_axes(params)}
        return cls(**{**vars(params), **moved})

    def natural(self) -> LayerParams:
        """Returns the parameters for `layers.project` and `layers.update`; inside `jit` this copies no memory."""
        moved = {name: jnp.moveaxis(getattr(self, name), *axes[::-1]) for name, axes in _moved_axes(self)}
        return LayerParams(**{**vars(self), **moved})


def _moved_axes(params: LayerParams) -> list[tuple[str, tuple[int, int]]]:
    """Returns the matrices of `TokenLayerParams`, and the axis that each moves from and to."""
    experts = params.router is not None
    return [
        ("qkv_kernel", (0, -1)),
        ("out_kernel", (-1, 0)),
        *([] if experts else [("gate_up_kernel", (0, -1)), ("down_kernel", (0, -1))]),
    ]


def token_layer(
    params: TokenLayerParams,
    config: ModelConfig,
    x: Float[Array, "batch D"],
    rope: Rope,
    past: CachedRows,
    context: CachedRows | None,
    backend: str | None = None,
    key_rows: Float[Array, "batch D"] | None = None,
) -> tuple[Float[Array, "batch D"], KeyValue]:
    """Runs a layer on one new row per sequence, which attends to cached rows and to itself.

    Args:
      x: the new rows.
      rope: rotations of the new rows, [batch, d_h / 2].
      past: rows that share a softmax with the new row's own key: its generation window (with `config.causal_history`
        after the rows of z), or a baseline's cache.
      context: rows of history or compressed context, with a separate softmax, or with `config.causal_history` in the
        same one. None, or no valid row, adds nothing.
      backend: 'plain', 'triton', or 'triton_interpreted' (for tests on the CPU); None to choose automatically.
      key_rows: input of the keys, see `layers.Embedded`; None if that is x.

    Returns:
      the next x, and the new row's key (rotated) and value, each [batch, heads, d_h].
    """
    if backend is None:
        caches = [part.cache for part in (past, context) if part is not None]
        backend = "triton" if use_token_kernels(config) and addressable(caches) else "plain"
    if backend == "plain":
        natural, keyed = params.natural(), None if key_rows is None else key_rows[:, None]
        rows = jax.tree.map(lambda table: table[:, None], rope)
        query, key, value = (part[:, 0] for part in project(natural, x[:, None], rows, key_rows=keyed))
        own = KeyValue(key, value)
        parts, lses = attend_cached(query, own, past, context, config.attention_scale)
        parts = merge_sources(parts, lses, context, joint=config.causal_history)
        return update(natural, x[:, None], jnp.sum(parts, axis=0).astype(x.dtype)[:, None])[:, 0], own
    interpret = backend == "triton_interpreted"
    # The fused products do not support experts; the attention kernel does not depend on the feed-forward.
    fused = x.shape[0] <= MAX_FUSED_ROWS and params.router is None

    def projected_rows(rows: Array) -> Array:
        return _projected(params, rows, interpret) if fused else projections(params.natural(), rows[:, None])[:, 0]

    projected = projected_rows(x)
    if key_rows is not None:
        projected = projected.at[:, 1].set(projected_rows(key_rows)[:, 1])
    sources = [(part.cache, part.length, part.layer) for part in (past, context) if part is not None]
    parts, lses, own_key = decode_kernel.attend(
        projected, (rope.cos, rope.sin), sources, config.attention_scale, interpret
    )
    parts = merge_sources(parts, lses, context, joint=config.causal_history)
    own = KeyValue(own_key, projected[:, 2])
    if fused:
        return _updated(params, x, parts, interpret), own
    return update(params.natural(), x[:, None], jnp.sum(parts, axis=0).astype(x.dtype)[:, None])[:, 0], own


def use_token_kernels(config: ModelConfig) -> bool:
    """Returns whether the GPU kernels of `token_layer` can run here and the configuration allows them."""
    return config.attention != "xla" and available("decode")


def int8_readers(config: ModelConfig) -> str:
    """Returns a line that says which code reads an int8 cache here."""
    names = {True: "a kernel", False: "plain JAX"}
    kernels = [use_token_kernels(config)]
    line = f"int8 cache: read by {names[kernels[0]]} for a token"
    if config.windowed:
        kernels.append(use_kernels(config.compute_dtype, config.head_dim, config.attention))
        line += f", by {names[kernels[1]]} for prefill and slide"
    return line + ("; arrays of 2^31 to 2^32 numbers by plain JAX" if any(kernels) else "")


def _projected(params: TokenLayerParams, x: Array, interpret: bool) -> Array:
    """Computes `layers.projections` by the fused kernel: [batch, 3, heads, d_h]."""
    shape, norm = params.qkv_kernel.shape, (params.norm1_scale, params.norm1_bias, LAYER_NORM_EPSILON)
    kernel, bias = params.qkv_kernel.reshape(-1, shape[-1]), params.qkv_bias.reshape(-1)
    return decode_kernel.dense(x[None], kernel, norm=norm, bias=bias, interpret=interpret).reshape(-1, *shape[:-1])


def _updated(params: TokenLayerParams, x: Array, parts: Array, interpret: bool) -> Array:
    """Computes `layers.update` by fused kernels from attention's parts [parts, batch, heads, d_h]: [batch, D]."""
    attended = parts.reshape(*parts.shape[:2], -1)
    out_kernel = params.out_kernel.reshape(x.shape[-1], -1)
    x = decode_kernel.dense(attended, out_kernel, bias=params.out_bias, residual=x, dtype=x.dtype, interpret=interpret)
    norm = (params.norm2_scale, params.norm2_bias, LAYER_NORM_EPSILON)
    inner = decode_kernel.dense(x[None], params.gate_up_kernel, norm=norm, gated=True, interpret=interpret)
    return decode_kernel.dense(inner[None], params.down_kernel, residual=x, interpret=interpret)


def write_row(cache: KeyValue, own: KeyValue, row: Int[Array, " batch"], active: Array) -> KeyValue:
    """Writes one new row per active sequence into the cache of every layer, in place if the cache is donated.

    Args:
      cache: keys and values of all layers.
      own: new keys and values, each [layers, batch, heads, d_h].
      row: each sequence's row to write.
      active: bool [batch]; the other sequences do not change.
    """

    rows = cache.as_kept(jax.tree.map(lambda array: array[..., None], own))

    def write_one(array: Array, new: Array) -> Array:
        at: list[Any] = [*[0] * (array.ndim - 1), row[0]]
        old = jax.lax.dynamic_slice(array, at, new.shape)
        return jax.lax.dynamic_update_slice(array, jnp.where(active[0], new, old), at)

    def write_all(array: Array, new: Array) -> Array:
        # Inactive sequences write past the end, which drops their row. `set` expects the indexed axes first.
        between = [slice(None)] * (array.ndim - 3)
        at = (slice(None), jnp.arange(row.size), *between, jnp.where(active, row, array.shape[-1]))
        return array.at[at].set(jnp.moveaxis(new[..., 0], 1, 0), mode="drop")

    return jax.tree.map(write_one if row.size == 1 else write_all, cache, rows)


# ---- Many rows of one sequence
#
# Below, `row` is the sequence's index in the batch, int32 [], and `backend` is the attention's.


def lane_rows(rows: Float[Array, "*any n heads width"], head_dim: int) -> Float[Array, "*any heads d_h n"]:
    """Converts keys or values of many rows to the order of axes in a cache, and removes the padding of heads.

    The memory layout is fixed: otherwise XLA would copy the whole cache to the layout of the written rows, and back.
    """
    moved = jnp.moveaxis(rows[..., :head_dim], -3, -1)
    return with_layout_constraint(moved, Layout(tuple(range(moved.ndim))))


def write_rows(
    cache: KeyValue,
    row: Array,
    start: Array,
    layer: LayerParams,
    rows: Float[Array, "1 n D"],
    rotations: Rotations,
    backend: str,
    key_rows: Float[Array, "1 n D"] | None = None,
    is_chunk: bool = False,
) -> KeyValue:
    """Projects rows to keys and values, and writes these into a layer's cache from row `start` on.

    The products come out in the order of a cache, rows last, which costs nothing; sorting them later would. The cache
    is changed in place if it is donated.

    Args:
      rotations: those of the rows.
      key_rows: input of the keys, see `layers.Embedded`; None if that is `rows`.
      is_chunk: whether `start` is a multiple of the number of rows.
    """
    width = cache.key.shape[-2]
    if cache.key_scale is not None and can_store(cache, rows.dtype, rows.shape[1], backend):
        products, bias = unbiased_projections(layer, rows, "kv", key_rows)
        rope = rotations.rows()
        return storing_kernel.store(cache, products[0], bias, (rope.cos, rope.sin), row, start)
    inputs = [(rows, slice(1, 3))] if key_rows is None else [(key_rows, slice(1, 2)), (rows, slice(2, 3))]
    each = [
        jnp.einsum("dphk,nd->phkn", layer.qkv_kernel[:, parts, :, :width], first_norm(layer, source)[0])
        for source, parts in inputs
    ]
    bias, products = layer.qkv_bias[1:, :, :width].astype(rows.dtype), jnp.concatenate(each)
    if is_chunk and can_store(cache, rows.dtype, rows.shape[1], backend, storing_kernel.PRODUCT_TILE):
        return storing_kernel.store_products(cache, products, bias, rotations.columns(), row, start)
    return _write_products(cache, row, start, products, bias, rotations)


@dataclasses.dataclass(frozen=True)
class TokenTable:
    """Keys and values of the whole vocabulary, not rotated, to be written by `write_tokens`.

    Attributes:
      products, bias: from `layers.unbiased_projections`.
      pairs: both, in the form for `kernels.storing.store_tokens`; None if another function writes.
    """

    products: Float[Array, "V 2 heads width"]
    bias: Float[Array, "2 heads width"]
    pairs: Array | None

    @classmethod
    def of(
        cls, layer: LayerParams, vocabulary: Float[Array, "1 V D"], cache: KeyValue, rows: int, backend: str
    ) -> "TokenTable":
        """Projects the vocabulary, once before a loop over chunks of `rows` rows, to be written into the cache."""
        (products,), bias = unbiased_projections(layer, vocabulary, "kv")
        paired = cache.key_scale is None and can_store(cache, products.dtype, rows, backend)
        pairs = storing_kernel.pair_table(products, bias, cache.key.shape[-2]) if paired else None
        return cls(products, bias, pairs)


def write_tokens(
    cache: KeyValue,
    row: Array,
    start: Array,
    table: TokenTable,
    rotations: Rotations,
    tokens: Int[Array, " n"],
    backend: str,
) -> KeyValue:
    """Writes keys and values of a chunk of tokens into a layer's cache, in place if it is donated; rotates the keys.

    The first row, `start`, is a multiple of the number of tokens.
    """
    products, bias, width = table.products, table.bias, cache.key.shape[-2]
    if table.pairs is not None:
        return storing_kernel.store_tokens(cache, table.pairs, rotations.columns(), row, start, tokens)
    if can_store(cache, products.dtype, tokens.size, backend):
        rope = rotations.rows()
        return storing_kernel.store(cache, products, bias, (rope.cos, rope.sin), row, start, tokens)
    # Looked up as flat rows: a TPU would pad each head's few features to 128 lanes.
    flat = products[..., :width].reshape(products.shape[0], -1)
    taken = jnp.take(flat, tokens, axis=0, mode="clip").T
    return _write_products(cache, row, start, taken.reshape(2, -1, width, tokens.size), bias[..., :width], rotations)


def can_store(cache: KeyValue, dtype: Any, rows: int, backend: str, tile: int = storing_kernel.STORE_TILE) -> bool:
    """Returns whether `kernels.storing` can write `rows` rows of this dtype, a multiple of `tile`, into the cache."""
    usable = use_kernels(dtype, cache.key.shape[-2], backend) and addressable(cache)
    return usable and rows % tile == 0


def _write_products(
    cache: KeyValue,
    row: Array,
    start: Array,
    products: Float[Array, "2 heads d_h n"],
    bias: Float[Array, "2 heads d_h"],
    rotations: Rotations,
) -> KeyValue:
    """Adds the bias to products of keys and values, rotates the keys, and writes both from row `start` on."""
    # Added in float32. XLA would expand a bfloat16 bias to a matrix and add it inside the product.
    biased = (products.astype(jnp.float32) + bias.astype(jnp.float32)[..., None]).astype(products.dtype)
    first, second = jnp.split(biased[0].astype(jnp.float32), 2, axis=1)
    cos, sin = rotations.columns()
    key = jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=1).astype(products.dtype)
    return _write(cache, KeyValue(key, biased[1]), (row,), start)


def write_plainly(
    cache: KeyValue, key_value: Sequence[Array], leading: tuple[Array | int, ...], start: Array | int = 0
) -> KeyValue:
    """Writes keys and values of many rows, each [..., rows, heads, d_h or more], from row `start` on.

    `leading` is the index in the cache's first axes: the layer (if the cache has several) and the sequence.
    """
    return _write(cache, KeyValue(*(lane_rows(array, cache.key.shape[-2]) for array in key_value)), leading, start)


def _write(cache: KeyValue, rows: KeyValue, leading: tuple[Array | int, ...], start: Array | int) -> KeyValue:
    """Writes keys and values in the order of the cache, `leading` as in `write_plainly`."""

    def write(array: Array, new: Array) -> Array:
        at: list[Any] = [*leading, *[0] * (array.ndim - len(leading) - 1), start]
        return jax.lax.dynamic_update_slice(array, new.reshape((1,) * (array.ndim - new.ndim) + new.shape), at)

    return jax.tree.map(write, cache, cache.as_kept(rows))


def attend_history(
    query: Float[Array, "1 queries heads width"],
    cache: KeyValue,
    row: Array,
    length: Array,
    scale: float,
    chunk: int,
    backend: str,
) -> OutputAndLse:
    """Computes attention of a few queries to the first `length` cached rows of a sequence; returns float32.

    Without a kernel that reads the cache directly, `chunk` rows are read at a time; `chunk` divides the cache's rows.
    """
    width = query.shape[-1]
    if use_kernels(query.dtype, cache.key.shape[2], backend) and addressable(cache):
        read, lse = history_kernel.attend(query[0], cache, row, length, scale)
        return jnp.pad(read[None], [(0, 0)] * 3 + [(0, width - read.shape[-1])]), lse[None]

    def body(number: Array, carry: OutputAndLse) -> OutputAndLse:
        start = number * chunk

        def some(array: Array) -> Array:
            at: list[Any] = [row, *[0] * (array.ndim - 2), start]
            return jax.lax.dynamic_slice(array, at, (1, *array.shape[1:-1], chunk))

        rows = jax.tree.map(some, cache).widened(query.dtype)
        key, value = (natural_rows(part, width) for part in (rows.key, rows.value))
        return merge_parts(carry, attend_parts(query, key, value, length - start, scale, backend))

    return jax.lax.fori_loop(0, -(-length // chunk), body, no_parts(query))


def natural_rows(rows: Array, width: int) -> Array:
    """Converts cached keys or values to `attend`'s order of axes, [..., rows, heads, width], padded with zeros."""
    moved = jnp.moveaxis(rows, -1, -3)
    return jnp.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, width - moved.shape[-1])])


def attend_context(
    query: Float[Array, "1 queries heads width"],
    key: Float[Array, "1 rows heads width"],
    value: Float[Array, "1 rows heads width"],
    scores: Scores,
    *,
    head_dim: int,
    key_length: Array,
    backend: str,
    **options: Any,
) -> Float[Array, "1 queries heads width"]:
    """Computes `attend` from many queries to the few rows of a compressed context; not differentiable."""
    if use_kernels(query.dtype, head_dim, backend):
        padding = ((0, 0), (0, -key.shape[1] % history_kernel.ROW_TILE), (0, 0), (0, 0))
        key, value = (lane_rows(jnp.pad(array, padding), head_dim)[0] for array in (key, value))
        return history_kernel.attend_few(query[0], key, value, key_length, scores.scale)[None]
    return attend(query, key, value, scores, key_length=key_length, backend=backend, **options)


def use_kernels(dtype: Any, head_dim: int, backend: str) -> bool:
    """Returns whether `kernels.history` can run here for this dtype and head width, and `backend` allows it."""
    takes = is_half(dtype) and head_dim <= history_kernel.MOST_WIDTH
    return takes and backend != "xla" and available("history")
