"""TLinFormer and TConstFormer, token by token: `prefill`, `step` (a cache hit) and `slide` (a cache miss).

While the generation window does not slide, everything on the history side is constant: a token reads each block's
history keys, the compressed context's and its own window's. A slide makes the window history: block 0's rows are
appended, since they are projections of embeddings; everything else on the history side is rebuilt, in chunks of
rows, so that no more than the cache itself is held. `prefill` builds the same from nothing.

Prefill and slide work on one sequence of the batch: sequences have lengths and window phases of their own.

Where the cache is split over devices (`WindowedCache.split`), these functions run on each of them, inside
`jax.shard_map`: a device makes and reads its own rows of the history, and the softmaxes over them are merged; of all
else, the observation window's rows included, every device computes the same.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import WindowedCache
from tlinformer_jax.decoding.history import SequenceRows, appended, embedded_history, rope_of
from tlinformer_jax.decoding.params import DecoderParams, embed, logits_of
from tlinformer_jax.models.block import compress, hidden, restore
from tlinformer_jax.models.cached_attention import (
    CachedRows,
    KeyValue,
    for_writing,
    lane_rows,
    token_layer,
    write_row,
    write_rows,
)
from tlinformer_jax.models.rope import rope_table
from tlinformer_jax.models.streams import Stream, project_both


def step(
    params: DecoderParams, config: ModelConfig, cache: WindowedCache, tokens: jax.Array, active: jax.Array
) -> tuple[WindowedCache, jax.Array]:
    """Feeds one token to every active sequence; no active sequence's window may be full.

    Args:
      params: of the model.
      config: of the model.
      cache: donated by the caller.
      tokens: int32 [batch].
      active: bool [batch]; of the others nothing changes, and their logits mean nothing.

    Returns:
      the cache, and logits float32 [batch, V].
    """
    x = embed(params, tokens)
    rope = rope_table(cache.position, config.head_dim)
    new = []
    for index, layer in enumerate(params.layers):
        past = CachedRows(cache.window, cache.window_length, index)
        x, own = token_layer(layer, config, x, rope, past, _context_of(config, cache, index))
        new.append(own)
    window = write_row(cache.window, jax.tree.map(lambda *rows: jnp.stack(rows), *new), cache.window_length, active)
    rows = jnp.arange(tokens.shape[0])
    return (
        dataclasses.replace(
            cache,
            tokens=cache.tokens.at[rows, cache.position].set(tokens),
            window=window,
            window_length=cache.window_length + active,
        ),
        logits_of(params, x),
    )


def _context_of(config: ModelConfig, cache: WindowedCache, layer: int) -> CachedRows | None:
    """What a layer's x reads beside its own window: the history in `compress`, else the compressed context."""
    block, depth = divmod(layer, config.layers_per_block)
    if depth == 0:
        if not cache.history:
            return None
        length = cache.history_length if cache.split is None else cache.split.count(cache.history_length)
        return CachedRows(cache.history[block], length, split=cache.split)
    return CachedRows(cache.context, cache.observed_length, block * (config.hidden_depth + 1) + depth - 1)


def prefill(
    params: DecoderParams,
    config: ModelConfig,
    cache: WindowedCache,
    row: jax.Array,
    prompt: jax.Array,
    length: jax.Array,
    observed: jax.Array,
) -> tuple[WindowedCache, jax.Array]:
    """Fills one sequence's cache from its prompt.

    Args:
      params: of the model.
      config: of the model.
      cache: donated by the caller.
      row: the sequence's index in the batch, int32 [].
      prompt: its tokens, int32 [as many as the cache's `tokens` has]; what follows `length` does not matter.
      length: tokens of the prompt, >= 1, int32 [].
      observed: rows of its compressed context, int32 []: `config.observed_rows(history)`.

    Returns:
      the cache, and the logits after the prompt's last token, float32 [V].
    """
    size = config.generation_window
    history = (length - 1) // size * size
    cache = dataclasses.replace(cache, tokens=jax.lax.dynamic_update_slice(cache.tokens, prompt[None], (row, 0)))
    window_tokens = jax.lax.dynamic_slice(prompt, (history,), (size,))
    cache, x = _rebuild(params, config, cache, row, history, observed, window_tokens)
    last = jax.lax.dynamic_index_in_dim(x[0], length - history - 1, keepdims=False)
    cache = dataclasses.replace(cache, window_length=cache.window_length.at[row].set(length - history))
    return cache, logits_of(params, last)


