"""A block whose history is computed like the generation window (`model.causal_history`); not in the paper.

In the paper's block (`models.block`) rows of z read each other in both directions, a row of x adds two softmaxes, and
`restore` starts again from C. Here the rows of z and x, side by side, are computed like the rows of a Transformer. y
are rows h .. n + m - 1:

    compress:  y  = update(y, attend_causal(Qy, [Kc; Ky], [Vc; Vy]))    Kc, Vc: rows before h, which every row reads
    hidden:    y' = update(y, attend_causal(Qy, Ky, Vy))
    restore:   y' = update(y, attend_causal(Qy, Ky, Vy))
               C' = update(C, attend(Qc, Kz, Vz)) before row h, and the rows of z' from there on

There is one softmax over all keys of a row. If z contains the whole history, this is a Transformer: no rows are before
h, and the next block continues y. Otherwise rows before h are read in `compress` only, as in the paper.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.attention import OutputAndLse, attend, attend_with_lse, merge_parts
from tlinformer_jax.models.history import ReadableHistory, restored_history
from tlinformer_jax.models.layers import Dropout, LayerParams, part_of, update
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
    """Runs the last layer: as `hidden`, and rows of C before z read z. C' is None if no `later` block reads it."""
    if not later:  # nobody reads z'
        _, x_attends = apart(_attend_window(config, z, x, dropout), z.Q.shape[1])
        return None, update(layer, x.rows, x_attends, part_of(dropout, FEED_FORWARD))
    z_rows, x_rows = hidden(layer, config, z, x, dropout)
    return restored_history(layer, config, C, z, [block.compress for block in later], dropout, z_rows), x_rows


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
    x_options = attention_options(config, part_of(dropout, CAUSAL_ATTENTION), x, x, causal=True)
    reading_z = attention_options(config, part_of(dropout, CROSS_ATTENTION), z, x)
    z_attends, z_lse = attend_with_lse(z.Q, z.K, z.V, **z_options)
    x_attends, x_lse = merge_parts(
        attend_with_lse(x.Q, x.K, x.V, **x_options), attend_with_lse(x.Q, z.K, z.V, **reading_z)
    )
    return beside(z_attends, x_attends), beside(z_lse, x_lse)


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
