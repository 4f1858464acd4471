"""TLinFormer and TConstFormer: one generation window through all blocks, and all windows of a sequence.

Given the embeddings, windows are independent of each other, so a loop over windows carries no state. The embeddings and
their projections by block 0's `compress` layer are computed once for all windows; both C and x are slices of them. With
`causal_history` so are the histories of later blocks, and the output of block 0's `compress`.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.block import BlockParams, dual_window_block
from tlinformer_jax.models.causal_history import compressed, with_later
from tlinformer_jax.models.feed_forward import split_router_losses
from tlinformer_jax.models.history import History
from tlinformer_jax.models.layers import Dropout, Embedded, part_of
from tlinformer_jax.models.paired import PairedHistory
from tlinformer_jax.models.recompute import map_steps
from tlinformer_jax.models.rope import Rope, rope_table
from tlinformer_jax.models.streams import Stream, place_window
from tlinformer_jax.models.windows import (
    FIRST_WINDOW,
    PairedSegment,
    PerWindow,
    Segment,
    WindowFrame,
    joined,
    num_windows,
    pad_rows,
    padded_length,
    plan_segments,
    slice_rows,
    window_rows,
)
from tlinformer_jax.parallel.sharding import WHOLE, SequenceSplit

# Parts of a sequence's dropout for `causal_history.compressed` and `with_later`; smaller numbers are windows.
FIRST_LAYER, LATER_HISTORIES = (1 << 31) - 2, (1 << 31) - 1

# A sequence's rotations of positions 0, 1, ...; its dropout, None outside training; and the documents of all its rows,
# the same on every device, None if it is a single document.
Constants = tuple[Rope, Dropout | None, Array | None]


def window_states(
    blocks: Sequence[BlockParams],
    config: ModelConfig,
    C: History,
    x: Stream,
    frame: WindowFrame,
    dropout: Dropout | None = None,
) -> Float[Array, "batch rows D"]:
    """Runs a generation window, or g windows together, through all blocks; the final LayerNorm is not applied.

    Args:
      blocks: parameters, from `prepare_layers`.
      C: embeddings from position 0 on, projected by block 0's `compress` layer, or `compressed` by it.
      x: rows of the windows, the same way; [batch * g, m, D] for g windows.
      frame: positions of the windows.
      dropout: None outside training.
    """
    assert C.rope is not None
    window, history = place_window(frame, C.rope, x.rows.shape[1]), C
    for index, block in enumerate(blocks):
        later = blocks[index + 1 :]
        restored, rows = dual_window_block(block, config, history, x, window, later, part_of(dropout, index))
        if restored is not None:
            history, x = restored, Stream.of(later[0].compress, rows, window.x_rope)
    return rows


@dataclasses.dataclass(frozen=True)
class PreparedSequence:
    """Values that are computed once for all windows of a sequence.

    Attributes:
      history: the padded embeddings, projected by block 0's `compress` layer, or `compressed` by it.
      constants: values that windows read and that get no gradient.
      count: number of windows; the last may reach past the sequence's end.
      segments: the windows to compute, in loops of equal shapes.
    """

    history: History
    constants: Constants
    count: int
    segments: tuple[Segment, ...]

    @property
    def own(self) -> Stream:
        """All rows, with their projections unless they are `compressed`, to be sliced into the windows' x."""
        return Stream(self.history.rows, self.history.Q, self.history.K, self.history.V)

    def windows(self, config: ModelConfig, segment: Segment) -> Stream | None:
        """Returns the rows of a segment's windows, each with the rows that overlap before it, by `window_rows`.

        None if rows are split over devices, which then gather one window at a time.
        """
        return segment.rows(config, self.own, segment.overlap(config)) if self.history.split is None else None

    def every_window(self, config: ModelConfig) -> Stream | None:
        """Returns the rows of all windows of the sequence; each, also the first, has `window_overlap` rows before it.

        None as for `windows`.
        """
        if self.history.split is not None:
            return None
        rows = functools.partial(window_rows, config, first=0, count=self.count, overlap=config.window_overlap)
        return jax.tree.map(rows, self.own)

    def reach(self, config: ModelConfig, segment: Segment) -> History:
        """Returns the rows of the history that the segment reads, so that only their gradients are summed."""
        rows, split = segment.history_rows, self.history.split
        if split is not None:
            rows = -(-max(rows, (segment.first + segment.count) * config.generation_window) // split.parts)
        return jax.tree.map(lambda array: array[:, :rows], self.history)


def prepare_sequence(
    blocks: Sequence[BlockParams],
    config: ModelConfig,
    embeddings: Embedded,
    length: int,
    plan: ExecutionPlan,
    dropout: Dropout | None = None,
    split: SequenceSplit = WHOLE,
    first: int = 0,
    every: bool = True,
) -> PreparedSequence:
    """Prepares a sequence of `length` tokens for its windows from index `first` on.

    Without `every` only some of these windows will be computed, so block 0's `compress` runs in each of them.
    If rows are split over devices, `embeddings` contains only this device's rows; `length` counts all rows.
    """
    count, parts, rows = num_windows(config, length), split.row_parts, split.rows
    segments = plan_segments(config, count, plan, split, first)
    padded = padded_length(config, count, segments, parts)
    missing, documents = padded // parts - embeddings.rows.shape[1], embeddings.documents
    embeddings = dataclasses.replace(embeddings, documents=None)
    embeddings = jax.tree.map(lambda rows: pad_rows(rows, missing), embeddings)
    if documents is not None:
        documents = pad_rows(documents, padded - length)
    rope = rope_table(jnp.arange(padded, dtype=jnp.int32), config.head_dim, config.longest_wavelength)
    rows_rope = jax.tree.map(lambda table: rows.take(table, axis=0), rope) if rows else rope
    history = History.of(blocks[0].compress, embeddings.rows, rows_rope, key_rows=embeddings.key_rows)
    history = dataclasses.replace(history, split=rows, key_sums=embeddings.key_sums)
    if config.causal_history:
        history = with_later(blocks, config, history, rope, part_of(dropout, LATER_HISTORIES), documents)
        later = [dataclasses.replace(each, rows=None, Q=None) for each in history.later]  # windows read only their keys
        history = dataclasses.replace(history, later=tuple(later))
        if every and not first and split == WHOLE:
            history = compressed(blocks[0].compress, config, history, part_of(dropout, FIRST_LAYER), documents)
    if not first and not (segments and segments[0].first == 0):
        segments = (FIRST_WINDOW, *segments)
    return PreparedSequence(history, (rope, dropout, documents), count, segments)


def place_in_segment(
    config: ModelConfig, segment: Segment, history: History, constants: Constants, windows: PerWindow
) -> tuple[History, WindowFrame, Dropout | None]:
    """Returns C, frame and dropout for `window_states`, given the index of a window, or of g windows, int32 [g]."""
    rope, dropout, documents = constants
    frame, own = segment.frame(config, windows), None
    rows = segment.history_rows // (history.split.parts if history.split else 1)
    if documents is not None:
        size, batch = segment.overlap(config) + config.generation_window, len(documents) * segment.together
        z_documents = slice_rows(documents, frame.observed_start, frame.observed_width, batch)
        x_documents = slice_rows(documents, frame.history_length, size, batch)
        frame = dataclasses.replace(frame, z_documents=z_documents, x_documents=x_documents)
        own = (history.split.take(documents) if history.split else documents)[:, :rows]
    C = jax.tree.map(lambda array: array[:, :rows], history)
    fields: dict[str, Any] = {"length": frame.history_length, "never_empty": True, "documents": own, "rope": rope}
    if isinstance(segment, PairedSegment):
        size = config.generation_window
        fields |= {"never_empty": segment.first > 0, "size": size, "longest_second": rows // size // 2 * size}
        C = PairedHistory(C.rows, C.Q, C.K, C.V, key_sums=C.key_sums, **fields)
    else:
        later = tuple(dataclasses.replace(each, **fields) for each in C.later)
        C = dataclasses.replace(C, chunk=segment.history_chunk, later=later, **fields)
    return C, frame, part_of(dropout, windows if segment.together == 1 else windows[0])


def forward_windows(
    blocks: tuple[BlockParams, ...],
    config: ModelConfig,
    embeddings: Embedded,
    dropout: Dropout | None = None,
    first: int = 0,
) -> Float[Array, "batch rest D"]:
    """Returns hidden states from window `first` on, computed window by window, before the final LayerNorm."""
    batch, length, width = embeddings.rows.shape
    size = config.generation_window
    plan = dataclasses.replace(config.plan(num_windows(config, length) - first), paired=False)
    sequence = prepare_sequence(blocks, config, embeddings, length, plan, dropout, first=first)
    outputs = []
    for segment in sequence.segments:
        overlap = segment.overlap(config)
        own, groups = segment.rows(config, sequence.own, overlap), segment.count // segment.together
        counted = split_router_losses(blocks, (sequence.count - first) / segment.together)
        shared, constants = (counted, sequence.reach(config, segment)), sequence.constants
        step: Any = functools.partial(_step, config, segment)
        if plan.checkpointing:
            states = map_steps(step, shared, own, constants, groups)
        elif groups == 1:
            states = step(shared, constants, (jax.tree.map(lambda array: array[0], own), 0))[None]
        else:
            states = jax.lax.map(functools.partial(step, shared, constants), (own, jnp.arange(groups)))
        outputs.append(joined(states[:, :, overlap:].reshape(groups, batch, -1, width)))
    return jnp.concatenate(outputs, axis=1)[:, : length - first * size]


def _step(config: ModelConfig, segment: Segment, shared: Any, constants: Constants, item: tuple[Stream, Any]) -> Array:
    """Runs the windows of group `number` of a segment; x has their rows, [batch * together, overlap + W_og, ...]."""
    (blocks, history), (x, number) = shared, item
    windows: PerWindow = segment.first + number * segment.together
    if segment.together > 1:
        windows = windows + np.arange(segment.together, dtype=np.int32)
    C, frame, dropout = place_in_segment(config, segment, history, constants, windows)
    return window_states(blocks, config, C, x, frame, dropout)
