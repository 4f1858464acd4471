"""TLinFormer and TConstFormer: all generation windows of a sequence, teacher-forced.

Windows are independent of each other given the embeddings, so the scan over them carries only the context's
position. What never changes along the scan is computed once outside: the embeddings, and block 0's `compress`
projections, which serve as history and as generation window alike.
"""

import functools

import jax
import jax.numpy as jnp

from tlinformer_jax.models.attention import Dropout
from tlinformer_jax.models.block import (
    BlockParams,
    History,
    Projected,
    causal_layers,
    dual_window_block,
    slice_rows,
)
from tlinformer_jax.models.config import AUTO_REMAT_WINDOWS, ModelConfig
from tlinformer_jax.models.layers import project
from tlinformer_jax.models.rope import Rope, rope_table
from tlinformer_jax.models.windows import (
    ContextState,
    Segment,
    WindowFrame,
    num_windows,
    padded_length,
    plan_segments,
)


def forward_windows(
    blocks: tuple[BlockParams, ...], config: ModelConfig, embeddings: jax.Array, dropout: Dropout | None = None
) -> jax.Array:
    """Hidden states of a whole sequence, window by window.

    Args:
      blocks: parameters, from `prepare_layers`.
      config: of the model.
      embeddings: [batch, length, D] in the compute dtype.
      dropout: None outside training; each window draws masks of its own.

    Returns:
      [batch, length, D], before the final LayerNorm.
    """
    batch, length, width = embeddings.shape
    windows = num_windows(config, length)
    segments = plan_segments(config, windows)
    padded = padded_length(config, windows, segments)
    embeddings = jnp.pad(embeddings, ((0, 0), (0, padded - length), (0, 0)))
    rope = rope_table(jnp.arange(padded, dtype=jnp.int32), config.head_dim)
    projected = Projected(*project(blocks[0].compress, embeddings, rope))

    remat = rematerialised(config, windows)
    # Window 0 has no history, so every layer is an ordinary causal one.
    layers = [layer for block in blocks for layer in block.layers()]
    size = config.generation_window
    first = _remat(causal_layers, remat)
    outputs = [first(layers, config, embeddings[:, :size], rope.rows(0, size), _window_dropout(dropout, 0))]
    for segment in segments:
        history = History(embeddings[:, : segment.history_rows], projected.rows(0, segment.history_rows))
        states = _scan_segment(blocks, config, segment, embeddings, projected, history, rope, dropout, remat)
        outputs.append(jnp.moveaxis(states, 0, 1).reshape(batch, -1, width))
    return jnp.concatenate(outputs, axis=1)[:, :length]


def rematerialised(config: ModelConfig, windows: int) -> bool:
    """Whether the windows of a sequence of so many are computed again in the backward pass."""
    return config.remat == "window" or (config.remat == "auto" and windows > AUTO_REMAT_WINDOWS)


def later_window(
    blocks: tuple[BlockParams, ...],
    config: ModelConfig,
    x: jax.Array,
    projected: Projected,
    history: History,
    frame: WindowFrame,
    rope: Rope,
    dropout: Dropout | None,
) -> jax.Array:
    """A window with history, through all blocks.

    Args:
      blocks: parameters.
      config: of the model.
      x: embeddings of the window, [batch, m, D].
      projected: of x under block 0's `compress` layer.
      history: embeddings from position 0 with their projections under the same layer.
      frame: where the window stands.
      rope: rotations of positions 0, 1, ...
      dropout: None outside training.

    Returns:
      [batch, m, D].
    """
    known: Projected | None = projected
    for index, block in enumerate(blocks):
        x, rows = dual_window_block(
            block,
            config,
            x,
            history,
            frame,
            rope,
            projected=known,
            restore=index + 1 < len(blocks),
            dropout=None if dropout is None else dropout.fold_in(index),
        )
        known = None
        if rows is not None:
            history = History(rows)
    return x


def _scan_segment(
    blocks: tuple[BlockParams, ...],
    config: ModelConfig,
    segment: Segment,
    embeddings: jax.Array,
    projected: Projected,
    history: History,
    rope: Rope,
    dropout: Dropout | None,
    remat: bool,
) -> jax.Array:
    """Scans the windows of one segment; returns their hidden states [windows, batch, W_og, D]."""
    size = config.generation_window
    window = _remat(later_window, remat)

    def body(state: ContextState, observed: jax.Array) -> tuple[ContextState, jax.Array]:
        start = state.history_length
        hidden = window(
            blocks,
            config,
            slice_rows(embeddings, start, size),
            projected.rows(start, size),
            history,
            segment.frame(state, observed),
            rope,
            _window_dropout(dropout, state.window),
        )
        return state.next(size), hidden

    observed = jnp.asarray(segment.observed, jnp.int32)
    return jax.lax.scan(body, segment.initial_state(size), observed)[1]


def _window_dropout(dropout: Dropout | None, window: jax.Array | int) -> Dropout | None:
    """The dropout of one window, whatever the scan that window is in."""
    return None if dropout is None else dropout.fold_in(window)


def _remat(function, remat: bool):
    """`function(blocks, config, ...)`, recomputed in the backward pass if `remat`."""
    return functools.partial(jax.checkpoint, static_argnums=(1,), prevent_cse=False)(function) if remat else function
