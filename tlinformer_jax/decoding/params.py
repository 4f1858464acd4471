"""Parameters for the decoder, cast to the compute dtype once instead of for every token."""

from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.attention import head_multiple
from tlinformer_jax.models.block import BlockParams
from tlinformer_jax.models.cached_attention import TokenLayerParams
from tlinformer_jax.models.delta import DeltaParams
from tlinformer_jax.models.key_rows import NO_TOKEN, embedded
from tlinformer_jax.models.layers import Embedded, LayerParams, layer_norm, prepare_layers
from tlinformer_jax.models.model import ModelParams, output_logits


@flax.struct.dataclass
class DecoderParams:
    """A model's parameters in the compute dtype.

    Attributes:
      embedding: the embedding, which is also the output head.
      blocks: blocks of a windowed architecture (else empty), from `prepare_layers`, for many rows at once.
      wide_layers: layers of a baseline (else empty), from `prepare_layers`, for many rows at once.
      layers: all layers of any architecture in order, for one row per sequence. Gated DeltaNet layers have the same
        form for one row and for many.
      norm_scale, norm_bias: parameters of the final LayerNorm.
      shift: parameter of the token shift; None without `config.token_shift`.
    """

    embedding: Float[Array, "V D"]
    blocks: tuple[BlockParams, ...]
    wide_layers: tuple[LayerParams | DeltaParams, ...]
    layers: tuple[TokenLayerParams | DeltaParams, ...]
    norm_scale: Float[Array, " D"]
    norm_bias: Float[Array, " D"]
    shift: Float[Array, " D"] | None


def decoder_params(params: ModelParams, config: ModelConfig) -> DecoderParams:
    """Casts a model's parameters and converts them to the decoder's form."""
    dtype, multiple = config.compute_dtype, head_multiple(config.compute_dtype, config.attention)
    layers: tuple[Any, ...] = params.layers or tuple(layer for block in params.blocks for layer in block.layers())
    return DecoderParams(
        embedding=params.embedding.astype(dtype),
        blocks=prepare_layers(params.blocks, dtype, multiple),
        wide_layers=prepare_layers(params.layers, dtype, multiple),
        layers=tuple(
            layer if isinstance(layer, DeltaParams) else TokenLayerParams.of(layer)
            for layer in prepare_layers(layers, dtype)
        ),
        norm_scale=params.norm_scale,
        norm_bias=params.norm_bias,
        shift=params.shift,
    )


def embed(params: DecoderParams, tokens: Int[Array, "*shape"], before: Int[Array, "*shape"] | None = None) -> Embedded:
    """Embeds ids like `models.model.embed`, without sums of key taps.

    `before` has the id before each token, for the token shift. The caller has checked that ids are in the vocabulary.
    """
    earlier = None if before is None else [look_up_before(params, before)]
    return embedded(params.shift, (), jnp.take(params.embedding, tokens, axis=0, mode="clip"), earlier)


def look_up_before(params: DecoderParams, before: Int[Array, "*shape"]) -> Float[Array, "*shape D"]:
    """Embeds ids from `WindowedCache.tokens_before`; zeros for NO_TOKEN."""
    rows = jnp.take(params.embedding, before, axis=0, mode="clip")
    return jnp.where((before == NO_TOKEN)[..., None], 0, rows)


def logits_of(params: DecoderParams, hidden: Float[Array, "*shape D"]) -> Float[Array, "*shape V"]:
    """Returns float32 logits of hidden states before the final LayerNorm."""
    return output_logits(layer_norm(hidden, params.norm_scale, params.norm_bias), params.embedding)
