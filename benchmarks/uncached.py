"""A token without a cache: what the paper's Figure 9 compares a cache with."""

from typing import Any

import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import history_of
from tlinformer_jax.decoding.params import DecoderParams, embed, logits_of
from tlinformer_jax.models.block import causal_layers
from tlinformer_jax.models.rope import rope_table
from tlinformer_jax.models.streams import History, Projected
from tlinformer_jax.models.tlinformer import later_window
from tlinformer_jax.models.transformer import forward_layers
from tlinformer_jax.models.windows import WindowFrame


def uncached_logits(params: DecoderParams, config: ModelConfig, tokens: jax.Array) -> jax.Array:
    """The forward pass over the prefix that the next token needs.

    A baseline needs all of it. Windows are independent of each other given the embeddings, so a windowed
    architecture needs the last window only, over its whole history; running the others would flatter the cache.

    Args:
      params: of the model.
      config: of the model (static).
      tokens: int32 [N].

    Returns:
      logits after the last token, float32 [V].
    """
    length = tokens.shape[0]
    if not config.windowed:
        return logits_of(params, forward_layers(params.wide_layers, config, embed(params, tokens[None]))[0, -1])
    size, history = config.generation_window, history_of(config, length)
    rows = embed(params, jnp.pad(tokens, (0, history + size - length))[None])
    rope = rope_table(jnp.arange(history + size, dtype=jnp.int32), config.head_dim)
    if history == 0:
        layers = [layer for block in params.blocks for layer in block.layers()]
        return logits_of(params, causal_layers(layers, config, rows, rope)[0, length - 1])
    observed = config.observed_rows(history)
    projected = Projected.of(params.blocks[0].compress, rows, rope)
    hidden = later_window(
        params.blocks,
        config,
        History(rows[:, history:], projected.rows(history, size)),
        History(rows[:, :history], projected.rows(0, history)),
        WindowFrame(jnp.int32(history), jnp.int32(history - observed), jnp.int32(observed), max(observed, 1)),
        rope,
        None,
    )
    return logits_of(params, hidden[0, length - history - 1])


jit_uncached_logits: Any = jax.jit(uncached_logits, static_argnums=1)
