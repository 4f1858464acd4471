"""The streams of a block with their projections, and how z and x are concatenated side by side."""

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
from tlinformer_jax.kernels.common import Scores
from tlinformer_jax.models.attention import Documents
from tlinformer_jax.models.layers import Dropout, LayerParams, part_of, project, update
from tlinformer_jax.models.rope import Rope
from tlinformer_jax.models.windows import PerWindow, WindowFrame

# Parts of a layer that draw separate dropout masks.
SHARED_ATTENTION, CAUSAL_ATTENTION, FEED_FORWARD, CONTEXT_ATTENTION, CONTEXT_FEED_FORWARD = range(5)
# And in `models.causal_history`, where z has invalid rows: attention of z to itself, and of x to z.
OBSERVED_ATTENTION, CROSS_ATTENTION = 5, 6

# Rows of the residual stream, of z and of x.
ZRows = Float[Array, "batch width D"]
XRows = Float[Array, "batch m D"]

AnyStream = TypeVar("AnyStream", bound="Stream")


@flax.struct.dataclass
class Stream:
    """Rows of the residual stream, with their queries, keys and values for the next layer.

    Attributes:
      rows: [batch, rows, D].
      Q, K, V: [batch, rows, heads, d_h], Q and K rotated; None if not needed.
      length: number of valid rows, which come first; None if all are valid.
      never_empty: whether `length` is known to be positive; then attention saves a pass over its output.
      documents: each row's document, int32 [batch, rows]; None if the sample is a single document.
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
        """Projects the rows to `parts` by `layers.project`."""
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
    """Projects z and x by one product; `rope` contains the rotations of both, side by side; `length` is z's."""
    z_parts, x_parts = side_by_side(lambda rows: project(layer, rows, rope), (z_rows, x_rows))
    return Stream(z_rows, *z_parts, length, never_empty), Stream(x_rows, *x_parts)  # type: ignore[call-arg]


@flax.struct.dataclass
class PlacedWindow:
    """Positions of generation windows, with the rotations of z, of x, and of both side by side."""

    frame: WindowFrame
    z_rope: Rope
    x_rope: Rope
    rope: Rope


def place_window(frame: WindowFrame, rope: Rope, rows: int) -> PlacedWindow:
    """Looks up the rotations of z and of `rows` rows of x in `rope`, the rotations of positions 0, 1, ..."""
    z_rope, x_rope = rope.rows(frame.observed_start, frame.observed_width), rope.rows(frame.history_length, rows)
    return PlacedWindow(
        frame, z_rope, x_rope, jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-2), z_rope, x_rope)
    )


def with_documents(frame: WindowFrame, z: Stream, x: Stream) -> tuple[Stream, Stream]:
    """Sets the documents of both streams' rows."""
    if frame.x_documents is None:
        return z, x
    return dataclasses.replace(z, documents=frame.z_documents), dataclasses.replace(x, documents=frame.x_documents)


def documents_of(keys: Stream, readers: Sequence[Stream]) -> Documents | None:
    """Returns the documents of the readers' rows, side by side, and those of the keys, for `attend`."""
    if keys.documents is None:
        return None
    return functools.reduce(beside, [reader.documents for reader in readers]), keys.documents


def attention_options(
    config: ModelConfig,
    dropout: Dropout | None,
    keys: Stream,
    *readers: Stream,
    causal: bool = False,
    window: int | None = None,
) -> dict[str, Any]:
    """Returns options for `attend`; `readers` are the streams whose queries read the keys of stream `keys`."""
    scores = Scores(config.attention_scale, causal, window)
    options: dict[str, Any] = {"scores": scores, "dropout": dropout, "backend": config.attention}
    if keys.documents is not None:
        options["documents"] = documents_of(keys, readers)
    if keys.length is None:
        return options
    length, (batch, rows) = keys.length, keys.K.shape[:2]
    if not isinstance(length, jax.Array) and np.all(np.asarray(length) == rows):
        return options  # kernels are faster if nothing is masked
    if np.ndim(length) and len(length) < batch:  # of windows, and the same in all sequences
        length = jnp.tile(jnp.asarray(length, jnp.int32), batch // len(length))
    return {**options, "key_length": length, "never_empty": keys.never_empty}


def beside(z: Array, x: Array) -> Array:
    """Concatenates rows of z and x along axis 1; z has no rows if there is no history."""
    return jnp.concatenate([z, x], axis=1) if z.shape[1] else x


def apart(both: Array, width: int) -> tuple[Array, Array]:
    """Splits the result of `beside` again; `width` is the number of rows of z."""
    if not width:
        return both[:, :0], both
    z, x = jax.lax.split(both, (width, both.shape[1] - width), axis=1)
    return z, x


def side_by_side(function: Callable[..., Any], *pairs: tuple[Array, Array]) -> tuple[Any, Any]:
    """Returns (function(z ...), function(x ...)) from one call of a function that works row by row."""
    width = pairs[0][0].shape[1]
    found = function(*(beside(*pair) for pair in pairs))
    parts = [apart(array, width) for array in jax.tree.leaves(found)]
    tree = jax.tree.structure(found)
    return tuple(jax.tree.unflatten(tree, [part[side] for part in parts]) for side in (0, 1))


def update_both(
    layer: LayerParams, rows: tuple[ZRows, XRows], attended: tuple[Array, Array], dropout: Dropout | None
) -> tuple[ZRows, XRows]:
    """Returns update(z, ...) and update(x, ...), computed side by side."""
    return side_by_side(
        lambda rows, attended: update(layer, rows, attended, part_of(dropout, FEED_FORWARD)), rows, attended
    )
