"""The baselines, token by token: `prefill` and `step` with a preallocated cache of every layer's keys."""

import dataclasses

import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import LayeredCache, chunk_rows, for_chunks
from tlinformer_jax.decoding.params import DecoderParams, embed, logits_of
from tlinformer_jax.models.attention import attend_chunk, fused_kernel
from tlinformer_jax.models.cached_attention import CachedRows, KeyValue, lane_rows, token_layer, write_row
from tlinformer_jax.models.layers import LayerParams, project, update
from tlinformer_jax.models.model import attention_window
from tlinformer_jax.models.rope import rope_table

# Rows of a prompt worked on at once where no fused kernel keeps the scores of rows against rows out of memory.
PLAIN_CHUNK_ROWS = 1024


def step(
    params: DecoderParams, config: ModelConfig, cache: LayeredCache, tokens: jax.Array, active: jax.Array
) -> tuple[LayeredCache, jax.Array]:
    """Feeds one token to every active sequence.

    Args:
      params: of the model.
      config: of the model.
      cache: donated by the caller; but for the sliding window it must have room for a row more.
      tokens: int32 [batch].
      active: bool [batch]; of the others nothing changes, and their logits mean nothing.

    Returns:
      the cache, and logits float32 [batch, V].
    """
    x = embed(params, tokens)
    rope = rope_table(cache.length, config.head_dim)
    held = jnp.minimum(cache.length, cache.capacity)  # the sliding window's rows go round
    new = []
    for index, layer in enumerate(params.layers):
        x, own = token_layer(layer, config, x, rope, CachedRows(cache.layers, held, index), None)
        new.append(own)
    layers = write_row(
        cache.layers, jax.tree.map(lambda *rows: jnp.stack(rows), *new), cache.length % cache.capacity, active
    )
    return dataclasses.replace(cache, layers=layers, length=cache.length + active), logits_of(params, x)


def prefill(
    params: DecoderParams,
    config: ModelConfig,
    cache: LayeredCache,
    row: jax.Array,
    prompt: jax.Array,
    length: jax.Array,
) -> tuple[LayeredCache, jax.Array]:
    """Fills one sequence's cache from its prompt.

    Args:
      params: of the model.
      config: of the model.
      cache: donated by the caller.
      row: the sequence's place in the batch, int32 [].
      prompt: its tokens and padding, int32 [a length class].
      length: tokens of the prompt, >= 1, int32 [].

    Returns:
      the cache, and the logits after the prompt's last token, float32 [V].
    """
    x = embed(params, prompt[None])
    layers = cache.layers
    for index, layer in enumerate(params.wide_layers):
        x, key, value = _layer(layer, config, x, length)
        layers = _store(config, layers, index, row, key, value, length, cache.capacity)
    last = jax.lax.dynamic_index_in_dim(x[0], length - 1, keepdims=False)
    return dataclasses.replace(cache, layers=layers, length=cache.length.at[row].set(length)), logits_of(params, last)


def _layer(
    layer: LayerParams, config: ModelConfig, x: jax.Array, length: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One layer over the whole prompt, chunk by chunk; stops at `length`.

    Returns:
      x [1, padded length, D], and keys and values of all rows, each [1, padded length, heads, d_h].
    """
    most = None if fused_kernel(x.dtype) and config.attention != "xla" else PLAIN_CHUNK_ROWS
    size = chunk_rows(x.shape[1], most)
    window = attention_window(config)
    shape = (1, x.shape[1], *layer.out_kernel.shape[:2])  # heads as padded in the parameters

    def body(start: jax.Array, carry):
        x, keys, values = carry
        chunk = jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
        rope = rope_table(start + jnp.arange(size, dtype=jnp.int32), config.head_dim)
        query, key, value = project(layer, chunk, rope)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(rows, new, start, axis=1)
            for rows, new in ((keys, key), (values, value))
        )
        attended = attend_chunk(query, keys, values, start, window, config.attention_scale, config.attention)
        x = jax.lax.dynamic_update_slice_in_dim(x, update(layer, chunk, attended), start, axis=1)
        return x, keys, values

    empty = jnp.zeros(shape, x.dtype)
    return for_chunks(length, x.shape[1], body, (x, empty, empty), most)


def _store(
    config: ModelConfig,
    layers: KeyValue,
    index: int,
    row: jax.Array,
    key: jax.Array,
    value: jax.Array,
    length: jax.Array,
    capacity: int,
) -> KeyValue:
    """Writes a prompt's keys and values under one layer into the cache."""

    def write(array: jax.Array, new: jax.Array) -> jax.Array:
        if config.architecture == "sliding_window":
            # Row r holds the last position before `length` that is r modulo the capacity.
            row_index = jnp.arange(capacity)
            position = length - 1 - (length - 1 - row_index) % capacity
            new = jnp.take(new, jnp.maximum(position, 0), axis=1)
        new = lane_rows(new, config.head_dim)[None, ..., : array.shape[-1]]
        return jax.lax.dynamic_update_slice(array, new, (index, row, 0, 0, 0))

    return KeyValue(write(layers.key, key), write(layers.value, value))
