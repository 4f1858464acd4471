"""One layer for one new row per sequence: what a generated token runs through, by plain operations or GPU kernels."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.kernels import decode as decode_kernel
from tlinformer_jax.kernels.common import available
from tlinformer_jax.models.cached_attention import CachedRows, KeyValue, attend_cached
from tlinformer_jax.models.layers import LAYER_NORM_EPSILON, LayerParams, project, projections, update
from tlinformer_jax.models.rope import Rope

# Above so many rows the matrix units pay, and products go to XLA.
MAX_FUSED_ROWS = 4


@flax.struct.dataclass
class TokenLayerParams:
    """A layer's parameters as a single row wants them: what one output feature needs is contiguous.

    Attributes:
      vectors: the layer's parameters, its four matrices replaced by None.
      qkv_kernel: [3, h, d_h, D].
      out_kernel: [D, h, d_h].
      gate_up_kernel: [2, F, D].
      down_kernel: [D, F].
    """

    vectors: LayerParams
    qkv_kernel: jax.Array
    out_kernel: jax.Array
    gate_up_kernel: jax.Array
    down_kernel: jax.Array

    @classmethod
    def of(cls, params: LayerParams) -> "TokenLayerParams":
        """From parameters that `prepare_layers` returned, heads not padded."""
        without: dict[str, Any] = dict.fromkeys(("qkv_kernel", "out_kernel", "gate_up_kernel", "down_kernel"))
        return cls(
            dataclasses.replace(params, **without),
            qkv_kernel=jnp.moveaxis(params.qkv_kernel, 0, -1),
            out_kernel=jnp.moveaxis(params.out_kernel, -1, 0),
            gate_up_kernel=jnp.moveaxis(params.gate_up_kernel, 0, -1),
            down_kernel=params.down_kernel.T,
        )

    def natural(self) -> LayerParams:
        """As `layers.project` and `layers.update` take them; inside `jit` that moves nothing."""
        return dataclasses.replace(
            self.vectors,
            qkv_kernel=jnp.moveaxis(self.qkv_kernel, -1, 0),
            out_kernel=jnp.moveaxis(self.out_kernel, 0, -1),
            gate_up_kernel=jnp.moveaxis(self.gate_up_kernel, -1, 0),
            down_kernel=self.down_kernel.T,
        )


def token_layer(
    params: TokenLayerParams,
    config: ModelConfig,
    x: jax.Array,
    rope: Rope,
    past: CachedRows,
    context: CachedRows | None,
    backend: str | None = None,
) -> tuple[jax.Array, KeyValue]:
    """A layer for one new row per sequence, which attends to what is cached and to itself.

    Args:
      params: of the layer.
      config: of the model.
      x: [batch, D].
      rope: rotations of the new rows' positions, [batch, d_h / 2].
      past: rows that share a softmax with the new row's own key.
      context: rows with a softmax of their own, or None.
      backend: 'plain', 'triton', or 'triton_interpreted' (on the CPU, for tests); None takes what fits the device
        and `config.attention`.

    Returns:
      x [batch, D], and the new row's key (rotated) and value, each [batch, heads, d_h].
    """
    if backend is None:
        backend = "triton" if config.attention != "xla" and available("decode") else "plain"
    if backend == "plain":
        natural = params.natural()
        rows = jax.tree.map(lambda table: table[:, None], rope)
        query, key, value = (part[:, 0] for part in project(natural, x[:, None], rows))
        own = KeyValue(key, value)
        attended = attend_cached(query, own, past, context, config.attention_scale)
        return update(natural, x[:, None], attended[:, None])[:, 0], own
    interpret = backend == "triton_interpreted"
    fused = x.shape[0] <= MAX_FUSED_ROWS
    projected = _projected(params, x, interpret) if fused else projections(params.natural(), x[:, None])[:, 0]
    sources = [
        (part.cache.key, part.cache.value, part.length, part.layer) for part in (past, context) if part is not None
    ]
    parts, lses, own_key = decode_kernel.attend(projected, rope, sources, config.attention_scale, interpret)
    if context is not None and context.split is not None:
        parts = jnp.stack([parts[0], context.merged(parts[1], lses[1])])
    own = KeyValue(own_key, projected[:, 2])
    if fused:
        return _updated(params, x, parts, interpret), own
    return update(params.natural(), x[:, None], jnp.sum(parts, axis=0).astype(x.dtype)[:, None])[:, 0], own


def _projected(params: TokenLayerParams, x: jax.Array, interpret: bool) -> jax.Array:
    """`projections` by the fused kernel: [batch, 3, heads, d_h]."""
    shape, vectors = params.qkv_kernel.shape, params.vectors
    norm = (vectors.norm1_scale, vectors.norm1_bias, LAYER_NORM_EPSILON)
    kernel, bias = params.qkv_kernel.reshape(-1, shape[-1]), vectors.qkv_bias.reshape(-1)
    return decode_kernel.dense(x[None], kernel, norm=norm, bias=bias, interpret=interpret).reshape(-1, *shape[:-1])


def _updated(params: TokenLayerParams, x: jax.Array, parts: jax.Array, interpret: bool) -> jax.Array:
    """`update` by fused kernels, of attention's parts [parts, batch, heads, d_h]: [batch, D]."""
    vectors = params.vectors
    attended = parts.reshape(*parts.shape[:2], -1)
    out_kernel = params.out_kernel.reshape(x.shape[-1], -1)
    x = decode_kernel.dense(attended, out_kernel, bias=vectors.out_bias, residual=x, dtype=x.dtype, interpret=interpret)
    norm = (vectors.norm2_scale, vectors.norm2_bias, LAYER_NORM_EPSILON)
    inner = decode_kernel.dense(x[None], params.gate_up_kernel, norm=norm, gated=True, interpret=interpret)
    return decode_kernel.dense(inner[None], params.down_kernel, residual=x, interpret=interpret)
