"""TLinFormer and TConstFormer: all generation windows of a sequence, teacher-forced, or a sample of them.

Windows are independent of each other given the embeddings, so the loop over them carries nothing. What never changes
from window to window is computed once outside: the embeddings, and block 0's `compress` projections, which serve as
history and as generation window alike.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from tlinformer_jax.models.block import (
    BlockParams,
    Following,
    History,
    Projected,
    causal_layers,
    dual_window_block,
)
from tlinformer_jax.models.config import FEW_WINDOWS, ModelConfig
from tlinformer_jax.models.dropout import Dropout
from tlinformer_jax.models.recompute import Branch, map_recomputed, recomputed, sum_with_gradients
from tlinformer_jax.models.rope import Rope, rope_table
from tlinformer_jax.models.selection import choose_rows
from tlinformer_jax.models.windows import (
    Place,
    Segment,
    WindowFrame,
    num_windows,
    padded_length,
    plan_segments,
    window_rows,
)

# What becomes of a window: (what it reads besides, hidden states [batch, W_og, D], the window's rows of what goes along
# with the sequence) -> float32 []. It must not close over traced values.
Readout = Callable[[Any, jax.Array, Any], jax.Array]
# Looks at a block's entrance: (index of the block, x under its compress layer, the history, where the window stands).
Probe = Callable[[int, Projected, History, WindowFrame], None]


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
      segments: of the windows with history.
    """

    shared: Shared
    fixed: Fixed
    count: int = flax.struct.field(pytree_node=False)
    segments: tuple[Segment, ...] = flax.struct.field(pytree_node=False)

    def own(self, config: ModelConfig, first: int, count: int, together: int = 1) -> History:
        """Embeddings and projections of windows' own rows, by `window_rows`."""
        return jax.tree.map(lambda rows: window_rows(config, rows, first, count, together), self.shared.history)

    def reach(self, rows: int) -> Shared:
        """What windows share that read the first `rows` of the history; 0 for none."""
        # Rows that no window of a segment reads are left out, so that their gradients need no sum.
        history = jax.tree.map(lambda array: array[:, :rows], self.shared.history) if rows else None
        return Shared(self.shared.blocks, history, self.shared.readout)


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
    size = config.generation_window
    sequence = _prepare(blocks, config, embeddings, dropout)
    remat = rematerialised(config, sequence.count)
    first = jax.tree.map(lambda rows: rows[0], sequence.own(config, 0, 1))
    outputs = [_run_once(config, _first_window(config), sequence.reach(0), first, sequence.fixed, 0, remat)]
    for segment in sequence.segments:
        shared, window = sequence.reach(segment.history_rows), _later_window(config, segment)
        own = sequence.own(config, segment.first, segment.count, segment.together)
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
    return jnp.concatenate(outputs, axis=1)[:, :length]


