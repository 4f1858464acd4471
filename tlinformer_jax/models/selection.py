"""Which rows of the history the observation window holds: the last ones, random ones, or those attended to most.

The paper's observation window is the last W_oh rows ('recent'). Here are its author's other proposals. In each, a
window's rows are chosen once, and are the same in all blocks and layers; they are put in the order of their positions,
and keep their true positions in every rotation. Of a history shorter than W_oh all rows are taken, which is 'recent'.

'random': the rows r of 0 .. n - 1 with the largest hashes of (r, n), n being the generation window's first position.
So they are a function of positions: the same for all sequences, in training and evaluation, whatever the seed.

'top_k': the rows with the largest weights in the attention that the generation window's first token pays to the history
in block 0's `compress` layer, softmax(q_n k_r / sqrt(d_h)) over r = 0 .. n - 1, the mean over heads. (TConstFormer's
compress layer has no such attention; its rows are chosen by the same formula all the same.) Of equal weights the
earlier row comes first. The choice has no gradient.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.models.config import ModelConfig
from tlinformer_jax.models.layers import LayerParams
from tlinformer_jax.models.rope import Rope
from tlinformer_jax.models.streams import History, Stream
from tlinformer_jax.models.windows import PerWindow, WindowFrame


@flax.struct.dataclass
class PlacedWindow:
    """Generation windows with all that their blocks ask of where they stand.

    Attributes:
      frame: n, h and lengths.
      chosen: where the observation windows do not hold the last rows, those that they hold, int32
        [batch * g, observed_width], valid ones first. Else None.
      z_rope: rotations of the observation windows' rows, at their true positions.
      x_rope: of the generation windows' rows.
      rope: of both side by side.
    """

    frame: WindowFrame
    chosen: jax.Array | None
    z_rope: Rope
    x_rope: Rope
    rope: Rope


def place_window(config: ModelConfig, frame: WindowFrame, C: History, x: Stream) -> PlacedWindow:
    """Chooses the observation windows' rows, and gives all rows their rotations.

    Args:
      config: of the model.
      frame: of a window, or of g windows that run together.
      C: the history under block 0's `compress` layer, [batch, rows, ...].
      x: the windows' tokens under the same, [batch * g, m, ...].
    """
    assert C.rope is not None
    x_rope = C.rope.rows(frame.history_length, x.rows.shape[1])
    if config.observed_selection == "recent" or not frame.observed_width:
        chosen, z_rope = None, C.rope.rows(frame.observed_start, frame.observed_width)
    else:
        rows = chosen = _chosen_rows(config, frame, x.Q, C.K)
        z_rope = jax.tree.map(lambda table: jnp.take(table, rows, axis=0), C.rope)
    return PlacedWindow(frame, chosen, z_rope, x_rope, _beside(z_rope, x_rope))


def observed_stream(layer: LayerParams, C: History, window: PlacedWindow, batch: int) -> Stream:
    """z = C[h:] with its queries under `compress`: [batch, observed_width, ...]; `batch` is that of the windows."""
    z = _observed(window, C, C.rows, batch)
    if C.Q is None:
        return Stream.of(layer, z, window.z_rope, "q")
    return Stream(z, _observed(window, C, C.Q, batch))


def _observed(window: PlacedWindow, C: History, array: jax.Array, batch: int) -> jax.Array:
    """The observation windows' rows of one of the history's arrays; only its last rows where devices share them."""
    frame = window.frame
    if window.chosen is None:
        return C.slice(array, frame.observed_start, frame.observed_width, batch)
    chosen = window.chosen.reshape(array.shape[0], -1)
    taken = jnp.take_along_axis(array, chosen.reshape(*chosen.shape, *(1,) * (array.ndim - 2)), axis=1)
    return taken.reshape(batch, frame.observed_width, *array.shape[2:])


def _chosen_rows(config: ModelConfig, frame: WindowFrame, query: jax.Array, key: jax.Array) -> jax.Array:
    """Rows of the observation windows, int32 [batch * g, observed_width], valid ones first."""
    batch, rows = key.shape[:2]
    lengths = _as_row(frame.history_length)
    if config.observed_selection == "random":
        scores = (position_hash(jnp.arange(rows, dtype=jnp.uint32), lengths) >> 1).astype(jnp.int32)
        scores = jnp.where(jnp.arange(rows) < lengths, scores, -1)[None]
    else:
        first = query[:, 0].reshape(batch, -1, *query.shape[2:])
        products = jnp.einsum("bghd,brhd->bghr", first, key, preferred_element_type=jnp.float32)
        seen = (jnp.arange(rows) < lengths)[:, None]
        weights = jax.nn.softmax(products * config.attention_scale, where=seen, axis=-1)
        scores = jnp.where(seen[:, 0], jnp.mean(weights, axis=2), -1)
    _, chosen = jax.lax.top_k(jax.lax.stop_gradient(scores), frame.observed_width)
    # Rows past the valid ones come last; nobody attends to them.
    valid = jnp.arange(frame.observed_width) < _as_row(frame.observed_length)
    chosen = jnp.minimum(jnp.sort(jnp.where(valid, chosen, rows), axis=-1), rows - 1)
    together = query.shape[0]
    return jnp.broadcast_to(chosen, (batch, together // batch, frame.observed_width)).reshape(together, -1)


def _beside(z_rope: Rope, x_rope: Rope) -> Rope:
    """Rotations of the observation windows' rows, then of the generation windows'."""

    def join(z_part: jax.Array, x_part: jax.Array) -> jax.Array:
        if z_part.ndim > x_part.ndim:
            x_part = x_part[None]
        if x_part.shape[0] != z_part.shape[0] and z_part.ndim == 3:  # rows of each sequence, windows of all alike
            x_part = jnp.tile(x_part, (z_part.shape[0] // x_part.shape[0], 1, 1))
        return jnp.concatenate([z_part, x_part], axis=-2)

    return jax.tree.map(join, z_rope, x_rope)


def position_hash(rows: jax.Array, lengths: jax.Array) -> jax.Array:
    """A hash of row and history length, uint32 [lengths, rows], for rows [rows] and lengths [lengths, 1]."""
    words = rows * np.uint32(0x9E3779B9) + lengths.astype(jnp.uint32) * np.uint32(0x85EBCA6B) + np.uint32(1)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = (words ^ (words >> shift)) * np.uint32(factor)
    return words ^ (words >> 16)


def _as_row(place: PerWindow) -> jax.Array:
    """A number for each of g windows, int32 [g, 1]."""
    return jnp.reshape(jnp.asarray(place, jnp.int32), (-1, 1))
