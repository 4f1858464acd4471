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
from tlinformer_jax.kernels.common import available, is_half
from tlinformer_jax.kernels.key_value import KeyValue
from tlinformer_jax.models.attention import OutputAndLse, attend, attend_parts, merge_parts, no_parts
from tlinformer_jax.models.cached_rows import CachedRows, attend_cached
from tlinformer_jax.models.layers import (
    LAYER_NORM_EPSILON,
    LayerParams,
    project,
    projections,
    unbiased_projections,
    update,
)
from tlinformer_jax.models.rope import Rope, rotate

# With more sequences than this, XLA's products on the matrix units are faster than those of `kernels.decode.dense`.
MAX_FUSED_ROWS = 4


@flax.struct.dataclass
class TokenLayerParams:
    """A layer's parameters for a single row: the weights of each output feature are contiguous.

    Attributes:
      vectors: the layer's parameters with None for the four matrices.
      qkv_kernel, out_kernel: [3, h, d_h, D] and [D, h, d_h].
      gate_up_kernel, down_kernel: [2, F, D] and [D, F]; for experts as in `LayerParams`.
    """

    vectors: LayerParams
    qkv_kernel: Array
    out_kernel: Array
    gate_up_kernel: Array
    down_kernel: Array

    @classmethod
    def of(cls, params: LayerParams) -> "TokenLayerParams":
        """Converts parameters from `prepare_layers`, whose heads must not be padded."""
        without: dict[str, Any] = dict.fromkeys(("qkv_kernel", "out_kernel", "gate_up_kernel", "down_kernel"))
        experts = params.router is not None
        return cls(
            dataclasses.replace(params, **without),
            qkv_kernel=jnp.moveaxis(params.qkv_kernel, 0, -1),
            out_kernel=jnp.moveaxis(params.out_kernel, -1, 0),
            gate_up_kernel=params.gate_up_kernel if experts else jnp.moveaxis(params.gate_up_kernel, 0, -1),
            down_kernel=params.down_kernel if experts else params.down_kernel.T,
        )

    def natural(self) -> LayerParams:
        """Returns the parameters for `layers.project` and `layers.update`; inside `jit` this copies no memory."""
        experts = self.vectors.router is not None
        return dataclasses.replace(
            self.vectors,
            qkv_kernel=jnp.moveaxis(self.qkv_kernel, -1, 0),
            out_kernel=jnp.moveaxis(self.out_kernel, 0, -1),
            gate_up_kernel=self.gate_up_kernel if experts else jnp.moveaxis(self.gate_up_kernel, -1, 0),
            down_kernel=self.down_kernel if experts else self.down_kernel.T,
        )


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
      past: rows that share a softmax with the new row's own key: its generation window, or a baseline's cache.
      context: rows with a separate softmax: history or compressed context. None, or no valid row, adds 0.
      backend: 'plain', 'triton', or 'triton_interpreted' (for tests on the CPU); None to choose automatically.
      key_rows: input of the keys, see `layers.Embedded`; None if that is x.

    Returns:
      the next x, and the new row's key (rotated) and value, each [batch, heads, d_h].
    """
    if backend is None:
        backend = "triton" if use_token_kernels(config) else "plain"
    if backend == "plain":
        natural, keyed = params.natural(), None if key_rows is None else key_rows[:, None]
        rows = jax.tree.map(lambda table: table[:, None], rope)
        query, key, value = (part[:, 0] for part in project(natural, x[:, None], rows, key_rows=keyed))
        own = KeyValue(key, value)
        attended = attend_cached(query, own, past, context, config.attention_scale)
        return update(natural, x[:, None], attended[:, None])[:, 0], own
    interpret = backend == "triton_interpreted"
    # The fused products do not support experts; the attention kernel does not depend on the feed-forward.
    fused = x.shape[0] <= MAX_FUSED_ROWS and params.vectors.router is None

    def projected_rows(rows: Array) -> Array:
        return _projected(params, rows, interpret) if fused else projections(params.natural(), rows[:, None])[:, 0]

    projected = projected_rows(x)
    if key_rows is not None:
        projected = projected.at[:, 1].set(projected_rows(key_rows)[:, 1])
    sources = [(part.cache, part.length, part.layer) for part in (past, context) if part is not None]
    parts, lses, own_key = decode_kernel.attend(projected, rope, sources, config.attention_scale, interpret)
    if context is not None and context.split is not None:
        parts = jnp.stack([parts[0], context.merged(parts[1], lses[1])])
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
    line = f"int8 cache: read by {names[use_token_kernels(config)]} for a token"
    if not config.windowed:
        return line
    many = names[use_kernels(config.compute_dtype, config.head_dim, config.attention)]
    return f"{line}, by {many} for prefill and slide"


def _projected(params: TokenLayerParams, x: Array, interpret: bool) -> Array:
    """Computes `layers.projections` by the fused kernel: [batch, 3, heads, d_h]."""
    shape, vectors = params.qkv_kernel.shape, params.vectors
    norm = (vectors.norm1_scale, vectors.norm1_bias, LAYER_NORM_EPSILON)
    kernel, bias = params.qkv_kernel.reshape(-1, shape[-1]), vectors.qkv_bias.reshape(-1)
    return decode_kernel.dense(x[None], kernel, norm=norm, bias=bias, interpret=interpret).reshape(-1, *shape[:-1])


def _updated(params: TokenLayerParams, x: Array, parts: Array, interpret: bool) -> Array:
    """Computes `layers.update` by fused kernels from attention's parts [parts, batch, heads, d_h]: [batch, D]."""
    vectors = params.vectors
    attended = parts.reshape(*parts.shape[:2], -1)
    out_kernel = params.out_kernel.reshape(x.shape[-1], -1)
    x = decode_kernel.dense(attended, out_kernel, bias=vectors.out_bias, residual=x, dtype=x.dtype, interpret=interpret)
    norm = (vectors.norm2_scale, vectors.norm2_bias, LAYER_NORM_EPSILON)
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


