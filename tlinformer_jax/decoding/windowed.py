"""TLinFormer and TConstFormer, token by token: `prefill`, `step` (a cache hit) and `slide` (a cache miss).

While the generation window does not slide, everything on the history side is constant: a token reads each block's
history keys, the compressed context's and its own window's. A slide makes the window history: block 0's rows are
appended, since they are projections of embeddings; everything else on the history side is rebuilt, in chunks of
rows, so that no more than the cache itself is held. `prefill` builds the same from nothing.

Prefill and slide work on one sequence of the batch: sequences have lengths and window phases of their own.

Where the cache is dealt out over devices (`WindowedCache.split`), these functions run on each of them, inside
`jax.shard_map`: a device makes and reads its own rows of the history, and the softmaxes over them are merged; of all
else, the observation window's rows included, every device computes the same.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import WindowedCache, chunk_rows, for_chunks
from tlinformer_jax.decoding.frame import Frame, appended, rope_of
from tlinformer_jax.decoding.params import DecoderParams, embed, logits_of
from tlinformer_jax.decoding.words import project_words
from tlinformer_jax.models.attention import attend, attend_parts, merge_parts, no_parts
from tlinformer_jax.models.cached_attention import (
    CachedRows,
    KeyValue,
    attend_context,
    attend_history,
    for_writing,
    lane_rows,
    write_row,
    write_rows,
    write_words,
)
from tlinformer_jax.models.layers import LayerParams, project, update
from tlinformer_jax.models.rope import Rope, rope_table
from tlinformer_jax.models.streams import BlockParams
from tlinformer_jax.models.token_layer import token_layer


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
      row: the sequence's place in the batch, int32 [].
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
    cache, x = _rebuild(params, config, cache, _frame(params, config, cache, row, history, observed), window_tokens)
    assert x is not None  # it was given a window
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
      row: the sequence's place in the batch, int32 [].
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
    cache, _ = _rebuild(params, config, cache, _frame(params, config, cache, row, before + size, observed), None)
    return dataclasses.replace(cache, window_length=cache.window_length.at[row].set(0))


def _frame(
    params: DecoderParams,
    config: ModelConfig,
    cache: WindowedCache,
    row: jax.Array,
    length: jax.Array,
    observed: jax.Array,
) -> Frame:
    width = max(config.observed_rows(cache.capacity), 1)
    words = project_words(params, config, cache.room, chunk_rows(cache.room))
    return Frame(row, length, length - observed, observed, words, width, cache.split)


def _rebuild(
    params: DecoderParams, config: ModelConfig, cache: WindowedCache, frame: Frame, window_tokens: jax.Array | None
) -> tuple[WindowedCache, jax.Array | None]:
    """Rebuilds the history side of one sequence; with `window_tokens` [W_og] also its window and all of block 0.

    Returns:
      the cache, and the window's hidden states [1, W_og, D].
    """
    z = embed(params, jax.lax.dynamic_slice(cache.tokens, (frame.row, frame.start), (1, frame.width)))
    z_rope = rope_of(config, frame.start, frame.width)
    x = None if window_tokens is None else embed(params, window_tokens[None])
    x_rope = rope_of(config, frame.length, config.generation_window)
    rows = None  # C of the last block worked on, for the blocks that do not begin at the embeddings
    if config.num_blocks > 2:
        rows = jnp.zeros((1, cache.room, config.d_model), z.dtype)
    observed_rows = z
    # Keys and values of the previous block's restore layer, and queries of its observed rows.
    restored: tuple[jax.Array, ...] | None = None
    z_query: jax.Array | None = None
    for index, block in enumerate(params.blocks):
        if restored is not None and z_query is not None:  # this block's C, of the observation window's rows
            z = _restore(params.blocks[index - 1].restore, config, observed_rows, z_query, restored, frame)
        observed_rows = z
        (z_query,) = project(block.compress, z, z_rope, "q")
        x_own = None if x is None else project(block.compress, x, x_rope)
        readers = z_query
        if x_own is not None and config.architecture == "tlinformer":
            readers = jnp.concatenate([z_query, x_own[0]], axis=1)
        cache, rows, shared = _read_history(
            params, config, cache, frame, index, readers, rows, restored, from_scratch=x is not None
        )
        z = update(block.compress, z, shared[:, : frame.width])
        context, window, x = _through_layers(block, config, frame, z, z_rope, x, x_own, shared, x_rope)
        cache = _store_block(cache, config, frame.row, index, context, window)
        restored = context[-1]
    row = frame.row
    cache = dataclasses.replace(
        cache,
        history_length=cache.history_length.at[row].set(frame.length),
        observed_length=cache.observed_length.at[row].set(frame.observed),
    )
    return cache, x


def _through_layers(
    block: BlockParams,
    config: ModelConfig,
    frame: Frame,
    z: jax.Array,
    z_rope: Rope,
    x: jax.Array | None,
    x_own: tuple[jax.Array, ...] | None,
    shared: jax.Array,
    x_rope: Rope,
) -> tuple[list[tuple[jax.Array, ...]], list[tuple[jax.Array, ...]], jax.Array | None]:
    """The layers of a block after `compress` has read the history.

    Returns:
      the context's (key, value) under each hidden and the restore layer, the window's under every layer (empty
      without x), and x.
    """
    context: list[tuple[jax.Array, ...]] = []
    window: list[tuple[jax.Array, ...]] = []
    options: dict[str, Any] = {"backend": config.attention, "scale": config.attention_scale}
    if x is not None and x_own is not None:
        query, key, value = x_own
        window.append((key, value))
        attended = attend(query, key, value, causal=True, **options)
        if config.architecture == "tlinformer":
            attended = attended + shared[:, frame.width :]
        x = update(block.compress, x, attended)
    for layer in (*block.hidden, block.restore):
        *z_queries, z_key, z_value = project(layer, z, z_rope, "kv" if layer is block.restore else "qkv")
        context.append((z_key, z_value))
        from_context: dict[str, Any] = {"key": z_key, "value": z_value, "key_length": frame.observed, **options}
        if x is not None:
            query, key, value = project(layer, x, x_rope)
            window.append((key, value))
            own = attend(query, key, value, causal=True, **options)
            x = update(layer, x, own + attend(query, **from_context))
        if z_queries:
            z = update(layer, z, attend(z_queries[0], **from_context))
    return context, window, x


def _read_history(
    params: DecoderParams,
    config: ModelConfig,
    cache: WindowedCache,
    frame: Frame,
    index: int,
    readers: jax.Array,
    rows: jax.Array | None,
    restored: tuple[jax.Array, ...] | None,
    *,
    from_scratch: bool,
) -> tuple[WindowedCache, jax.Array | None, jax.Array]:
    """Block `index` over the history that this device has, chunk by chunk: makes and keeps its keys, attends to them.

    Args:
      readers: queries that read the history, [1, queries, heads, d_h].
      rows: C of the previous block [1, room, D] where it is kept; replaced by this block's.
      restored: keys and values of the previous block's restore layer; None for the first.
      from_scratch: make block 0's keys too; else they are read from the cache.

    Returns:
      the cache, the kept rows, and what the readers attended to in all of the history, [1, queries, heads, d_h].
    """
    size = chunk_rows(cache.room)
    tokens, kept = cache.tokens, bool(cache.history)
    layer = params.blocks[index].compress
    writer = for_writing(layer, size, config.attention)

    def body(start: jax.Array, carry):
        history, rows, parts = carry
        if kept and index == 0 and frame.words is not None:
            ids, rope = frame.ids(tokens, start, size)[0], frame.rope(config, start, size)
            words = frame.words.key_value
            return write_words(history, frame.row, start, words, ids, rope, config.attention), rows, parts
        chunk = _history_rows(params, config, tokens, frame, index, rows, restored, start, size)
        rope = frame.rope(config, start, size)
        if rows is not None and 0 < index < config.num_blocks - 1:
            rows = jax.lax.dynamic_update_slice(rows, chunk, (0, start, 0))
        if kept:
            return write_rows(history, frame.row, start, writer, chunk, rope, config.attention), rows, parts
        key, value = project(layer, chunk, rope, "kv")
        read = attend_parts(readers, key, value, frame.held - start, config.attention_scale, config.attention)
        return history, rows, merge_parts(parts, read)

    if not kept:
        _, rows, parts = for_chunks(frame.held, cache.room, body, (None, rows, no_parts(readers)))
        return cache, rows, frame.merged(*parts).astype(readers.dtype)
    history = cache.history[index]
    if from_scratch or index > 0:
        history, rows, _ = for_chunks(frame.held, cache.room, body, (history, rows, None))
    cache = dataclasses.replace(cache, history=(*cache.history[:index], history, *cache.history[index + 1 :]))
    scale, backend = config.attention_scale, config.attention
    read = attend_history(readers, history, frame.row, frame.held, scale, size, backend)
    return cache, rows, frame.merged(*read).astype(readers.dtype)


def _history_rows(
    params: DecoderParams,
    config: ModelConfig,
    tokens: jax.Array,
    frame: Frame,
    index: int,
    rows: jax.Array | None,
    restored: tuple[jax.Array, ...] | None,
    start: jax.Array,
    size: int,
) -> jax.Array:
    """C at the entrance of block `index`, this device's rows start .. start + size - 1: [1, size, D]."""
    rope, ids = frame.rope(config, start, size), frame.ids(tokens, start, size)
    if index <= 1 or rows is None:
        chunk, words = embed(params, ids), frame.words
    else:
        chunk, words = jax.lax.dynamic_slice(rows, (0, start, 0), (1, size, config.d_model)), None
    if restored is None:
        return chunk
    block = params.blocks[index - 1]
    if words is not None:
        query = words.rotated_query(ids, rope)
    else:
        (query,) = project(block.compress, chunk, rope, "q")
    return _restore(block.restore, config, chunk, query, restored, frame)


def _restore(
    layer: LayerParams,
    config: ModelConfig,
    rows: jax.Array,
    query: jax.Array,
    restored: tuple[jax.Array, ...],
    frame: Frame,
) -> jax.Array:
    """The restore layer for rows of the history: [1, rows, D]."""
    key, value = restored
    attended = attend_context(
        query, key, value, frame.observed, config.attention_scale, config.head_dim, config.attention
    )
    return update(layer, rows, attended)


def _store_block(
    cache: WindowedCache, config: ModelConfig, row: jax.Array, index: int, context: list, window: list
) -> WindowedCache:
    """Writes a block's compressed context, and its window where there is one, for one sequence."""

    def write(to: KeyValue, parts: list, layer: int) -> KeyValue:
        key, value = (lane_rows(jnp.stack(arrays), config.head_dim) for arrays in zip(*parts))
        at = (layer, row, 0, 0, 0)
        return jax.tree.map(lambda array, part: jax.lax.dynamic_update_slice(array, part, at), to, KeyValue(key, value))

    cache = dataclasses.replace(cache, context=write(cache.context, context, index * (config.hidden_depth + 1)))
    if window:
        cache = dataclasses.replace(cache, window=write(cache.window, window, index * config.layers_per_block))
    return cache
