"""TLinFormer and TConstFormer with a cache: `prefill` and `slide` (a miss); a hit is `decoder.step`.

While the generation window does not slide, everything on the history side is constant: a token reads
each block's history keys, the compressed context's and its own window's. A slide makes the window
history: block 0's rows are appended, since they are projections of embeddings; everything else on the
history side is rebuilt, in chunks of rows. `prefill` builds the same from nothing. With
`model.window_overlap` the last o rows of the window do not become history yet: a slide runs them
again, as the first rows of the next window.

Both work on one sequence of the batch: sequences have lengths and window phases of their own.

Where the cache is split over devices (`WindowedCache.split`), each device makes and reads its own rows
of the history, and the softmaxes over them are merged; of all else every device computes the same.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import WindowedCache
from tlinformer_jax.decoding.history import SequenceRows, embedded_history
from tlinformer_jax.decoding.params import DecoderParams, embed, logits_of
from tlinformer_jax.kernels.key_value import KeyValue
from tlinformer_jax.models.block import compress, hidden, restore
from tlinformer_jax.models.cached_attention import for_writing, write_plainly, write_rows
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
    """Fills the cache of sequence `row` from its prompt; returns also the next token's logits.

    What follows the prompt's first `length` >= 1 tokens does not matter. `observed` is
    `config.observed_rows` of its history: rows of the compressed context.
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
    """Makes the full window of sequence `row` history, but for its last `config.window_overlap` rows.

    The cache must have room. `observed` is `config.observed_rows` of the grown history.
    """
    size, overlap = config.generation_window, config.window_overlap
    split, before = cache.split, cache.history_length[row]
    length = before + size
    if overlap:
        length = jnp.where(before > 0, length, size - overlap)
    if cache.history:
        # The first slide appends only W_og - o rows. The o rows after them are not valid yet: the next slide writes
        # them again.
        start, count = before, min(size, cache.capacity)
        if split is not None:
            # As many on every device. Some have one less to append: they write their last old row again,
            # or one more that is not yet valid, which the next slide writes again.
            count = -(-count // split.parts)
            start = jnp.minimum(split.count(before), cache.room - count)
        at = SequenceRows(config, cache, row, length)
        layer = for_writing(params.blocks[0].compress, count, config.attention)
        new, rope = at.embed(params, start, count), at.rope(start, count)
        first = write_rows(cache.history[0], row, start, layer, new.rows, rope, config.attention, new.key_rows)
        cache = dataclasses.replace(cache, history=(first, *cache.history[1:]))
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
    """Runs the blocks over sequence `row`, whose keys and values go to the cache; returns also x.

    Args:
      length: n, rows of history.
      observed: n - h, rows of the observation window.
      window_tokens: of the generation window; in a slide, where the cache has block 0's rows, none but those that
        overlap the window before.
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
    # z takes rows and queries of C, which a token shift leaves as they are.
    z_rows = embed(params, jax.lax.dynamic_slice(cache.tokens, (row, start), (1, width))).rows
    C = embedded_history(params, SequenceRows(config, cache, row, length), z_rows, z_rope, fill)
    embedded, context, window = embed(params, window_tokens[None], x_before), [], []
    x_rows, key_rows = embedded.rows, embedded.key_rows
    for index, block in enumerate(params.blocks):
        x = Stream.of(block.compress, x_rows, x_rope, key_rows=key_rows)
        key_rows = None  # of the first layer
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
        context=_store(cache.context, row, context),
        window=_store(cache.window, row, window) if m else cache.window,
        history_length=cache.history_length.at[row].set(length),
        observed_length=cache.observed_length.at[row].set(observed),
    )
    return cache, x_rows


def _store(cache: KeyValue, row: Int[Array, ""], layers: list[tuple[Array, Array]]) -> KeyValue:
    """Writes a sequence's keys and values [1, rows, heads, d_h or more] of every layer."""
    return write_plainly(cache, [jnp.stack(arrays) for arrays in zip(*layers)], (0, row))
