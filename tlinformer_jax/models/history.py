"""The history C of training and of evaluation without a cache: how a block reads it and restores it.

`ReadableHistory` is what the equations need of a history. `History` keeps all rows in arrays, which may be split over
devices; `decoding.history` computes them from a KV cache.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.kernels.common import merge_softmaxes
from tlinformer_jax.models.attention import OutputAndLse, attend, attend_with_lse
from tlinformer_jax.models.feed_forward import split_router_losses
from tlinformer_jax.models.key_rows import plus
from tlinformer_jax.models.layers import Dropout, LayerParams, part_of, project, update
from tlinformer_jax.models.recompute import map_steps
from tlinformer_jax.models.rope import Rope
from tlinformer_jax.models.streams import (
    CONTEXT_ATTENTION,
    CONTEXT_FEED_FORWARD,
    PlacedWindow,
    Stream,
    attention_options,
)
from tlinformer_jax.models.windows import PerWindow, in_chunks, joined, repeat_for_windows, slice_rows
from tlinformer_jax.parallel.sharding import SplitRows


class RestoreLayer(NamedTuple):
    """The block's `restore` layer with the keys and values of z, which all rows of C read; differentiated."""

    params: LayerParams
    K: Array  # [batch, width, heads, d_h]
    V: Array


class ZMask(NamedTuple):
    """How the rows of C read z in `restore`: which of its rows, and with which dropout; not differentiated."""

    length: PerWindow  # number of valid rows, see `Stream`
    documents: Array | None  # of the rows of z
    dropout: Dropout | None  # of their attention weights and in their feed-forward


@runtime_checkable
class ReadableHistory(Protocol):
    """The history C, as the equations need it."""

    @property
    def observed_start(self) -> Any:
        """h, the first row of the observation window; for `read_before`."""

    def read(
        self, query: Float[Array, "b m h k"], config: ModelConfig, dropout: Dropout | None, *readers: Stream
    ) -> Float[Array, "b m h k"]:
        """Returns attend(Q, Kc, Vc), where Q are the queries of the `readers`, side by side."""

    def read_before(
        self, query: Float[Array, "b m h k"], config: ModelConfig, dropout: Dropout | None, *readers: Stream
    ) -> OutputAndLse:
        """Returns attention to the rows before the observation window, and its log-sum-exp."""

    def restore(
        self, restore_rows: Callable[..., Array], layer: RestoreLayer, mask: ZMask, next_layer: LayerParams, parts: str
    ) -> Any:
        """Returns C', computed by `restore_rows` and projected to `parts` by `next_layer`."""

    def continued(self, z_rows: Float[Array, "b width D"], next_layer: LayerParams) -> Any:
        """Returns C' with `config.causal_history`, given z'; `next_layer` is the `compress` layer of the next block."""


