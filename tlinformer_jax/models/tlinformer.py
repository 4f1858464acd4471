"""TLinFormer and TConstFormer: a window with or without history, and all windows of a sequence, teacher-forced.

Windows are independent of each other given the embeddings, so the loop over them carries nothing. What never changes
from window to window is computed once outside: the embeddings, and block 0's `compress` projections, which serve as
history and as generation window alike.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import FEW_WINDOWS, ModelConfig
from tlinformer_jax.models.block import causal_layers, dual_window_block
from tlinformer_jax.models.dropout import Dropout
from tlinformer_jax.models.recompute import Branch, map_recomputed, recomputed
from tlinformer_jax.models.rope import Rope, rope_table
from tlinformer_jax.models.selection import choose_rows
from tlinformer_jax.models.streams import BlockParams, Following, History, Projected
from tlinformer_jax.models.windows import (
    Place,
    Segment,
    WindowFrame,
    num_windows,
    padded_length,
    plan_segments,
    window_rows,
)
from tlinformer_jax.parallel.sequence_split import WHOLE, SequenceSplit

# Looks at a block's entrance: (index of the block, x under its compress layer, the history, where the window stands).
Probe = Callable[[int, Projected, History, WindowFrame], None]
# Without history, every layer of it is an ordinary causal one.
FIRST_WINDOW = Segment(first=0, observed=(0,), observed_width=0, history_rows=0)


@flax.struct.dataclass
class Shared:
    """What every window reads and gradients flow to.

    Attributes:
      blocks: parameters, from `prepare_layers`.
      history: the embeddings of the sequence, with their projections under block 0's `compress` layer; None for the
        first window, which has no history.
      readout: what the readout reads.
    """

    blocks: tuple[BlockParams, ...]
    history: History | None
    readout: Any = None


@flax.struct.dataclass
class Fixed:
    """What every window reads and no gradient flows to: rotations of positions 0, 1, ..., and the dropout."""

    rope: Rope
    dropout: Dropout | None

    def window_dropout(self, window: Place) -> Dropout | None:
        """The dropout of one window, whatever the loop it is in; or of the first window of a group, for the group."""
        return None if self.dropout is None else self.dropout.fold_in(window)


@flax.struct.dataclass
class Sequence:
    """A sequence, prepared for its windows.

    Attributes:
      shared: what windows read.
      fixed: what needs no gradient.
      count: number of windows, the last may reach past the sequence's end.
      segments: of the windows with history that are wanted.
    """

    shared: Shared
    fixed: Fixed
    count: int = flax.struct.field(pytree_node=False)
    segments: tuple[Segment, ...] = flax.struct.field(pytree_node=False)

    def own(self, config: ModelConfig, run: Segment) -> History | None:
        """Embeddings and projections of the windows' own rows, by `window_rows`; None where devices share them, who
        look them up window by window."""
        history = self.shared.history
        if history is None or history.split is not None:
            return None
        return jax.tree.map(lambda rows: window_rows(config, rows, run.first, run.count, run.together), history)

    def reach(self, config: ModelConfig, run: Segment) -> Shared:
        """What the windows share, with no more of the history than they read."""
        # So the gradients of the other rows need no sum.
        rows, history = run.history_rows, self.shared.history
        if history is not None and history.split is not None:
            last = (run.first + run.count) * config.generation_window
            rows = -(-max(rows, last) // history.split.parts)
        history = jax.tree.map(lambda array: array[:, :rows], history) if rows else None
        return Shared(self.shared.blocks, history, self.shared.readout)


def forward_windows(
    blocks: tuple[BlockParams, ...],
    config: ModelConfig,
    embeddings: jax.Array,
    dropout: Dropout | None = None,
    first: int = 0,
) -> jax.Array:
    """Hidden states of a whole sequence, window by window.

    Args:
      blocks: parameters, from `prepare_layers`.
      config: of the model.
      embeddings: [batch, length, D] in the compute dtype.
      dropout: None outside training; each window draws masks of its own.
      first: the first window that is wanted.

    Returns:
      [batch, length - first * W_og, D], before the final LayerNorm.
    """
    batch, length, width = embeddings.shape
    size = config.generation_window
    sequence = prepare(blocks, config, embeddings, length, dropout, first=first)
    remat = rematerialised(config, sequence.count - first)
    outputs = []
    if first == 0:
        own = jax.tree.map(lambda rows: rows[0], sequence.own(config, FIRST_WINDOW))
        shared, window = sequence.reach(config, FIRST_WINDOW), window_branch(config, FIRST_WINDOW)
        outputs.append(_run_once(config, window, shared, own, sequence.fixed, 0, remat))
    for segment in sequence.segments:
        shared, window = sequence.reach(config, segment), window_branch(config, segment)
        own = sequence.own(config, segment)
        if segment.count == segment.together:
            own = jax.tree.map(lambda rows: rows[0], own)
            states = _run_once(config, window, shared, own, sequence.fixed, segment.windows[0], remat)[None]
        elif remat and not config.remat_save:
            states = map_recomputed(window, shared, own, sequence.fixed, jnp.asarray(segment.windows))
        else:
            step = recomputed(window, config, in_loop=True) if remat else window
            states = jax.lax.map(
                lambda item, step=step, shared=shared: step(shared, item[0], sequence.fixed, item[1]),
                (own, jnp.asarray(segment.windows)),
            )
        states = states.reshape(-1, batch, segment.together * size, width)
        outputs.append(jnp.moveaxis(states, 0, 1).reshape(batch, -1, width))
    return jnp.concatenate(outputs, axis=1)[:, : length - first * size]


def rematerialised(config: ModelConfig, windows: int) -> bool:
    """Whether of a sequence of so many windows nothing is kept from one window to another for the backward pass."""
    return config.remat == "window" or (config.remat == "auto" and windows > FEW_WINDOWS)


def later_window(
    blocks: tuple[BlockParams, ...],
    config: ModelConfig,
    own: History,
    history: History,
    frame: WindowFrame,
    rope: Rope,
    dropout: Dropout | None,
    probe: Probe | None = None,
) -> jax.Array:
    """A window with history, or g windows that run together, through all blocks.

    Args:
      blocks: parameters.
      config: of the model.
      own: embeddings of the window [batch, m, D], of g windows [batch * g, m, D], and their projections under block
        0's `compress` layer.
      history: embeddings from position 0 with their projections under the same layer, [batch, rows, ...].
      frame: where the window stands.
      rope: rotations of positions 0, 1, ...
      dropout: None outside training.
      probe: is shown what enters each block.

    Returns:
      the shape of the window's embeddings.
    """
    x, projected = own.rows, own.projected
    assert projected.query is not None
    frame = choose_rows(config, frame, projected.query, history.projected.key)
    for index, block in enumerate(blocks):
        if index:
            projected = Projected.of(block.compress, x, rope.rows(frame.history_length, x.shape[1]))
        if probe is not None:
            probe(index, projected, history, frame)
        following = None
        if index + 1 < len(blocks):
            following = Following(blocks[index + 1].compress, "qkv" if index + 2 < len(blocks) else "kv")
        part = None if dropout is None else dropout.fold_in(index)
        x, restored = dual_window_block(block, config, x, projected, history, frame, rope, following, part)
        history = history if restored is None else restored
    return x


def prepare(
    blocks: tuple[BlockParams, ...],
    config: ModelConfig,
    embeddings: jax.Array,
    length: int,
    dropout: Dropout | None,
    readout: Any = None,
    together: int | None = None,
    split: SequenceSplit = WHOLE,
    first: int = 0,
) -> Sequence:
    """What is computed once for all windows.

    Args:
      blocks: parameters.
      config: of the model.
      embeddings: of a sequence, [batch, length, D]; where rows are split, of this device's.
      length: of the sequence.
      dropout: None outside training.
      readout: what the readout reads, if there is one.
      together: as `plan_segments` takes it.
      split: how the sequence is split over devices.
      first: the first window that is wanted.
    """
    count, parts, rows = num_windows(config, length), split.row_parts, split.rows
    segments = plan_segments(config, count, together, split, first)
    padded = padded_length(config, count, segments, parts)
    embeddings = jnp.pad(embeddings, ((0, 0), (0, padded // parts - embeddings.shape[1]), (0, 0)))
    rope = rope_table(jnp.arange(padded, dtype=jnp.int32), config.head_dim)
    rows_rope = jax.tree.map(lambda table: rows.take(table, axis=0), rope) if rows else rope
    history = History(embeddings, Projected.of(blocks[0].compress, embeddings, rows_rope), rows)
    return Sequence(Shared(blocks, history, readout), Fixed(rope, dropout), count, segments)


def _run_once(
    config: ModelConfig, window: Branch, shared: Shared, own: History, fixed: Fixed, which: Any, remat: bool
) -> jax.Array:
    """One step outside a loop."""

    def step(shared: Shared, own: History, fixed: Fixed) -> jax.Array:
        return window(shared, own, fixed, which)

    return (recomputed(step, config) if remat else step)(shared, own, fixed)


def window_branch(config: ModelConfig, run: Segment) -> Branch:
    """One step of the loop over a segment's windows: a window, or as many as run together; or the first window."""

    def first(shared: Shared, own: History, fixed: Fixed, which: Place) -> jax.Array:
        layers = [layer for block in shared.blocks for layer in block.layers()]
        rope = fixed.rope.rows(0, config.generation_window)
        return causal_layers(layers, config, own.rows, rope, fixed.window_dropout(0))

    def later(shared: Shared, own: History, fixed: Fixed, windows: Place) -> jax.Array:
        assert shared.history is not None
        rows = run.history_rows // (shared.history.split.parts if shared.history.split else 1)
        history = jax.tree.map(lambda array: array[:, :rows], shared.history)
        dropout = fixed.window_dropout(windows if run.together == 1 else windows[0])
        frame = run.frame(config, windows)
        return later_window(shared.blocks, config, own, history, frame, fixed.rope, dropout)

    return later if run.history_rows else first