def slide(
    params: DecoderParams, config: ModelConfig, cache: WindowedCache, row: jax.Array, observed: jax.Array
) -> WindowedCache:
    """Makes the generation window of one sequence, which must be full, history.

    Args:
      params: of the model.
      config: of the model.
      cache: donated by the caller; it must have room for the rows.
      row: the sequence's index in the batch, int32 [].
      observed: rows of the compressed context of the grown history, int32 [].

    Returns:
      the cache, with an empty generation window.
    """
    size = config.generation_window
    before = cache.history_length[row]
    if cache.history:
        start, tokens, rope = appended(config, cache, row, before)
        layer = for_writing(params.blocks[0].compress, tokens.size, config.attention)
        first = write_rows(cache.history[0], row, start, layer, embed(params, tokens), rope, config.attention)
        history = (first, *cache.history[1:])
        cache = dataclasses.replace(cache, history=history)
    no_window = jnp.zeros((0,), jnp.int32)
    cache, _ = _rebuild(params, config, cache, row, before + size, observed, no_window)
    return dataclasses.replace(cache, window_length=cache.window_length.at[row].set(0))


def _rebuild(
    params: DecoderParams,
    config: ModelConfig,
    cache: WindowedCache,
    row: Int[Array, ""],
    length: Int[Array, ""],
    observed: Int[Array, ""],
    window_tokens: Int[Array, " m"],
) -> tuple[WindowedCache, Float[Array, "1 m D"]]:
    """Rebuilds the history side of one sequence, and its window: the blocks, whose keys and values go to the cache.

    Args:
      params: of the model.
      config: of the model.
      cache: of the batch.
      row: the sequence's index in the batch.
      length: n, rows of history.
      observed: n - h, rows of the observation window.
      window_tokens: of the generation window; none after a slide, whose history then keeps block 0's rows.

    Returns:
      the cache, and the window's hidden states.
    """
    start, width, m = length - observed, max(config.observed_rows(cache.capacity), 1), window_tokens.size
    z_rope, x_rope = rope_of(config.head_dim, start, width), rope_of(config.head_dim, length, m)
    both_rope = jax.tree.map(lambda *tables: jnp.concatenate(tables), z_rope, x_rope)
    at = SequenceRows(config.head_dim, row, cache.tokens, length, cache.room, cache.split)
    z_rows = embed(params, jax.lax.dynamic_slice(cache.tokens, (row, start), (1, width)))
    C = embedded_history(params, config, cache, at, z_rows, z_rope, fill=m > 0)
    x_rows, context, window = embed(params, window_tokens[None]), [], []
    for index, block in enumerate(params.blocks):
        x = Stream.of(block.compress, x_rows, x_rope)
        window.append((x.K, x.V))
        z_rows, x_rows = compress(block.compress, config, C, C.z, x)
        for layer in block.hidden:
            z, x = project_both(layer, z_rows, x_rows, both_rope, observed)
            context.append((z.K, z.V))
            window.append((x.K, x.V))
            z_rows, x_rows = hidden(layer, config, z, x)
        z = Stream.of(block.restore, z_rows, z_rope, "kv", observed)
        x = Stream.of(block.restore, x_rows, x_rope)
        context.append((z.K, z.V))
        window.append((x.K, x.V))
        following, x_rows = restore(block.restore, config, C, z, x, params.blocks[index + 1 :])
        C = C if following is None else following
    cache = dataclasses.replace(
        cache,
        history=C.filled,
        context=_store(config, cache.context, row, context),
        window=_store(config, cache.window, row, window) if m else cache.window,
        history_length=cache.history_length.at[row].set(length),
        observed_length=cache.observed_length.at[row].set(observed),
    )
    return cache, x_rows


def _store(config: ModelConfig, cache: KeyValue, row: Int[Array, ""], layers: list[tuple[Array, Array]]) -> KeyValue:
    """Writes one sequence's keys and values [1, rows, heads, d_h or more] of every layer into the cache."""
    key, value = (lane_rows(jnp.stack(arrays), config.head_dim) for arrays in zip(*layers))
    at = (0, row, 0, 0, 0)
    return jax.tree.map(lambda array, new: jax.lax.dynamic_update_slice(array, new, at), cache, KeyValue(key, value))
