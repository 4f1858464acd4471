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
    z_rows: Array | None = None  # z after the layer, [batch, width, D], only with `config.causal_history`


class ZMask(NamedTuple):
    """How the rows of C read z in `restore`: which of its rows, and with which dropout; not differentiated."""

    length: PerWindow  # number of valid rows, see `Stream`
    documents: Array | None  # of the rows of z
    dropout: Dropout | None  # of their attention weights and in their feed-forward
    start: PerWindow = None  # h, where `RestoreLayer.z_rows` take the place of rows of C


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
    """

    rope: Rope | None = None
    key_sums: tuple[Any, ...] = ()
    observed_start: PerWindow = None
    split: SplitRows | None = flax.struct.field(pytree_node=False, default=None)
    chunk: int = flax.struct.field(pytree_node=False, default=0)

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

    def slice(self, array: Array, start: PerWindow, length: int, batch: int | None = None) -> Array:
        """Returns rows start .. start + length - 1 of a field's `array` on every device; see `slice_rows`."""
        if self.split is None:
            return slice_rows(array, start, length, batch)
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
        keys = dataclasses.replace(self._keys(len(query)), length=length, never_empty=False)
        output, lse = attend_with_lse(query, keys.K, keys.V, **attention_options(config, dropout, keys, *readers))
        return (output, lse) if split is None else merge_softmaxes(output.astype(jnp.float32), lse, split.axis)

    def _keys(self, batch: int) -> "History":
        """Returns keys, values and documents, repeated for the windows that share them."""
        arrays = {"K": self.K, "V": self.V, "documents": self.documents}
        return dataclasses.replace(self, **jax.tree.map(lambda array: repeat_for_windows(array, batch), arrays))

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
            layer, mask = rows_of_device(self.split, layer, mask)
        if not self.chunk:
            restored = restore_rows(*rows, layer, mask, documents)
            restored = continue_rows(restored, 0, layer, mask)
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
                restored = continue_rows(restored, number * self.chunk, layer, mask)
                rotations = rope.rows(number * self.chunk, self.chunk)
                return restored, *project(next_layer, restored, rotations, parts, keyed(restored, sums))

            traced = mask if known is None else mask._replace(length=None)
            filled = -(-jnp.max(jnp.asarray(length, jnp.int32)) // self.chunk)
            counted = filled  # the chunks in which somebody reads rows that `restore_rows` computes
            if layer.z_rows is not None:
                counted = jnp.maximum(-(-jnp.max(jnp.asarray(mask.start, jnp.int32)) // self.chunk), 1)
            layers = split_router_losses(layer, counted), next_layer
            chunks = jax.tree.map(lambda array: in_chunks(array, self.chunk), (rows, sums))
            found = map_steps(restore_chunk, layers, chunks, (traced, documents, rope), filled)
            restored, *projected = map(joined, found)
        arrays: dict[str, Any] = {"rows": restored, "Q": None, **dict(zip(parts.upper(), projected))}
        return dataclasses.replace(self, key_sums=self.key_sums[1:], **arrays)


def restored_history(
    layer: LayerParams,
    config: ModelConfig,
    C: ReadableHistory,
    z: Stream,
    later: Sequence[LayerParams],
    dropout: Dropout | None,
    z_rows: Float[Array, "batch width D"] | None = None,
) -> Any:
    """Returns C' as a block's `restore` layer computes it from z, projected for the next block.

    Args:
      later: the `compress` layers of the blocks that follow. If there are none, nobody reads C', and it is None.
      z_rows: rows that take the place of C' from row h on; None to compute these like the others.
    """
    if not later:
        return None
    parts = "qkv" if len(later) > 1 else "kv"  # the last block does not restore C, so it needs no Qc
    restore_some = functools.partial(restore_rows, config, z.never_empty)
    mask = ZMask(z.length, z.documents, dropout, None if z_rows is None else C.observed_start)
    return C.restore(restore_some, RestoreLayer(layer, z.K, z.V, z_rows), mask, later[0], parts)


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


def continue_rows(restored: Float[Array, "batch n D"], first: Array | int, layer: RestoreLayer, mask: ZMask) -> Array:
    """Returns the restored rows `first`, `first` + 1, ... of C, with `layer.z_rows` in the places of the rows of z.

    Rows of z that are not valid fall on rows of the future, which no query reads.
    """
    if layer.z_rows is None or not layer.z_rows.shape[1]:
        return restored
    count, width = restored.shape[1], layer.z_rows.shape[1]
    # Rows of z before or after these rows of C fall into the margins.
    padded = jnp.pad(restored, ((0, 0), (width, width), (0, 0)))
    start = jnp.clip(mask.start - first + width, 0, count + width)
    return put_rows(padded, layer.z_rows, start)[:, width : width + count]


def rows_of_device(split: SplitRows, layer: RestoreLayer, mask: ZMask) -> tuple[RestoreLayer, ZMask]:
    """Takes this device's rows of `layer.z_rows`; `mask.start` becomes the first one's index among its rows of C."""
    if layer.z_rows is None or not layer.z_rows.shape[1]:
        return layer, mask
    start, parts = jnp.asarray(mask.start, jnp.int32), split.parts
    first, count = split.count(start), -(-layer.z_rows.shape[1] // parts)
    padded = jnp.pad(layer.z_rows, ((0, 0), (0, 2 * parts), (0, 0)))
    own = jax.lax.dynamic_slice_in_dim(padded, first * parts + split.index() - start, count * parts, axis=1)
    own = own.reshape(own.shape[0], count, parts, -1)[:, :, 0]
    return layer._replace(z_rows=own), mask._replace(start=first)


def put_rows(array: Array, rows: Array, start: PerWindow) -> Array:
    """Writes `rows` into an array [batch, n, D] from row `start` on; `start` is [g] for g windows that run together."""
    if not np.ndim(start):
        return jax.lax.dynamic_update_slice_in_dim(array, rows, start, axis=1)
    count = len(start)
    parts, rows = (each.reshape(-1, count, *each.shape[1:]) for each in (array, rows))
    written = [jax.lax.dynamic_update_slice_in_dim(parts[:, i], rows[:, i], start[i], axis=1) for i in range(count)]
    return jnp.stack(written, axis=1).reshape(array.shape)


def keyed(rows: Array, sums: Sequence[Array]) -> Array | None:
    """Returns the input of the keys of C', given its rows and `History.key_sums`; None if that is the rows."""
    return plus(rows, sums[0]) if sums else None


def observed_stream(layer: LayerParams, C: History, window: PlacedWindow, batch: int, parts: str = "q") -> Stream:
    """Returns z = C[h:] with its `compress` queries, `batch` windows of `observed_width` rows.

    With `parts` = 'qkv' also with its keys and values.
    """
    start, width = window.frame.observed_start, window.frame.observed_width
    z = C.slice(C.rows, start, width, batch)
    stream = Stream.of(layer, z, window.z_rope, "q") if C.Q is None else Stream(z, C.slice(C.Q, start, width, batch))
    if parts == "q":
        return stream
    key, value = (C.slice(array, start, width, batch) for array in (C.K, C.V))
    return dataclasses.replace(stream, K=key, V=value, length=window.frame.observed_length)
