"""The baselines' `prefill`, which caches the keys and values, or the state, of every layer."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import LayeredCache, chunk_rows, for_chunks
from tlinformer_jax.decoding.params import DecoderParams, embed, logits_of
from tlinformer_jax.models.attention import attend_chunk, fused_kernel
from tlinformer_jax.models.cached_attention import write_plainly
from tlinformer_jax.models.delta import DeltaParams, DeltaState, delta_mixer
from tlinformer_jax.models.layers import LayerParams, project, update
from tlinformer_jax.models.model import attention_window
from tlinformer_jax.models.rope import rope_table

# Rows of a prompt processed at once without a fused kernel, which would keep their scores out of memory.
PLAIN_CHUNK_ROWS = 1024

# Types of x, and of the keys and values of a prompt.
Rows = Float[Array, "1 length D"]
Heads = Float[Array, "1 length h k"]
LayerRows = tuple[Rows, Heads, Heads]


def prefill(
    params: DecoderParams,
    config: ModelConfig,
    cache: LayeredCache,
    row: Int[Array, ""],
    prompt: Int[Array, " padded"],
    length: Int[Array, ""],
) -> tuple[LayeredCache, Float[Array, " V"]]:
    """Fills the cache of sequence `row` from its prompt; returns the cache and the next token's logits.

    The prompt has `length` >= 1 tokens and is padded to a length class.
    """
    embedded, layers, capacity, states = embed(params, prompt[None]), cache.layers, cache.capacity, cache.state

    def kept(rows: Heads) -> Float[Array, "1 1 rows h k"]:
        if config.architecture == "sliding_window":
            # Row r contains the last position before `length` that equals r modulo the capacity.
            position = length - 1 - (length - 1 - jnp.arange(capacity)) % capacity
            rows = jnp.take(rows, jnp.maximum(position, 0), axis=1)
        return rows[None, :, : layers.rows]

    x, key_rows = embedded.rows, embedded.key_rows
    for number, layer in enumerate(params.wide_layers):
        index = config.index_in_kind(number)
        if isinstance(layer, DeltaParams):
            x, state = _delta_layer(layer, config, x, length)
            states = jax.tree.map(lambda array, new, at=index: array.at[at, row].set(new[0]), states, state)
            continue
        x, key, value = _layer(layer, config, x, length, key_rows)
        key_rows = None  # only the first layer has key rows
        layers = write_plainly(layers, [kept(key), kept(value)], (index, row))
    last = jax.lax.dynamic_index_in_dim(x[0], length - 1, keepdims=False)
    end = None if cache.last is None else cache.last.at[row].set(prompt[length - 1])
    cache = dataclasses.replace(cache, layers=layers, length=cache.length.at[row].set(length), last=end, state=states)
    return cache, logits_of(params, last)


def _delta_layer(layer: DeltaParams, config: ModelConfig, x: Rows, length: Int[Array, ""]) -> tuple[Rows, DeltaState]:
    """Runs a Gated DeltaNet layer on the first `length` rows of a prompt, chunk by chunk; returns rows and state."""
    size = chunk_rows(x.shape[1])

    def body(start: Int[Array, ""], carry: tuple[Rows, DeltaState]) -> tuple[Rows, DeltaState]:
        x, state = carry
        chunk = jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
        mixed, state = delta_mixer(layer, chunk, state, jnp.clip(length - start, 0, size))
        return jax.lax.dynamic_update_slice_in_dim(x, update(layer, chunk, mixed), start, axis=1), state

    return for_chunks(length, x.shape[1], body, (x, DeltaState.zeros(config, 1)))


def _layer(
    layer: LayerParams, config: ModelConfig, x: Rows, length: Int[Array, ""], key_rows: Rows | None = None
) -> LayerRows:
    """Runs an attention layer on the first `length` rows of a prompt, chunk by chunk; returns x, keys and values."""
    most = None if fused_kernel(x.dtype, config.attention) else PLAIN_CHUNK_ROWS
    size = chunk_rows(x.shape[1], most)
    window = attention_window(config)

    def body(start: Int[Array, ""], carry: LayerRows) -> LayerRows:
        x, *cached = carry
        chunk = jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
        rope = rope_table(start + jnp.arange(size, dtype=jnp.int32), config.head_dim, config.longest_wavelength)
        keyed = None if key_rows is None else jax.lax.dynamic_slice_in_dim(key_rows, start, size, axis=1)
        query, *new = project(layer, chunk, rope, key_rows=keyed)
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(rows, part, start, axis=1) for rows, part in zip(cached, new)
        )
        attended = attend_chunk(query, keys, values, start, window, config.attention_scale, config.attention)
        x = jax.lax.dynamic_update_slice_in_dim(x, update(layer, chunk, attended), start, axis=1)
        return x, keys, values

    empty = jnp.zeros((1, x.shape[1], *layer.out_kernel.shape[:2]), x.dtype)  # heads padded like the parameters
    return for_chunks(length, x.shape[1], body, (x, empty, empty), most)
