"""TLinFormer and TConstFormer: all generation windows of a sequence, teacher-forced, or a sample of them.

Windows are independent of each other given the embeddings, so the loop over them carries nothing. What never changes
from window to window is computed once outside: the embeddings, and block 0's `compress` projections, which serve as
history and as generation window alike.
"""

import flax.struct
import jax
import jax.numpy as jnp

from tlinformer_jax.models.attention import Dropout
from tlinformer_jax.models.block import (
    BlockParams,
    History,
    Projected,
    causal_layers,
    dual_window_block,
)
from tlinformer_jax.models.config import FEW_WINDOWS, ModelConfig
from tlinformer_jax.models.layers import project
from tlinformer_jax.models.recompute import Branch, map_recomputed, recomputed
from tlinformer_jax.models.rope import Rope, rope_table
from tlinformer_jax.models.windows import (
    Place,
    Segment,
    WindowFrame,
    num_windows,
    padded_length,
    plan_segments,
    slice_rows,
)


@flax.struct.dataclass
class Shared:
    """What every window reads and gradients flow to.

    Attributes:
      blocks: parameters, from `prepare_layers`.
      embeddings: of the sequence, [batch, rows, D].
      projected: of the embeddings under block 0's `compress` layer.
    """

    blocks: tuple[BlockParams, ...]
    embeddings: jax.Array
    projected: Projected

    def rows(self, length: int) -> "Shared":
        """The same with the first `length` positions of the sequence."""
        return Shared(self.blocks, self.embeddings[:, :length], self.projected.rows(0, length))


@flax.struct.dataclass
class Fixed:
    """What every window reads and no gradient flows to: rotations of positions 0, 1, ..., and the dropout."""

    rope: Rope
    dropout: Dropout | None

    def window_dropout(self, window: Place) -> Dropout | None:
        """The dropout of one window, whatever the loop that window is in."""
        return None if self.dropout is None else self.dropout.fold_in(window)


def forward_windows(
    blocks: tuple[BlockParams, ...],
    config: ModelConfig,
    embeddings: jax.Array,
    dropout: Dropout | None = None,
    windows: jax.Array | None = None,
) -> jax.Array:
    """Hidden states of a whole sequence, window by window, or of some of its windows.

    Args:
      blocks: parameters, from `prepare_layers`.
      config: of the model.
      embeddings: [batch, length, D] in the compute dtype.
      dropout: None outside training; each window draws masks of its own.
      windows: indices of the windows that are wanted, int32 [k]; None for all. Each is computed again in the
        backward pass; their number does not change the size of the program.

    Returns:
      [batch, length, D], or [batch, k * W_og, D] for the given windows, rows past the sequence's end included;
      before the final LayerNorm.
    """
    length = embeddings.shape[1]
    count = num_windows(config, length)
    segments = plan_segments(config, count, together=None if windows is None else 1)
    padded = padded_length(config, count, segments)
    embeddings = jnp.pad(embeddings, ((0, 0), (0, padded - length), (0, 0)))
    rope = rope_table(jnp.arange(padded, dtype=jnp.int32), config.head_dim)
    shared = Shared(blocks, embeddings, Projected(*project(blocks[0].compress, embeddings, rope)))
    fixed = Fixed(rope, dropout)
    if windows is not None:
        return _some_windows(config, segments, shared, fixed, windows)
    return _all_windows(config, segments, shared, fixed, rematerialised(config, count))[:, :length]


