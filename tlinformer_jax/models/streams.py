"""The two streams of a block, z or C and x, with their projections; and how they lie side by side."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.kernels.common import merge_softmaxes
from tlinformer_jax.models.attention import Documents, attend
from tlinformer_jax.models.feed_forward import split_router_losses
from tlinformer_jax.models.layers import Dropout, LayerParams, part_of, project
from tlinformer_jax.models.recompute import map_rows
from tlinformer_jax.models.rope import Rope
from tlinformer_jax.models.windows import PerWindow, WindowFrame, repeat_for_windows, slice_rows
from tlinformer_jax.parallel.sharding import SplitRows

AnyStream = TypeVar("AnyStream", bound="Stream")


@flax.struct.dataclass
class Stream:
    """Rows, and their queries, keys and values under the layer that they are about to enter.

    Attributes:
      rows: of the residual stream, [batch, rows, D].
      Q, K, V: [batch, rows, heads, d_h], Q and K rotated; None where no one reads them.
      length: how many of the rows are valid, the first ones; None for all.
      never_empty: `length`, if not known, is known never to be 0, which saves attention a pass over its output.
      documents: of the rows, int32 [batch, rows]; a query sees keys of its own. None where all are one.
    """

    rows: Any
    Q: Any = None
    K: Any = None
    V: Any = None
    length: PerWindow = None
    never_empty: bool = flax.struct.field(pytree_node=False, default=False)
    documents: Any = None

    @classmethod
    def of(
        cls: type[AnyStream],
        layer: LayerParams,
        rows: Float[Array, "b n D"],
        rope: Rope,
        parts: str = "qkv",
        length: PerWindow = None,
        never_empty: bool = False,
        key_rows: Float[Array, "b n D"] | None = None,
    ) -> AnyStream:
        """The rows, projected to `parts` (see `layers.project`)."""
        projected: dict[str, Any] = dict(zip(parts.upper(), project(layer, rows, rope, parts, key_rows)))
        return cls(rows=rows, length=length, never_empty=never_empty, **projected)


def project_both(
    layer: LayerParams,
    z_rows: Float[Array, "b width D"],
    x_rows: Float[Array, "b m D"],
    rope: Rope,
    length: PerWindow,
    never_empty: bool = False,
) -> tuple[Stream, Stream]:
    """`Stream.of` z and of x by one product; `rope` has both's rotations side by side, `length` is that of z."""
    z_parts, x_parts = side_by_side(lambda rows: project(layer, rows, rope), (z_rows, x_rows))
    return Stream(z_rows, *z_parts, length, never_empty), Stream(x_rows, *x_parts)  # type: ignore[call-arg]


@flax.struct.dataclass
class History(Stream):
    """C at the entrance of a block, whole: how training and uncached evaluation read and restore it.

    Rows past `length` are the future, which no one reads. Windows that run together may share one history, whose
    batch is then that of the sequences.

    Attributes:
      rope: rotations of positions 0, 1, ...
      split: how rows are split over devices, each of which holds only its own; None where each holds all.
      chunk: rows that are restored at a time; 0 for all at once.
    """

    rope: Rope | None = None
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
    ) -> "History":
        """The first `length` of the rows (None: all), projected; `rope` begins at their positions."""
        valid = rows.shape[1] if length is None else length
        projected = cls.of(layer, rows, rope.rows(0, rows.shape[1]), key_rows=key_rows)
        return dataclasses.replace(projected, length=valid, rope=rope)

    def slice(self, array: Array, start: PerWindow, length: int, batch: int | None = None) -> Array:
        """Rows start .. start + length - 1 of one of these arrays, on every device; `batch` as in `slice_rows`."""
        if self.split is None:
            return slice_rows(array, start, length, batch)
        return self.split.gather(array, start, length)

    def read(
        self, query: Float[Array, "b m h k"], config: ModelConfig, dropout: Dropout | None, *readers: Stream
    ) -> Float[Array, "b m h k"]:
        """attend(Q, Kc, Vc): every query, of the `readers`, reads all valid rows."""
        repeated = (self.K, self.V, self.documents)
        key, value, documents = jax.tree.map(lambda array: repeat_for_windows(array, query.shape[0]), repeated)
        keys = dataclasses.replace(self, K=key, documents=documents)
        if self.split is None:
            return attend(query, key, value, **attention_options(config, dropout, keys, *readers))
        # Each device reads its own rows. Only XLA's attention has a log-sum-exp that can be differentiated.
        output, lse = attend(
            query,
            key,
            value,
            key_length=self.split.count(self.length),
            dropout=part_of(dropout, self.split.index()),
            backend="xla",
            return_lse=True,
            scale=config.attention_scale,
            documents=documents_of(keys, readers),
        )
        return merge_softmaxes(output.astype(jnp.float32), lse, self.split.axis)[0].astype(query.dtype)

    def restore(
        self, restore_rows: Callable[..., Array], shared: Any, fixed: Any, next_layer: LayerParams, parts: str
    ) -> "History":
        """C', projected by the layer that reads it next.

        Args:
          restore_rows: C' = restore_rows(C, Q, shared, fixed, documents of C), for any rows; closes over no traced
            values.
          shared: what all rows read and gradients flow to.
          fixed: (valid rows of z, its documents, dropout).
          next_layer: the following block's `compress`.
          parts: what that reads of C': 'qkv' where it restores it in its turn, else 'kv'.
        """
        batch = shared[-1].shape[0]
        rows = repeat_for_windows(self.rows, batch), repeat_for_windows(self.Q, batch)
        rope, length, (valid, read, dropout) = self.rope, self.length, fixed
        assert rope is not None
        documents = jax.tree.map(lambda array: repeat_for_windows(array, batch), self.documents)
        if self.split is not None:
            rope = Rope(self.split.take(rope.cos, axis=0), self.split.take(rope.sin, axis=0))
            dropout = part_of(dropout, self.split.index())
            length = self.split.count(length)
        if not self.chunk:
            restored = restore_rows(*rows, shared, (valid, read, dropout), documents)
            projected = project(next_layer, restored, rope.rows(0, restored.shape[1]), parts)
        else:
            # What is a plain number stays one: kernels are faster where nothing is masked.
            known = None if isinstance(valid, jax.Array) else valid

            def restore_chunk(shared: Any, fixed: Any, item: tuple[Any, Array]) -> tuple[Array, ...]:
                (shared, next_layer), (valid, read, documents, rope, dropout), (part, number) = shared, fixed, item
                if documents is not None:
                    documents = slice_rows(documents, number * self.chunk, self.chunk)
                here = valid if known is None else known, read, part_of(dropout, number)
                restored = restore_rows(*part, shared, here, documents)
                return restored, *project(next_layer, restored, rope.rows(number * self.chunk, self.chunk), parts)

            fixed = (valid if known is None else None, read, documents, rope, dropout)
            filled = -(-jnp.max(jnp.asarray(length, jnp.int32)) // self.chunk)
            shared = split_router_losses(shared, filled)
            restored, *projected = map_rows(restore_chunk, self.chunk, (shared, next_layer), rows, fixed, filled)
        arrays: dict[str, Any] = {"rows": restored, "Q": None, **dict(zip(parts.upper(), projected))}
        return dataclasses.replace(self, **arrays)


@flax.struct.dataclass
class PlacedWindow:
    """Where generation windows stand, with the rotations of z, of x, and of both side by side."""

    frame: WindowFrame
    z_rope: Rope
    x_rope: Rope
    rope: Rope


def place_window(frame: WindowFrame, rope: Rope, rows: int) -> PlacedWindow:
    """Gives all rows their rotations: `rows` of each generation window; `rope` has those of positions 0, 1, ..."""
    z_rope, x_rope = rope.rows(frame.observed_start, frame.observed_width), rope.rows(frame.history_length, rows)
    return PlacedWindow(
        frame, z_rope, x_rope, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-2), z_rope, x_rope)
    )


