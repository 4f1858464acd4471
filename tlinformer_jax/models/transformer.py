"""The baselines: ordinary causal layers over the whole sequence, made of the same layer as the blocks."""

import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.block import causal_layers
from tlinformer_jax.models.dropout import Dropout
from tlinformer_jax.models.layers import LayerParams
from tlinformer_jax.models.rope import rope_table


def attention_window(config: ModelConfig) -> int | None:
    """Positions a baseline's query sees, itself included; None for all before it."""
    if config.architecture == "sliding_window":
        return int(config.history_window) + config.generation_window
    return None


def forward_layers(
    layers: tuple[LayerParams, ...], config: ModelConfig, embeddings: jax.Array, dropout: Dropout | None = None
) -> jax.Array:
    """Hidden states of a whole sequence.

    Args:
      layers: parameters, from `prepare_layers`.
      config: of the model, architecture 'transformer' or 'sliding_window'.
      embeddings: [batch, length, D] in the compute dtype.
      dropout: None outside training.

    Returns:
      [batch, length, D], before the final LayerNorm.
    """
    rope = rope_table(jnp.arange(embeddings.shape[1], dtype=jnp.int32), config.head_dim)
    return causal_layers(
        layers, config, embeddings, rope, dropout, attention_window(config), remat=config.remat == "window"
    )