def rematerialised(config: ModelConfig, windows: int) -> bool:
    """Whether the windows of a sequence of so many are computed again in the backward pass."""
    return config.remat == "window" or (config.remat == "auto" and windows > FEW_WINDOWS)


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
    """A window with history, or g windows that run together, through all blocks.

    Args:
      blocks: parameters.
      config: of the model.
      x: embeddings of the window, [batch, m, D]; of g windows, [batch * g, m, D].
      projected: of x under block 0's `compress` layer.
      history: embeddings from position 0 with their projections under the same layer, [batch, rows, ...].
      frame: where the window stands.
      rope: rotations of positions 0, 1, ...
      dropout: None outside training.

    Returns:
      the shape of x.
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


def _all_windows(
    config: ModelConfig, segments: tuple[Segment, ...], shared: Shared, fixed: Fixed, remat: bool
) -> jax.Array:
    """Hidden states of all windows side by side, [batch, windows * W_og, D]."""
    batch, _, width = shared.embeddings.shape
    size = config.generation_window
    outputs = [_run_once(config, _first_window(config), shared.rows(size), fixed, 0, remat)]
    for segment in segments:
        # Rows that no window of the segment reads are left out, so that their gradients need no sum.
        reach = max(segment.history_rows, (segment.first + segment.count) * size)
        reached, window = shared.rows(reach), _later_window(config, segment)
        if segment.count == segment.together:
            states = _run_once(config, window, reached, fixed, segment.windows[0], remat)[None]
        elif remat and not config.remat_save:
            states = map_recomputed((window,), reached, (), fixed, jnp.asarray(segment.windows))
        else:
            step = recomputed(window, config, in_loop=True) if remat else window
            states = jax.lax.map(
                lambda windows, step=step, reached=reached: step(reached, (), fixed, windows),
                jnp.asarray(segment.windows),
            )
        states = states.reshape(-1, batch, segment.together * size, width)
        outputs.append(jnp.moveaxis(states, 0, 1).reshape(batch, -1, width))
    return jnp.concatenate(outputs, axis=1)


def _some_windows(
    config: ModelConfig, segments: tuple[Segment, ...], shared: Shared, fixed: Fixed, windows: jax.Array
) -> jax.Array:
    """Hidden states of the given windows side by side, [batch, k * W_og, D].

    One loop runs through them; each takes the branch of the segment that it lies in, whose history is at most
    1 / history_segments of the sequence longer than its own.
    """
    batch, _, width = shared.embeddings.shape
    branches = (_first_window(config), *(_later_window(config, segment) for segment in segments))
    firsts = jnp.asarray([segment.first for segment in segments], jnp.int32)
    which = jnp.sum(windows[:, None] >= firsts, axis=1, dtype=jnp.int32)
    states = map_recomputed(branches, shared, (), fixed, windows, which)
    return jnp.moveaxis(states, 0, 1).reshape(batch, -1, width)


def _run_once(
    config: ModelConfig, window: Branch, shared: Shared, fixed: Fixed, which: Place, remat: bool
) -> jax.Array:
    """One step outside a loop."""

    def step(shared: Shared, fixed: Fixed) -> jax.Array:
        return window(shared, (), fixed, which)

    return (recomputed(step, config) if remat else step)(shared, fixed)


def _first_window(config: ModelConfig) -> Branch:
    """The first window: it has no history, so every layer is an ordinary causal one."""
    size = config.generation_window

    def window(shared: Shared, _: tuple[()], fixed: Fixed, which: jax.Array | int) -> jax.Array:
        layers = [layer for block in shared.blocks for layer in block.layers()]
        x, rope = shared.embeddings[:, :size], fixed.rope.rows(0, size)
        return causal_layers(layers, config, x, rope, fixed.window_dropout(0))

    return window


def _later_window(config: ModelConfig, segment: Segment) -> Branch:
    """A window of a segment, or as many as the segment's run together."""
    size = config.generation_window

    def window(shared: Shared, _: tuple[()], fixed: Fixed, windows: Place) -> jax.Array:
        frame = segment.frame(config, windows)
        start, folded = frame.history_length, shared.embeddings.shape[0] * segment.together
        return later_window(
            shared.blocks,
            config,
            slice_rows(shared.embeddings, start, size, folded),
            shared.projected.rows(start, size, folded),
            History(
                shared.embeddings[:, : segment.history_rows], shared.projected.rows(0, segment.history_rows, folded)
            ),
            frame,
            fixed.rope,
            fixed.window_dropout(windows if segment.together == 1 else windows[0]),
        )

    return window
