"""The dual-window block: compress, hidden layers, restore (specification, "One generation window").

Two streams run through a block: x, the generation window, and the history C, which the block compresses to the
observation window's rows z and restores at its end. In every layer both streams read the same keys and values,
so they go through one attention call and, where they stand side by side, one feed-forward call.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.attention import attend, head_multiple
from tlinformer_jax.models.dropout import Dropout
from tlinformer_jax.models.layers import Layer, LayerParams, chain_layers, prepare_layers, project, update
from tlinformer_jax.models.recompute import recomputed
from tlinformer_jax.models.rope import Rope, rope_table
from tlinformer_jax.models.row_chunks import map_rows
from tlinformer_jax.models.selection import beside, choose_rows, observed_part, observed_rope
from tlinformer_jax.models.streams import BlockParams, Following, History, Projected
from tlinformer_jax.models.windows import Place, WindowFrame, fold

# Parts of a layer that draw dropout masks of their own.
SHARED_ATTENTION, CAUSAL_ATTENTION, FEED_FORWARD, CONTEXT_ATTENTION, CONTEXT_FEED_FORWARD = range(5)


def causal_layers(
    layers: Sequence[LayerParams],
    config: ModelConfig,
    x: jax.Array,
    rope: Rope,
    dropout: Dropout | None = None,
    window: int | None = None,
    remat: bool = False,
) -> jax.Array:
    """Ordinary pre-norm causal layers: the baselines', and all layers of a window without history.

    Args:
      layers: parameters of each, from `prepare_layers`.
      config: of the model.
      x: [batch, length, D].
      rope: rotations of x's positions.
      dropout: None outside training.
      window: attend to the last `window` positions only.
      remat: compute each layer again in the backward pass.

    Returns:
      [batch, length, D].
    """

    def layer(params: LayerParams, x: jax.Array, dropout: Dropout | None) -> jax.Array:
        attended = _attend_causal(config, Projected.of(params, x, rope), dropout, window)
        return update(params, x, attended, _part(dropout, FEED_FORWARD))

    scan = config.scans_layers
    return chain_layers(recomputed(layer, config, in_loop=scan) if remat else layer, layers, x, dropout, scan)


def dual_window_block(
    params: BlockParams,
    config: ModelConfig,
    x: jax.Array,
    projected: Projected,
    history: History,
    frame: WindowFrame,
    rope: Rope,
    following: Following | None = None,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, History | None]:
    """One block for one generation window with history, or for g windows that run together.

    Args:
      params: of the block, from `prepare_layers`.
      config: of the model.
      x: the generation window, [batch, m, D]; of g windows, [batch * g, m, D].
      projected: of x under the `compress` layer.
      history: the history stream, its rows starting at position 0.
      frame: where the window stands.
      rope: rotations of positions 0, 1, ... up to the window's end at least.
      following: who reads the restored history; None leaves it out, as after the last block.
      dropout: None outside training.

    Returns:
      x after the block [batch, m, D], and the restored history as the following block reads it, or None.
    """
    x_rope = rope.rows(frame.history_length, x.shape[1])
    z_rope = observed_rope(frame, rope)
    both = compress(params.compress, config, x, projected, history, frame, rope, _part(dropout, 0))
    both_rope = beside(z_rope, x_rope)
    both = chain_layers(
        lambda layer, both, part: hidden_layer(layer, config, both, frame, both_rope, part),
        params.hidden,
        both,
        _part(dropout, 1),
        config.scans_layers,
    )
    z, x = both[:, : frame.observed_width], both[:, frame.observed_width :]

    last = _part(dropout, 2)
    z_key, z_value = project(params.restore, z, z_rope, "kv")
    projected = Projected.of(params.restore, x, x_rope)
    assert projected.query is not None
    attended = _attend_causal(config, projected, last) + _attend_shared(
        config, [projected.query], z_key, z_value, frame.observed_length, _part(last, SHARED_ATTENTION)
    )
    x = update(params.restore, x, attended, _part(last, FEED_FORWARD))
    if following is None:
        return x, None
    return x, restore_context(params.restore, config, history, (z_key, z_value), frame, rope, following, last)


def compress(
    params: LayerParams,
    config: ModelConfig,
    x: jax.Array,
    projected: Projected,
    history: History,
    frame: WindowFrame,
    rope: Rope,
    dropout: Dropout | None,
) -> jax.Array:
    """The compress layer: the observation window's rows, and x, read the whole history.

    Returns:
      both streams side by side [batch, observed_width + m, D].
    """
    width = frame.observed_width
    z = observed_part(frame, history, history.rows, x.shape[0])
    if history.projected.query is not None:
        z_query = observed_part(frame, history, history.projected.query, x.shape[0])
    else:
        (z_query,) = project(params, z, observed_rope(frame, rope), "q")
    assert projected.query is not None
    readers = [z_query] if config.architecture == "tconstformer" else [z_query, projected.query]
    shared = _attend_history(config, readers, history, frame, x.shape[0], _part(dropout, SHARED_ATTENTION))
    causal = _attend_causal(config, projected, dropout)
    x_attended = causal if config.architecture == "tconstformer" else causal + shared[:, width:]
    attended = jnp.concatenate([shared[:, :width], x_attended], axis=1)
    return update(params, jnp.concatenate([z, x], axis=1), attended, _part(dropout, FEED_FORWARD))


def hidden_layer(
    params: LayerParams,
    config: ModelConfig,
    both: jax.Array,
    frame: WindowFrame,
    rope: Rope,
    dropout: Dropout | None,
) -> jax.Array:
    """A hidden layer over both streams side by side [batch, observed_width + m, D]: z reads z; x reads z and x."""
    width = frame.observed_width
    projected = Projected.of(params, both, rope)
    assert projected.query is not None
    z_part = projected.rows(0, width)
    x_part = projected.rows(width, both.shape[1] - width)
    shared = _attend_shared(
        config,
        [projected.query],
        z_part.key,
        z_part.value,
        frame.observed_length,
        _part(dropout, SHARED_ATTENTION),
    )
    causal = _attend_causal(config, x_part, dropout)
    attended = jnp.concatenate([shared[:, :width], shared[:, width:] + causal], axis=1)
    return update(params, both, attended, _part(dropout, FEED_FORWARD))


def restore_context(
    params: LayerParams,
    config: ModelConfig,
    history: History,
    context: tuple[jax.Array, jax.Array],
    frame: WindowFrame,
    rope: Rope,
    following: Following,
    dropout: Dropout | None,
) -> History:
    """The restore layer for the history: every row C reads the compressed context, and what the next block needs of it.

    Rows are independent of each other, so they can be computed in chunks of `frame.history_chunk`.

    Args:
      params: the restore layer's.
      config: of the model.
      history: C, with its queries under the block's `compress` layer.
      context: keys and values of the compressed context, each [batch, observed_width, heads, d_h].
      frame: where the window stands.
      rope: rotations of positions 0, 1, ...
      following: who reads the result.
      dropout: None outside training.
    """
    folded, chunk = context[0].shape[0], frame.history_chunk
    assert history.projected.query is not None
    parts = fold(history.rows, folded), fold(history.projected.query, folded)
    # What is a plain number stays one: kernels are faster where nothing is masked.
    known = None if isinstance(frame.observed_length, jax.Array) else frame.observed_length
    length = frame.history_length
    split = history.split
    if split is not None:
        rope = Rope(split.take(rope.cos, axis=0), split.take(rope.sin, axis=0))
        dropout = _part(dropout, split.index())
        length = split.count(length)
    fixed = (frame.observed_length if known is None else None, rope, dropout)

    def some(shared: Any, part: Any, fixed: Any, number: jax.Array | None) -> tuple[jax.Array, Projected]:
        (params, following, (key, value)), (rows, query), (observed, rope, dropout) = shared, part, fixed
        dropout = dropout if number is None else _part(dropout, number)
        valid = observed if known is None else known
        attended = _attend_shared(config, [query], key, value, valid, _part(dropout, CONTEXT_ATTENTION))
        restored = update(params, rows, attended, _part(dropout, CONTEXT_FEED_FORWARD))
        positions = rope.rows(0 if number is None else number * chunk, rows.shape[1])
        return restored, Projected.of(following.compress, restored, positions, following.parts)

    shared = (params, following, context)
    if not chunk:
        rows, projected = some(shared, parts, fixed, None)
        return History(rows, projected, split)
    # Rows past the history are the future, which no one reads: their chunks are left out.
    filled = -(-jnp.max(jnp.asarray(length, jnp.int32)) // chunk)
    rows, projected = map_rows(some, shared, parts, fixed, chunk, filled)
    return History(rows, projected, split)


def _attend_shared(
    config: ModelConfig,
    queries: Sequence[jax.Array],
    key: jax.Array,
    value: jax.Array,
    key_length: Place,
    dropout: Dropout | None,
) -> jax.Array:
    """Non-causal attention of all `queries`, side by side, to the first `key_length` of the same keys."""
    query = queries[0] if len(queries) == 1 else jnp.concatenate(queries, axis=1)
    if not isinstance(key_length, jax.Array) and np.all(np.asarray(key_length) == key.shape[1]):
        valid = None  # kernels are faster where nothing is masked
    elif np.ndim(key_length):
        valid = jnp.tile(jnp.asarray(key_length, jnp.int32), query.shape[0] // len(key_length))
    else:
        valid = key_length
    return attend(
        query,
        key,
        value,
        key_length=valid,
        dropout=dropout,
        backend=config.attention,
        scale=config.attention_scale,
        never_empty=config.always_observes,
    )


def _attend_history(
    config: ModelConfig,
    queries: Sequence[jax.Array],
    history: History,
    frame: WindowFrame,
    folded: int,
    dropout: Dropout | None,
) -> jax.Array:
    """Non-causal attention of all `queries`, side by side, to the whole history; `folded` is the batch of x."""
    key, value, split = history.projected.key, history.projected.value, history.split
    if split is None:
        key, value = fold(key, folded), fold(value, folded)
        return _attend_shared(config, queries, key, value, frame.history_length, dropout)
    # Each device reads its own rows. Only XLA's attention has a log-sum-exp that can be differentiated.
    query = jnp.concatenate(queries, axis=1)
    output, lse = attend(
        query,
        key,
        value,
        key_length=split.count(frame.history_length),
        dropout=_part(dropout, split.index()),
        backend="xla",
        return_lse=True,
        scale=config.attention_scale,
    )
    return split.merge(output.astype(jnp.float32), lse).astype(query.dtype)


def _attend_causal(
    config: ModelConfig, projected: Projected, dropout: Dropout | None, window: int | None = None
) -> jax.Array:
    """Causal attention of rows to themselves."""
    assert projected.query is not None
    return attend(
        projected.query,
        projected.key,
        projected.value,
        causal=True,
        window=window,
        dropout=_part(dropout, CAUSAL_ATTENTION),
        backend=config.attention,
        scale=config.attention_scale,
    )


def _part(dropout: Dropout | None, number: jax.Array | int) -> Dropout | None:
    """An independent dropout for part `number`, or None."""
    return None if dropout is None else dropout.fold_in(number)


class DualWindowBlock(nn.Module):
    """One dual-window block as a Flax module, for use in any model.

    The block maps a generation window x and its history C to the next x and C. Positions run 0 .. n - 1 over
    the history and n .. n + m - 1 over the window.

    Attributes:
      config: of the model; `vocab_size`, `num_blocks` (but for the initial scale), `generation_window` and
        `history_chunk` do not matter here: the window is as long as the x it is given.

    Example:
      >>> block = DualWindowBlock(ModelConfig(d_model=64, num_heads=4, history_window=32))
      >>> variables = block.init(jax.random.key(0), x, history)
      >>> x, history = block.apply(variables, x, history)
    """

    config: ModelConfig

    def setup(self) -> None:
        self.compress_layer = Layer(self.config, name="compress")
        self.hidden_layers = [Layer(self.config, name=f"hidden_{i}") for i in range(self.config.hidden_depth)]
        self.restore_layer = Layer(self.config, name="restore")

    def parameters(self) -> BlockParams:
        """The block's parameters as a typed pytree."""
        return BlockParams(self.compress_layer(), tuple(layer() for layer in self.hidden_layers), self.restore_layer())

    def __call__(
        self, x: jax.Array, history: jax.Array | None = None, *, restore: bool = True, train: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Applies the block.

        Args:
          x: the generation window, [batch, m, D], m >= 1.
          history: C, [batch, n, D]; None or n = 0 where there is none.
          restore: whether to return the restored history.
          train: apply dropout, drawn from the rng stream 'dropout'.

        Returns:
          x [batch, m, D], and C' [batch, n, D] (None if `restore` is false or there is no history).
        """
        config = self.config
        params = prepare_layers(
            self.parameters(),
            config.compute_dtype,
            head_multiple(config.compute_dtype, config.attention, config.head_padding),
        )
        x = x.astype(config.compute_dtype)
        dropout = Dropout.by_key(self.make_rng("dropout"), config.dropout) if train and config.dropout else None
        length = 0 if history is None else history.shape[1]
        rope = rope_table(jnp.arange(length + x.shape[1]), config.head_dim)
        if history is None or length == 0:
            return causal_layers(params.layers(), config, x, rope, dropout), history if restore else None
        observed = config.observed_rows(length)
        frame = WindowFrame(length, length - max(observed, 1), observed, max(observed, 1))
        history = history.astype(x.dtype)
        known = History(history, Projected.of(params.compress, history, rope.rows(0, length)))
        projected = Projected.of(params.compress, x, rope.rows(length, x.shape[1]))
        assert projected.query is not None
        frame = choose_rows(config, frame, projected.query, known.projected.key)
        # Nobody follows here: what is projected for that is not read.
        following = Following(params.compress, "kv") if restore else None
        x, restored = dual_window_block(params, config, x, projected, known, frame, rope, following, dropout)
        return x, None if restored is None else restored.rows
