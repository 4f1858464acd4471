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

import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.windows import PerWindow, WindowFrame


def chosen_rows(config: ModelConfig, frame: WindowFrame, query: jax.Array, key: jax.Array) -> jax.Array:
    """Rows of the observation windows, int32 [batch * g, observed_width], valid ones first.

    Args:
      config: of the model.
      frame: of a window, or of g windows that run together.
      query: of the windows' tokens under block 0's `compress` layer, [batch * g, m, heads, d_h].
      key: of the history under the same, [batch, rows, heads, d_h].
    """
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


def position_hash(rows: jax.Array, lengths: jax.Array) -> jax.Array:
    """A hash of row and history length, uint32 [lengths, rows], for rows [rows] and lengths [lengths, 1]."""
    words = rows * np.uint32(0x9E3779B9) + lengths.astype(jnp.uint32) * np.uint32(0x85EBCA6B) + np.uint32(1)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        words = (words ^ (words >> shift)) * np.uint32(factor)
    return words ^ (words >> 16)


def _as_row(place: PerWindow) -> jax.Array:
    """A number for each of g windows, int32 [g, 1]."""
    return jnp.reshape(jnp.asarray(place, jnp.int32), (-1, 1))