@flax.struct.dataclass
class History(Stream):
    """The history C at the entrance of a block, for training and evaluation without a cache.

    Rows past `length` are the future; no query reads them. Windows that run together may share the history of their
    sequence: its batch size is then the number of sequences, not of windows.

    Attributes:
      rope: rotations of positions 0, 1, ...
      split: how the rows are split over devices; None if each device holds all rows.
      chunk: rows restored at a time; 0 for all at once.
      key_sums: for each block from the next one on, what is added to the input of its keys, see `layers.Embedded`.
      observed_start: h, the first row of the observation window; None outside a block.
      later: with `config.causal_history`, the histories of the later blocks, which are the same for all windows.
      z: with `config.causal_history`, z at the entrance of a later block; None if it is the rows of C from h on.
      compressed: whether the rows are the output of the block's `compress` layer, without projections; see
        `causal_history.compressed`.
    """

    rope: Rope | None = None
    key_sums: tuple[Any, ...] = ()
    observed_start: PerWindow = None
    later: tuple["History", ...] = ()
    z: Stream | None = None
    split: SplitRows | None = flax.struct.field(pytree_node=False, default=None)
    chunk: int = flax.struct.field(pytree_node=False, default=0)
    compressed: bool = flax.struct.field(pytree_node=False, default=False)

    @classmethod
    def whole(
        cls,
        layer: LayerParams,
        rows: Float[Array, "b n D"],
        rope: Rope,
        length: PerWindow = None,
        key_rows: Float[Array, "b n D"] | None = None,
        key_sums: tuple[Array, ...] = (),
    ) -> "History":
        """Projects the rows to a history with `length` valid rows (None: all); `rope` begins at the first row."""
        valid = rows.shape[1] if length is None else length
        projected = cls.of(layer, rows, rope.rows(0, rows.shape[1]), key_rows=key_rows)
        return dataclasses.replace(projected, length=valid, rope=rope, key_sums=key_sums)

    def slice(
        self, array: Array, start: PerWindow, length: int, batch: int | None = None, stride: int | None = None
    ) -> Array:
        """Returns rows start .. start + length - 1 of a field's `array` on every device; see `slice_rows`."""
        if self.split is None:
            return slice_rows(array, start, length, batch, stride)
        return self.split.gather(array, start, length)

    def read(
        self, query: Float[Array, "b m h k"], config: ModelConfig, dropout: Dropout | None, *readers: Stream
    ) -> Float[Array, "b m h k"]:
        """Returns attend(Q, Kc, Vc): every query reads all valid rows. The queries are those of the `readers`."""
        if self.split is None:
            keys = self._keys(len(query))
            return attend(query, keys.K, keys.V, **attention_options(config, dropout, keys, *readers))
        config = dataclasses.replace(config, attention="xla")  # cuDNN and splash have no log-sum-exp with a gradient
        return self._read_first(query, config, dropout, self.length, *readers)[0].astype(query.dtype)

    def read_before(
        self, query: Float[Array, "b m h k"], config: ModelConfig, dropout: Dropout | None, *readers: Stream
    ) -> OutputAndLse:
        """Returns attention to the rows before the observation window, and its log-sum-exp."""
        return self._read_first(query, config, dropout, self.observed_start, *readers)

    def _read_first(
        self,
        query: Float[Array, "b m h k"],
        config: ModelConfig,
        dropout: Dropout | None,
        length: PerWindow,
        *readers: Stream,
    ) -> OutputAndLse:
        """Returns attention to the first `length` rows, each device to its own of them, and its log-sum-exp."""
        split = self.split
        if split is not None:
            length, dropout = split.count(length), part_of(dropout, split.index())
        keys = dataclasses.replace(self, length=length, never_empty=False)._keys(len(query))
        output, lse = attend_with_lse(query, keys.K, keys.V, **attention_options(config, dropout, keys, *readers))
        return (output, lse) if split is None else merge_softmaxes(output.astype(jnp.float32), lse, split.axis)

    def _keys(self, batch: int) -> "History":
        """Returns this history with a length and documents for each of `batch` windows, which share keys and values."""
        length, documents = self.length, self.documents
        if np.ndim(length):
            tile = jnp.tile if isinstance(length, jax.Array) else np.tile
            length = tile(length, batch // len(length))
        documents = None if documents is None else repeat_for_windows(documents, batch)
        return dataclasses.replace(self, length=length, documents=documents)

    def restore(
        self,
        restore_rows: Callable[..., Array],
        layer: RestoreLayer,
        mask: ZMask,
        next_layer: LayerParams,
        parts: str,
    ) -> "History":
        """Returns C', projected by `next_layer`.

        Args:
          restore_rows: computes C' = restore_rows(C, Q, layer, mask, documents of C) for any rows; must not close over
            traced values.
          next_layer: the `compress` layer of the next block.
          parts: 'qkv' if the next block restores C' again, else 'kv'.
        """
        batch = layer.V.shape[0]
        rows = repeat_for_windows(self.rows, batch), repeat_for_windows(self.Q, batch)
        rope, length = self.rope, self.length
        assert rope is not None
        documents, sums = jax.tree.map(
            lambda array: repeat_for_windows(array, batch), (self.documents, self.key_sums[:1])
        )
        if self.split is not None:
            rope = Rope(self.split.take(rope.cos, axis=0), self.split.take(rope.sin, axis=0))
            mask = mask._replace(dropout=part_of(mask.dropout, self.split.index()))
            length = self.split.count(length)
        if not self.chunk:
            restored = restore_rows(*rows, layer, mask, documents)
            rotations = rope.rows(0, restored.shape[1])
            projected = list(project(next_layer, restored, rotations, parts, keyed(restored, sums)))
        else:
            # A plain number must not become an array: kernels are faster if they know that nothing is masked.
            known = None if isinstance(mask.length, jax.Array) else mask.length

            def restore_chunk(layers: Any, constants: Any, item: tuple[Any, Array]) -> tuple[Array, ...]:
                (layer, next_layer), (mask, documents, rope), ((part, sums), number) = layers, constants, item
                if documents is not None:
                    documents = slice_rows(documents, number * self.chunk, self.chunk)
                length = mask.length if known is None else known
                mask = mask._replace(length=length, dropout=part_of(mask.dropout, number))
                restored = restore_rows(*part, layer, mask, documents)
                rotations = rope.rows(number * self.chunk, self.chunk)
                return restored, *project(next_layer, restored, rotations, parts, keyed(restored, sums))

            traced = mask if known is None else mask._replace(length=None)
            filled = -(-jnp.max(jnp.asarray(length, jnp.int32)) // self.chunk)
            layers = split_router_losses(layer, filled), next_layer
            chunks = jax.tree.map(lambda array: in_chunks(array, self.chunk), (rows, sums))
            found = map_steps(restore_chunk, layers, chunks, (traced, documents, rope), filled)
            restored, *projected = map(joined, found)
        arrays: dict[str, Any] = {"rows": restored, "Q": None, **dict(zip(parts.upper(), projected))}
        return dataclasses.replace(self, key_sums=self.key_sums[1:], **arrays)

    def continued(self, z_rows: Float[Array, "b width D"], next_layer: LayerParams) -> "History":
        """Returns C' with `config.causal_history`, given z'; `next_layer` is the `compress` layer of the next block."""
        start, (batch, width) = self.observed_start, z_rows.shape[:2]
        assert self.rope is not None
        sums = [self.slice(array, start, width, batch) for array in self.key_sums[:1]]
        z = Stream.of(next_layer, z_rows, self.rope.rows(start, width), key_rows=keyed(z_rows, sums))
        following, *later = self.later
        return dataclasses.replace(following, later=tuple(later), z=z)


def restored_history(
    layer: LayerParams,
    config: ModelConfig,
    C: ReadableHistory,
    z: Stream,
    later: Sequence[LayerParams],
    dropout: Dropout | None,
) -> Any:
    """Returns C' as a block's `restore` layer computes it from z, projected for the next block.

    Args:
      later: the `compress` layers of the blocks that follow. If there are none, nobody reads C', and it is None.
    """
    if not later:
        return None
    parts = "qkv" if len(later) > 1 else "kv"  # the last block does not restore C, so it needs no Qc
    restore_some = functools.partial(restore_rows, config, z.never_empty)
    mask = ZMask(z.length, z.documents, dropout)
    return C.restore(restore_some, RestoreLayer(layer, z.K, z.V), mask, later[0], parts)


def restore_rows(
    config: ModelConfig,
    never_empty: bool,
    C: Float[Array, "batch n D"],
    Qc: Array,
    layer: RestoreLayer,
    mask: ZMask,
    documents: Array | None = None,
    attend: Callable[..., Array] = attend,
) -> Float[Array, "batch n D"]:
    """Returns C' = update(C, attend(Qc, Kz, Vz)) for any rows of C, since rows of C do not read each other.

    Args:
      never_empty: whether `mask.length` is known to be positive, see `Stream`.
      documents: documents of these rows of C; None if the sample is a single document.
      attend: `attention.attend`, or another implementation of it.
    """
    params, Kz, Vz = layer.params, layer.K, layer.V
    z = Stream(None, K=Kz, length=mask.length, never_empty=never_empty, documents=mask.documents)
    options = attention_options(config, part_of(mask.dropout, CONTEXT_ATTENTION), z, Stream(C, documents=documents))
    return update(params, C, attend(Qc, Kz, Vz, **options), part_of(mask.dropout, CONTEXT_FEED_FORWARD))


def keyed(rows: Array, sums: Sequence[Array]) -> Array | None:
    """Returns the input of the keys of C', given its rows and `History.key_sums`; None if that is the rows."""
    return plus(rows, sums[0]) if sums else None


def observed_stream(layer: LayerParams, C: History, window: PlacedWindow, batch: int, parts: str = "q") -> Stream:
    """Returns z = C[h:] with its `compress` queries, `batch` windows of `observed_width` rows.

    With `parts` = 'qkv' also with its keys and values. If C is `compressed`, only its rows.
    """
    frame = window.frame
    if C.z is not None:
        return dataclasses.replace(C.z, length=frame.observed_length)
    cut: Callable[[Array], Array] = functools.partial(
        C.slice, start=frame.observed_start, length=frame.observed_width, batch=batch, stride=frame.stride
    )
    z = cut(C.rows)
    if C.compressed:
        return Stream(z)
    stream = Stream.of(layer, z, window.z_rope, "q") if C.Q is None else Stream(z, cut(C.Q))
    if parts == "q":
        return stream
    key, value = cut(C.K), cut(C.V)
    return dataclasses.replace(stream, K=key, V=value, length=frame.observed_length)
