"""A block whose history is computed like the generation window (`model.causal_history`); not in the paper.

In the paper's block (`models.block`) rows of z read each other in both directions, a row of x adds two softmaxes, and
`restore` starts again from C. Here the rows of z and x, side by side, are computed like the rows of a Transformer. y
are rows h .. n + m - 1:

    compress:  y  = update(y, attend_causal(Qy, [Kc; Ky], [Vc; Vy]))    Kc, Vc: rows before h, which every row reads
    hidden:    y' = update(y, attend_causal(Qy, Ky, Vy))
    restore:   y' = update(y, attend_causal(Qy, Ky, Vy))

There is one softmax over all keys of a row, and the next block continues y. What it reads before row h are the rows of

    C' = update(C, attend_window(Qc, Kc, Vc))    by the parameters of `compress`

where a row reads what it read in its own window: the rows of C from the beginning of that window's z up to its own. So
C' does not depend on the window that reads it. It is computed once, and a slide only appends to it.

In block 0 the rows before h are embeddings, as the rows of z are. So there a row of `compress` reads all rows up to its
own in whichever window, and `compress` of the whole sequence is one layer of a Transformer. Training and evaluation
without a cache run it once (`compressed`), unless windows are sampled or left out or devices split the sequence.

If z contains the whole history, this is a Transformer. Otherwise rows before h are read in `compress` only, as in the
paper.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.attention import OutputAndLse, attend, attend_with_lse, merge_parts
from tlinformer_jax.models.feed_forward import without_router_losses
from tlinformer_jax.models.history import History, ReadableHistory, keyed
from tlinformer_jax.models.layers import Dropout, LayerParams, part_of, project, update
from tlinformer_jax.models.recompute import map_steps
from tlinformer_jax.models.rope import Rope
from tlinformer_jax.models.streams import (
    CAUSAL_ATTENTION,
    CROSS_ATTENTION,
    FEED_FORWARD,
    OBSERVED_ATTENTION,
    SHARED_ATTENTION,
    Stream,
    XRows,
    ZRows,
    apart,
    attention_options,
    beside,
    documents_of,
    update_both,
)
from tlinformer_jax.models.windows import (
    FIRST_WINDOW,
    PerWindow,
    Segment,
    joined,
    num_windows,
    pad_rows,
    padded_length,
    plan_segments,
    slice_rows,
)

# Windows whose rows of C' are computed together.
WINDOWS_TOGETHER = 32


def compress(
    layer: LayerParams, config: ModelConfig, C: ReadableHistory, z: Stream, x: Stream, dropout: Dropout | None = None
) -> tuple[ZRows, XRows]:
    """Runs the first layer: rows of z and x read the rows of C before z, and z and x up to their own row.

    The argument z contains rows h .. n - 1 of C with their queries, keys and values.
    """
    before = C.read_before(beside(z.Q, x.Q), config, part_of(dropout, SHARED_ATTENTION), z, x)
    attended = merge_parts(_window_parts(config, z, x, dropout), before)[0].astype(x.Q.dtype)
    return update_both(layer, (z.rows, x.rows), apart(attended, z.Q.shape[1]), dropout)


def hidden(
    layer: LayerParams, config: ModelConfig, z: Stream, x: Stream, dropout: Dropout | None = None
) -> tuple[ZRows, XRows]:
    """Runs a layer between the first and the last: rows of z and x read z and x up to their own row."""
    attended = _attend_window(config, z, x, dropout)
    return update_both(layer, (z.rows, x.rows), apart(attended, z.Q.shape[1]), dropout)


def restore(
    layer: LayerParams,
    config: ModelConfig,
    C: ReadableHistory,
    z: Stream,
    x: Stream,
    later: Sequence[Any] = (),
    dropout: Dropout | None = None,
) -> tuple[Any, XRows]:
    """Runs the last layer: as `hidden`. The next block continues z'; C' is None if no `later` block reads it."""
    if not later:  # nobody reads z'
        _, x_attends = apart(_attend_window(config, z, x, dropout), z.Q.shape[1])
        return None, update(layer, x.rows, x_attends, part_of(dropout, FEED_FORWARD))
    z_rows, x_rows = hidden(layer, config, z, x, dropout)
    return C.continued(z_rows, later[0].compress), x_rows


def next_rows(layer: LayerParams, config: ModelConfig, z: Stream, x: Stream, dropout: Dropout | None = None) -> XRows:
    """Returns C' = update(C, attend_window(Qc, Kc, Vc)) for the rows of C that were a generation window.

    Args:
      layer: the block's `compress` layer.
      z: keys and values of the rows of C that were z beside this window; no other fields are read.
      x: the window's rows of C with their queries, keys and values.
    """
    attended = _x_parts(config, z, x, dropout)[0].astype(x.Q.dtype)
    return update(layer, x.rows, attended, part_of(dropout, FEED_FORWARD))


# ---- The whole sequence


def compressed(
    layer: LayerParams, config: ModelConfig, C: History, dropout: Dropout | None, documents: Array | None
) -> History:
    """Returns update(C, attend_causal(Qc, Kc, Vc)) by block 0's `compress`; windows begin with the layer after it.

    Args:
      C: the embeddings [batch, n, D] of the whole sequence, with their queries, keys and values.
      documents: of the rows, int32 [batch, n]; None if the sequence is a single document.
    """
    y = Stream(C.rows, C.Q, C.K, C.V, documents=documents)
    attended = attend(y.Q, y.K, y.V, **attention_options(config, part_of(dropout, CAUSAL_ATTENTION), y, y, causal=True))
    rows = update(layer, y.rows, attended, part_of(dropout, FEED_FORWARD))
    return dataclasses.replace(C, rows=rows, Q=None, K=None, V=None, compressed=True)


def with_later(
    blocks: Sequence[Any],
    config: ModelConfig,
    C: History,
    rope: Rope,
    dropout: Dropout | None = None,
    documents: Array | None = None,
) -> History:
    """Returns C, the history of block 0, with the histories of the later blocks, on this device's rows.

    Args:
      blocks: parameters of all blocks, from `prepare_layers`.
      rope: rotations of positions 0, 1, ... of the whole sequence.
      documents: of the whole sequence's rows, int32 [batch, rows]; None if it is a single document.
    """
    following, later, split = C, [], C.split
    take: Any = None if split is None else functools.partial(split.take, axis=0)
    for index, (block, next_block) in enumerate(itertools.pairwise(blocks)):
        rows = _next_history(block.compress, config, following, part_of(dropout, index), documents)
        own_rope = rope.rows(0, rows.shape[1]) if split is None else jax.tree.map(take, rope)
        keys = keyed(rows, C.key_sums[index : index + 1])
        parts = "qkv" if index < len(blocks) - 2 else "kv"  # queries compute the history after it
        projected = project(next_block.compress, rows, own_rope, parts, keys)
        arrays: dict[str, Any] = {"rows": rows, "Q": None, **dict(zip(parts.upper(), projected))}
        following = dataclasses.replace(C, key_sums=C.key_sums[index + 1 :], **arrays)
        later.append(following)
    return dataclasses.replace(C, later=tuple(later))


def _next_history(
    layer: LayerParams, config: ModelConfig, C: History, dropout: Dropout | None, documents: Array | None
) -> Float[Array, "batch n D"]:
    """Returns C' for all rows of C, window by window; of this device's rows if devices split them."""
    split, held = C.split, C.rows.shape[1]
    if not held:
        return C.rows
    parts = split.parts if split else 1
    windows = num_windows(config, held * parts)
    segments = plan_segments(config, windows, ExecutionPlan(together=1 if split else WINDOWS_TOGETHER))
    padded = padded_length(config, windows, segments, parts)
    own = jax.tree.map(lambda rows: pad_rows(rows, padded // parts - held), Stream(C.rows, C.Q, C.K, C.V))
    C = History(own.rows, own.Q, own.K, own.V, split=split)
    if documents is not None:
        documents = pad_rows(documents, padded - documents.shape[1])
    layer, found = without_router_losses(layer), []
    for segment in (FIRST_WINDOW, *segments):
        groups = segment.count // segment.together
        items = jnp.zeros((groups,)) if split else segment.rows(config, own)
        step = functools.partial(_next_window, config, segment)
        if groups == 1:
            item = jax.tree.map(lambda array: array[0], items)
            found.append(step((layer, C), (dropout, documents), (item, 0)))
        else:
            found.append(joined(map_steps(step, (layer, C), items, (dropout, documents), groups)))
    rows = jnp.concatenate(found, axis=1)
    rows = pad_rows(rows, padded - rows.shape[1])
    return (rows if split is None else split.take(rows))[:, :held]


def _next_window(
    config: ModelConfig, segment: Segment, shared: Any, constants: Any, item: tuple[Any, Any]
) -> Float[Array, "batch rows D"]:
    """Returns `next_rows` of the windows of group `number` of a segment, in order."""
    ((layer, C), (dropout, documents), (x, number)), size = (shared, constants, item), config.generation_window
    windows: PerWindow = segment.first + number * segment.together
    if segment.together > 1:
        windows = windows + np.arange(segment.together, dtype=np.int32)
    frame, starts = segment.frame(config, windows), segment.starts(config, windows)
    if C.split is not None:
        x = jax.tree.map(lambda array: C.slice(array, starts, size), Stream(C.rows, C.Q, C.K, C.V))
    start, width, batch = frame.observed_start, frame.observed_width, len(x.rows)
    key, value = (C.slice(array, start, width, batch, frame.stride) for array in (C.K, C.V))
    z = Stream(None, K=key, V=value, length=frame.observed_length)
    if documents is not None:
        z = dataclasses.replace(z, documents=slice_rows(documents, start, width, batch))
        x = dataclasses.replace(x, documents=slice_rows(documents, starts, size, batch))
    rows = next_rows(layer, config, z, x, part_of(dropout, windows if segment.together == 1 else windows[0]))
    return rows.reshape(len(C.rows), -1, rows.shape[-1])


# ---- Attention of z and x


def _attend_window(config: ModelConfig, z: Stream, x: Stream, dropout: Dropout | None) -> Float[Array, "b rows h k"]:
    """Returns causal attention of the rows of z and x, side by side, to themselves."""
    if _contiguous(z):
        return _attend_side_by_side(attend, config, z, x, dropout)
    return _window_parts(config, z, x, dropout)[0].astype(x.Q.dtype)


def _window_parts(config: ModelConfig, z: Stream, x: Stream, dropout: Dropout | None) -> OutputAndLse:
    """Returns `_attend_window` with its log-sum-exp; float32 or the dtype of the rows."""
    if _contiguous(z):
        return _attend_side_by_side(attend_with_lse, config, z, x, dropout)
    every = dataclasses.replace(z, length=None)  # a valid row of z sees valid rows only
    z_options = attention_options(config, part_of(dropout, OBSERVED_ATTENTION), every, z, causal=True)
    z_attends, z_lse = attend_with_lse(z.Q, z.K, z.V, **z_options)
    x_attends, x_lse = _x_parts(config, z, x, dropout)
    return beside(z_attends, x_attends), beside(z_lse, x_lse)


def _x_parts(config: ModelConfig, z: Stream, x: Stream, dropout: Dropout | None) -> OutputAndLse:
    """Returns attention of the rows of x to z and to the rows of x up to their own, and its log-sum-exp; float32."""
    x_options = attention_options(config, part_of(dropout, CAUSAL_ATTENTION), x, x, causal=True)
    reading_z = attention_options(config, part_of(dropout, CROSS_ATTENTION), z, x)
    return merge_parts(attend_with_lse(x.Q, x.K, x.V, **x_options), attend_with_lse(x.Q, z.K, z.V, **reading_z))


def _contiguous(z: Stream) -> bool:
    """Returns whether all rows of z are known to be valid, so that x follows z without a gap."""
    return z.length is None or (not isinstance(z.length, jax.Array) and bool(np.all(z.length == z.Q.shape[1])))


def _attend_side_by_side(
    attend: Callable[..., Any], config: ModelConfig, z: Stream, x: Stream, dropout: Dropout | None
) -> Any:
    """Calls `attend` or `attend_with_lse` for the rows of z and x as one stream."""
    documents = documents_of(z, (z, x))
    Q, K, V = beside(z.Q, x.Q), beside(z.K, x.K), beside(z.V, x.V)
    y = Stream(None, Q, K, V, documents=None if documents is None else documents[0])
    return attend(Q, K, V, **attention_options(config, part_of(dropout, CAUSAL_ATTENTION), y, y, causal=True))
