"""TLinFormer and TConstFormer with a cache: `prefill` and `slide`; a hit is `decoder.step`.

Until the generation window slides, C and z are constant: a token reads the cached keys of each block's history, of the
compressed context, and of its own window. A slide turns the window into history: its rows are appended to block 0's
history, which contains projections of embeddings; the histories of other blocks and the compressed context are rebuilt,
in chunks of rows. With `model.causal_history` the window is appended to the histories of all blocks
(`decoding.causal`), and only the compressed context is rebuilt. `prefill` builds all of it from the prompt. With
`model.window_overlap` the last o rows of the window do not become history yet: the slide runs them again, as the first
rows of the next window.

Both functions work on one sequence of the batch, because sequences have different lengths and slide at different times.

If the cache is split over devices (`WindowedCache.split`), each device computes and reads its own rows of the history,
and the softmaxes over them are merged. All devices do the same computations on everything else.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import WindowedCache
from tlinformer_jax.decoding.causal import extend_histories, fill_histories
from tlinformer_jax.decoding.history import SequenceRows, embedded_history
from tlinformer_jax.decoding.params import DecoderParams, embed, logits_of
from tlinformer_jax.kernels.key_value import KeyValue
from tlinformer_jax.models.block import equations
from tlinformer_jax.models.cached_attention import write_plainly, write_rows
from tlinformer_jax.models.rope import rope_table
from tlinformer_jax.models.streams import Stream, project_both


def prefill(
    params: DecoderParams,
    config: ModelConfig,
    cache: WindowedCache,
    row: Int[Array, ""],
    prompt: Int[Array, " ids"],
    length: Int[Array, ""],
    observed: Int[Array, ""],
) -> tuple[WindowedCache, Float[Array, " V"]]:
    """Fills the cache of sequence `row` from its prompt; returns the cache and the next token's logits.

    Args:
      prompt: the prompt, followed by arbitrary padding.
      length: tokens of the prompt, >= 1.
      observed: rows of the compressed context, `config.observed_rows` of the history.
    """
    size, overlap = config.generation_window, config.window_overlap
    history = (length - 1) // size * size
    if overlap:
        history = jnp.maximum(history - overlap, 0)
    cache = dataclasses.replace(cache, tokens=jax.lax.dynamic_update_slice(cache.tokens, prompt[None], (row, 0)))
    window_tokens = jax.lax.dynamic_slice(prompt, (history,), (overlap + size,))
    cache, x = _rebuild(params, config, cache, row, history, observed, window_tokens)
    last = jax.lax.dynamic_index_in_dim(x[0], length - history - 1, keepdims=False)
    cache = dataclasses.replace(cache, window_length=cache.window_length.at[row].set(length - history))
    return cache, logits_of(params, last)


def slide(
    params: DecoderParams,
    config: ModelConfig,
    cache: WindowedCache,
    row: Int[Array, ""],
    observed: Int[Array, ""],
) -> WindowedCache:
    """Turns the full window of sequence `row`, except its last `config.window_overlap` rows, into history.

    The cache must have room. `observed` is `config.observed_rows` of the new history.
    """
    size, overlap = config.generation_window, config.window_overlap
    split, before = cache.split, cache.history_length[row]
    length = before + size
    if overlap:
        length = jnp.where(before > 0, length, size - overlap)
    if cache.history:
        # The first slide appends only W_og - o rows. It also writes the o rows after them, which are not valid yet; the
        # next slide writes these again.
        start, count = before, min(size, cache.capacity)
        if split is not None:
            # Every device must write the same number of rows. A device with one row less to append writes its last old
            # row again, or one row that is not valid yet, which the next slide writes again.
            count = -(-count // split.parts)
            start = jnp.minimum(split.count(before), cache.room - count)
        at = SequenceRows(params, config, cache, row, length)
        new, layer = at.embed(start, count), params.blocks[0].compress
        keys, backend, rotations = cache.history[0], config.attention, at.rotations(start, count)
        first = write_rows(keys, row, start, layer, new.rows, rotations, backend, new.key_rows)
        histories = (first, *cache.history[1:])
        if config.causal_history:
            histories = extend_histories(at, histories, before // size)
        cache = dataclasses.replace(cache, history=histories)
    window = jnp.zeros((0,), jnp.int32)
    if overlap:
        window = jax.lax.dynamic_slice(cache.tokens, (row, length), (1, overlap))[0]
    cache, _ = _rebuild(params, config, cache, row, length, observed, window)
    return dataclasses.replace(cache, window_length=cache.window_length.at[row].set(overlap))


def _rebuild(
    params: DecoderParams,
    config: ModelConfig,
    cache: WindowedCache,
    row: Int[Array, ""],
    length: Int[Array, ""],
    observed: Int[Array, ""],
    window_tokens: Int[Array, " m"],
) -> tuple[WindowedCache, Float[Array, "1 m D"]]:
    """Runs the blocks on sequence `row` and writes its keys and values to the cache; returns the cache and x.

    Args:
      length: n, rows of history.
      observed: n - h, rows of the observation window.
      window_tokens: tokens of the generation window; in a slide only those that overlap the window before. In a slide
        the cache already contains block 0's history.
    """
    start, m = length - observed, window_tokens.size
    fill = m > config.window_overlap  # not in a slide
    width = max(config.observed_rows(cache.capacity), 1)
    z_rope, x_rope = (
        rope_table(first + jnp.arange(rows, dtype=jnp.int32), config.head_dim, config.longest_wavelength)
        for first, rows in ((start, width), (length, m))
    )
    both_rope = jax.tree.map(lambda *tables: jnp.concatenate(tables), z_rope, x_rope)
    x_before = cache.tokens_before(row, length + jnp.arange(m, dtype=jnp.int32))[None] if config.token_shift else None
    compress, hidden, restore, (first_parts, last_parts) = equations(config)
    at = SequenceRows(params, config, cache, row, length)
    C = embedded_history(at, at.observed(start, observed, z_rope, first_parts), z_rope, start, fill)
    if fill and config.causal_history:
        C = dataclasses.replace(C, keys=fill_histories(at, (*C.filled, *C.keys))[1:])
    embedded, context, window = embed(params, window_tokens[None], x_before), [], []
    x_rows, key_rows = embedded.rows, embedded.key_rows
    for index, block in enumerate(params.blocks):
        x = Stream.of(block.compress, x_rows, x_rope, key_rows=key_rows)
        key_rows = None  # only the first layer has key rows
        window.append((x.K, x.V))
        if config.causal_history:
            context.append((C.z.K, C.z.V))
        z_rows, x_rows = compress(block.compress, config, C, C.z, x)
        for layer in block.hidden:
            z, x = project_both(layer, z_rows, x_rows, both_rope, observed)
            context.append((z.K, z.V))
            window.append((x.K, x.V))
            z_rows, x_rows = hidden(layer, config, z, x)
        z = Stream.of(block.restore, z_rows, z_rope, last_parts, observed)
        x = Stream.of(block.restore, x_rows, x_rope)
        context.append((z.K, z.V))
        window.append((x.K, x.V))
        restored, x_rows = restore(block.restore, config, C, z, x, params.blocks[index + 1 :])
        C = C if restored is None else restored
    cache = _store(cache, row, context, window, observed)
    cache = dataclasses.replace(
        cache,
        history=C.filled,
        history_length=cache.history_length.at[row].set(length),
        observed_length=cache.observed_length.at[row].set(observed),
    )
    return cache, x_rows


def _store(
    cache: WindowedCache,
    row: Int[Array, ""],
    context: list[tuple[Array, Array]],
    window: list[tuple[Array, Array]],
    observed: Int[Array, ""],
) -> WindowedCache:
    """Writes a sequence's keys and values of z and of x, [1, rows, heads, d_h or more] for each layer."""

    def written(cache: KeyValue, layers: list[tuple[Array, Array]], start: Array | int = 0) -> KeyValue:
        return write_plainly(cache, [jnp.stack(arrays) for arrays in zip(*layers)], (0, row), start)

    has_rows = window[0][0].shape[1] > 0
    if cache.context is None:  # x follows the valid rows of z
        z = written(cache.window, context)
        return dataclasses.replace(cache, window=written(z, window, observed) if has_rows else z)
    own = written(cache.window, window) if has_rows else cache.window
    return dataclasses.replace(cache, context=written(cache.context, context), window=own)