def for_writing(layer: LayerParams, rows: int, backend: str) -> LayerParams:
    """Prepares a layer for calls of `write_rows` with `rows` rows each; call it outside loops."""
    head_dim = layer.out_kernel.shape[-1] // layer.out_kernel.shape[0]  # D / heads, without padding
    if not _stores_by_kernel(layer.qkv_kernel.dtype, head_dim, rows, backend):
        return layer
    kernel, bias = (history_kernel.halves_apart(array, head_dim) for array in (layer.qkv_kernel, layer.qkv_bias))
    return dataclasses.replace(layer, qkv_kernel=kernel, qkv_bias=bias)


def _stores_by_kernel(dtype: Any, head_dim: int, rows: int, backend: str) -> bool:
    return use_kernels(dtype, head_dim, backend) and rows % history_kernel.STORE_TILE == 0


def write_rows(
    cache: KeyValue,
    row: Array,
    start: Array,
    layer: LayerParams,
    rows: Float[Array, "1 n D"],
    rope: Rope,
    backend: str,
    key_rows: Float[Array, "1 n D"] | None = None,
) -> KeyValue:
    """Projects rows to keys and values and writes these into a layer's cache from row `start` on.

    `layer` is from `for_writing`. The write is in place if the cache is donated.
    """
    if _stores_by_kernel(layer.qkv_kernel.dtype, cache.key.shape[2], rows.shape[1], backend):
        projected, bias = unbiased_projections(layer, rows, "kv", key_rows)
        return history_kernel.store(cache, projected[0], bias, rope, row, start)
    return write_plainly(cache, project(layer, rows, rope, "kv", key_rows), (row,), start)


def write_tokens(
    cache: KeyValue,
    row: Array,
    start: Array,
    table: Float[Array, "V 2 heads width"],
    tokens: Int[Array, " n"],
    rope: Rope,
    backend: str,
) -> KeyValue:
    """Does the same as `write_rows`, but looks up the keys and values of tokens in a table of the vocabulary.

    The table is projected by a layer from `for_writing`; its keys are not rotated.
    """
    if _stores_by_kernel(table.dtype, cache.key.shape[2], tokens.size, backend):
        no_bias = jnp.zeros(table.shape[1:], table.dtype)
        return history_kernel.store(cache, table, no_bias, rope, row, start, tokens)
    key, value = jnp.moveaxis(jnp.take(table, tokens, axis=0, mode="clip")[None], 2, 0)
    return write_plainly(cache, (rotate(key, rope), value), (row,), start)


def write_plainly(
    cache: KeyValue, key_value: Sequence[Array], place: tuple[Array | int, ...], start: Array | int = 0
) -> KeyValue:
    """Writes keys and values of many rows, each [..., rows, heads, d_h or more], from row `start` on, in plain JAX.

    `place` is the index in the cache's first axes: the layer (if the cache has several) and the sequence.
    """
    rows = KeyValue(*(lane_rows(array, cache.key.shape[-2]) for array in key_value))

    def write(array: Array, new: Array) -> Array:
        at: list[Any] = [*place, *[0] * (array.ndim - len(place) - 1), start]
        return jax.lax.dynamic_update_slice(array, new, at)

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
    if use_kernels(query.dtype, cache.key.shape[2], backend):
        read, lse = history_kernel.attend(query[0], cache, row, length, scale)
        return jnp.pad(read[None], [(0, 0)] * 3 + [(0, width - read.shape[-1])]), lse[None]

    def body(number: Array, carry: OutputAndLse) -> OutputAndLse:
        start = number * chunk

        def some(array: Array) -> Array:
            at: list[Any] = [row, *[0] * (array.ndim - 2), start]
            return jax.lax.dynamic_slice(array, at, (1, *array.shape[1:-1], chunk))

        rows = jax.tree.map(some, cache).widened(query.dtype)
        key, value = (_natural_rows(part, width) for part in (rows.key, rows.value))
        return merge_parts(carry, attend_parts(query, key, value, length - start, scale, backend))

    return jax.lax.fori_loop(0, -(-length // chunk), body, no_parts(query))


def _natural_rows(rows: Array, width: int) -> Array:
    """Converts cached keys or values to `attend`'s order of axes, [..., rows, heads, width], padded with zeros."""
    moved = jnp.moveaxis(rows, -1, -3)
    return jnp.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, width - moved.shape[-1])])


def attend_context(
    query: Float[Array, "1 queries heads width"],
    key: Float[Array, "1 rows heads width"],
    value: Float[Array, "1 rows heads width"],
    *,
    head_dim: int,
    key_length: Array,
    **options: Any,
) -> Float[Array, "1 queries heads width"]:
    """Computes `attend` from many queries to the few rows of a compressed context; not differentiable."""
    if use_kernels(query.dtype, head_dim, options["backend"]):
        padding = ((0, 0), (0, -key.shape[1] % history_kernel.ROW_TILE), (0, 0), (0, 0))
        key, value = (lane_rows(jnp.pad(array, padding), head_dim)[0] for array in (key, value))
        return history_kernel.attend_few(query[0], key, value, key_length, options["scale"])[None]
    return attend(query, key, value, key_length=key_length, **options)


def use_kernels(dtype: Any, head_dim: int, backend: str) -> bool:
    """Returns whether `kernels.history` can run here for this dtype and head width, and `backend` allows it."""
    takes = is_half(dtype) and head_dim <= history_kernel.MOST_WIDTH
    return takes and backend != "xla" and available("history")
