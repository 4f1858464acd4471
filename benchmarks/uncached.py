"""Computes a token without a cache, which the paper's Figure 9 compares with."""

from typing import Any

import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import history_of
from tlinformer_jax.decoding.params import DecoderParams, embed, logits_of
from tlinformer_jax.models.history import History
from tlinformer_jax.models.key_rows import embedded
from tlinformer_jax.models.model import forward_layers, taps_of
from tlinformer_jax.models.rope import rope_table
from tlinformer_jax.models.streams import Stream
from tlinformer_jax.models.tlinformer import window_states
from tlinformer_jax.models.windows import WindowFrame


def uncached_logits(params: DecoderParams, config: ModelConfig, tokens: jax.Array) -> jax.Array:
    """Runs the part of the forward pass over the prefix that the next token needs.

    A baseline needs all of it. Windows are independent of each other given the embeddings, so a windowed architecture
    needs only the last window with its whole history; running the others would make the cache look better than it is.

    Args:
      config: static.
      tokens: int32 [N].

    Returns:
      logits after the last token, float32 [V].
    """
    length = tokens.shape[0]
    if not config.windowed:
        return logits_of(params, forward_layers(params.wide_layers, config, embed(params, tokens[None]))[0, -1])
    history = history_of(config, length)
    size = config.generation_window + (config.window_overlap if history else 0)
    rows = embed(params, jnp.pad(tokens, (0, history + size - length))[None]).rows
    whole = embedded(params.shift, taps_of(params.blocks), rows)
    past = jax.tree.map(lambda rows: rows[:, :history], whole)
    new = jax.tree.map(lambda rows: rows[:, history:], whole)
    rope = rope_table(jnp.arange(history + size, dtype=jnp.int32), config.head_dim, config.longest_wavelength)
    first, observed = params.blocks[0].compress, config.observed_rows(history)
    width = max(observed, min(history, 1))
    C = History.whole(first, past.rows, rope, key_rows=past.key_rows, key_sums=past.key_sums)
    window = Stream.of(first, new.rows, rope.rows(history, size), key_rows=new.key_rows)
    frame = WindowFrame(history, history - width, observed, width)
    hidden = window_states(params.blocks, config, C, window, frame)
    return logits_of(params, hidden[0, length - history - 1])


jit_uncached_logits: Any = jax.jit(uncached_logits, static_argnums=1)
