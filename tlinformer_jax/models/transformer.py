"""The baselines: ordinary causal layers over the whole sequence, made of the same layer as the blocks."""

import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.attention import attend
from tlinformer_jax.models.block import CAUSAL_ATTENTION, FEED_FORWARD
from tlinformer_jax.models.dropout import Dropout, part_of
from tlinformer_jax.models.layers import LayerParams, chain_layers, project, update
from tlinformer_jax.models.recompute import recomputed
from tlinformer_jax.models.rope import rope_table
from tlinformer_jax.models.streams import attention_options


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
    window, scan = attention_window(config), config.scans_layers

    def layer(x: jax.Array, item: tuple[LayerParams, Dropout | None]) -> tuple[jax.Array, None]:
        params, dropout = item
        options = attention_options(config, part_of(dropout, CAUSAL_ATTENTION))
        attended = attend(*project(params, x, rope), causal=True, window=window, **options)
        return update(params, x, attended, part_of(dropout, FEED_FORWARD)), None

    if config.remat == "window":
        layer = recomputed(layer, config, in_loop=scan)
    return chain_layers(layer, layers, embeddings, dropout, scan)