def observed_stream(layer: LayerParams, C: History, window: PlacedWindow, batch: int) -> Stream:
    """z = C[h:] with its queries under `compress`: [batch, observed_width, ...]; `batch` is that of the windows."""
    start, width = window.frame.observed_start, window.frame.observed_width
    z = C.slice(C.rows, start, width, batch)
    return Stream.of(layer, z, window.z_rope, "q") if C.Q is None else Stream(z, C.slice(C.Q, start, width, batch))


def with_documents(frame: WindowFrame, z: Stream, x: Stream) -> tuple[Stream, Stream]:
    """Both streams, each told the documents of its rows."""
    if frame.x_documents is None:
        return z, x
    return dataclasses.replace(z, documents=frame.z_documents), dataclasses.replace(x, documents=frame.x_documents)


def documents_of(keys: Stream, readers: Sequence[Stream]) -> Documents | None:
    """The documents of the readers' rows, side by side, and of the keys, as `attend` takes them."""
    if keys.documents is None:
        return None
    return functools.reduce(beside, [reader.documents for reader in readers]), keys.documents


def attention_options(config: ModelConfig, dropout: Dropout | None, keys: Stream, *readers: Stream) -> dict[str, Any]:
    """Options for `attend`: `keys` is the stream whose keys are read, `readers` those whose queries read them."""
    options: dict[str, Any] = {"dropout": dropout, "backend": config.attention, "scale": config.attention_scale}
    if keys.documents is not None:
        options["documents"] = documents_of(keys, readers)
    if keys.length is None:
        return options
    length, (batch, rows) = keys.length, keys.K.shape[:2]
    if not isinstance(length, jax.Array) and np.all(np.asarray(length) == rows):
        return options  # kernels are faster where nothing is masked
    if np.ndim(length):
        length = jnp.tile(jnp.asarray(length, jnp.int32), batch // len(length))
    return {**options, "key_length": length, "never_empty": keys.never_empty}


def beside(z: Array, x: Array) -> Array:
    """Rows of both streams side by side, [batch, rows of z + rows of x, ...]; without history z has none."""
    return jnp.concatenate([z, x], axis=1) if z.shape[1] else x


def apart(both: Array, width: int) -> tuple[Array, Array]:
    """The inverse of `beside`; `width` is the rows of z."""
    if not width:
        return both[:, :0], both
    z, x = jax.lax.split(both, (width, both.shape[1] - width), axis=1)
    return z, x


def side_by_side(function: Callable[..., Any], *pairs: tuple[Array, Array]) -> tuple[Any, Any]:
    """(function(z ...), function(x ...)) by one call, for a function that works row by row."""
    width = pairs[0][0].shape[1]
    found = function(*(beside(*pair) for pair in pairs))
    parts = [apart(array, width) for array in jax.tree.leaves(found)]
    tree = jax.tree.structure(found)
    return tuple(jax.tree.unflatten(tree, [part[side] for part in parts]) for side in (0, 1))