def sum_windows(
    blocks: tuple[BlockParams, ...],
    config: ModelConfig,
    embeddings: jax.Array,
    readout: Readout,
    readout_shared: Any,
    rows: Any,
    dropout: Dropout | None = None,
    windows: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The sum of `readout` over the windows of a sequence, or over some of them; gradients are made along with it.

    A window's forward and backward pass follow one another, so that of no window anything is kept but its gradient,
    and nothing is computed twice.

    Args:
      blocks: parameters, from `prepare_layers`.
      config: of the model.
      embeddings: [batch, length, D] in the compute dtype.
      readout: what is summed.
      readout_shared: pytree of floating arrays that every readout reads; differentiated.
      rows: pytree of arrays [batch, length, ...] that go along with the sequence, zeros past its end; not
        differentiated.
      dropout: None outside training; each window draws masks of its own.
      windows: indices of the windows that are wanted, int32 [k]; None for all. Their number does not change the size
        of the program.

    Returns:
      float32 []; and each window's share of it, float32 [windows or k], through which no gradient flows (of windows
      that run together, each group's).
    """
    together = None if windows is None else 1
    sequence = _prepare(blocks, config, embeddings, dropout, readout_shared, together)
    padding = sequence.count * config.generation_window - embeddings.shape[1]
    rows = jax.tree.map(lambda array: jnp.pad(array, ((0, 0), (0, padding), *((0, 0),) * (array.ndim - 2))), rows)

    def taken(first: int, count: int, together: int) -> Any:
        return jax.tree.map(lambda array: window_rows(config, array, first, count, together), rows)

    def read(window: Branch) -> Branch:
        def branch(shared: Shared, own: History, fixed: Fixed, step: tuple[Place, Any]) -> jax.Array:
            return readout(shared.readout, window(shared, own, fixed, step[0]), step[1])

        return branch

    later = tuple(read(_later_window(config, segment)) for segment in sequence.segments)
    if windows is not None:
        # One loop runs through them; each takes the branch of the segment that it lies in.
        firsts = jnp.asarray([segment.first for segment in sequence.segments], jnp.int32)
        which = jnp.sum(windows[:, None] >= firsts, axis=1, dtype=jnp.int32)
        own, some = jax.tree.map(
            lambda array: jnp.take(array, windows, axis=0),
            (sequence.own(config, 0, sequence.count), taken(0, sequence.count, 1)),
        )
        branches = (read(_first_window(config)), *later)
        return sum_with_gradients(branches, sequence.shared, own, sequence.fixed, (windows, some), which)
    first = (jnp.zeros(1, jnp.int32), taken(0, 1, 1))
    sums = [
        sum_with_gradients(
            (read(_first_window(config)),), sequence.reach(0), sequence.own(config, 0, 1), sequence.fixed, first
        )
    ]
    for segment, branch in zip(sequence.segments, later):
        place = segment.first, segment.count, segment.together
        steps = jnp.asarray(segment.windows), taken(*place)
        own = sequence.own(config, *place)
        sums.append(sum_with_gradients((branch,), sequence.reach(segment.history_rows), own, sequence.fixed, steps))
    totals, each = zip(*sums)
    return jnp.sum(jnp.stack(totals)), jnp.concatenate(each)


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


def _prepare(
    blocks: tuple[BlockParams, ...],
    config: ModelConfig,
    embeddings: jax.Array,
    dropout: Dropout | None,
    readout: Any = None,
    together: int | None = None,
) -> Sequence:
    """What is computed once for all windows; `together` as `plan_segments` takes it."""
    length = embeddings.shape[1]
    count = num_windows(config, length)
    segments = plan_segments(config, count, together)
    padded = padded_length(config, count, segments)
    embeddings = jnp.pad(embeddings, ((0, 0), (0, padded - length), (0, 0)))
    rope = rope_table(jnp.arange(padded, dtype=jnp.int32), config.head_dim)
    history = History(embeddings, Projected.of(blocks[0].compress, embeddings, rope))
    return Sequence(Shared(blocks, history, readout), Fixed(rope, dropout), count, segments)


def _run_once(
    config: ModelConfig, window: Branch, shared: Shared, own: History, fixed: Fixed, which: Any, remat: bool
) -> jax.Array:
    """One step outside a loop."""

    def step(shared: Shared, own: History, fixed: Fixed) -> jax.Array:
        return window(shared, own, fixed, which)

    return (recomputed(step, config) if remat else step)(shared, own, fixed)


def _first_window(config: ModelConfig) -> Branch:
    """The first window: it has no history, so every layer is an ordinary causal one."""

    def window(shared: Shared, own: History, fixed: Fixed, which: Place) -> jax.Array:
        layers = [layer for block in shared.blocks for layer in block.layers()]
        return causal_layers(
            layers, config, own.rows, fixed.rope.rows(0, config.generation_window), fixed.window_dropout(0)
        )

    return window


def _later_window(config: ModelConfig, segment: Segment) -> Branch:
    """A window of a segment, or as many as the segment's run together."""

    def window(shared: Shared, own: History, fixed: Fixed, windows: Place) -> jax.Array:
        assert shared.history is not None
        history = jax.tree.map(lambda array: array[:, : segment.history_rows], shared.history)
        frame = segment.frame(config, windows)
        alone = segment.together == 1
        dropout = fixed.window_dropout(windows if alone else windows[0])
        return later_window(shared.blocks, config, own, history, frame, fixed.rope, dropout)

    return window
