"""The paper's block (section 3): three kinds of layer, two equations each.

    compress:  z  = update(C[h:], attend(Qc[h:], Kc, Vc))
               x  = update(x, attend_causal(Qx, Kx, Vx) + attend(Qx, Kc, Vc))
    hidden:    z' = update(z, attend(Qz, Kz, Vz))
               x' = update(x, attend_causal(Qx, Kx, Vx) + attend(Qx, Kz, Vz))
    restore:   C' = update(C, attend(Qc, Kz, Vz))
               x' = update(x, attend_causal(Qx, Kx, Vx) + attend(Qx, Kz, Vz))

x is the generation window. C is the history: all n rows before x. z is the observation window, a compressed history: it
starts as C[h:], the last W_oh rows of C. A layer projects each stream to Q, K and V, with rotary positions
(`Stream.of`). `attend` is softmax attention (`attention.attend`). `update` is the rest of the layer, row by row: output
projection, feed-forward and both residuals (`layers.update`).

The functions `compress`, `hidden` and `restore` below are these equations; with `model.causal_history` those of
`models.causal_history` take their place (`equations`), and block 0's `compress` of a whole sequence is
`causal_history.compressed`. Training, evaluation, `prefill` and `slide` all call them, but
store C in different ways, so C has methods (`history.ReadableHistory`): `read` is attend(Q, Kc, Vc), and `restore`
computes C' for every row. `history.History` restores all rows at once, in chunks, or split over devices;
`decoding.history` works from a KV cache.

Rows of z and x are concatenated ("side by side") to share one call of `update`, and of `attend` if they read the same
keys. The first window has no history: C and z have no rows, which compiles to nothing, and attention to no keys is 0.

If a sample packs several documents, a query sees only keys of its own document (`Stream.documents`). Positions do not
restart with a document: rotary positions encode distances, which do not depend on where a document begins.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models import causal_history
from tlinformer_jax.models.attention import attend, head_multiple
from tlinformer_jax.models.history import History, ReadableHistory, observed_stream, restored_history
from tlinformer_jax.models.layers import Dropout, Layer, LayerParams, chain_layers, part_of, prepare_layers, update
from tlinformer_jax.models.rope import rope_table
from tlinformer_jax.models.streams import (
    CAUSAL_ATTENTION,
    FEED_FORWARD,
    SHARED_ATTENTION,
    PlacedWindow,
    Stream,
    XRows,
    ZRows,
    apart,
    attention_options,
    beside,
    place_window,
    project_both,
    update_both,
    with_documents,
)
from tlinformer_jax.models.windows import WindowFrame


def compress(
    layer: LayerParams, config: ModelConfig, C: ReadableHistory, z: Stream, x: Stream, dropout: Dropout | None = None
) -> tuple[ZRows, XRows]:
    """Runs the first layer, which compresses the history.

        z = update(C[h:], attend(Qc[h:], Kc, Vc))
        x = update(x, attend_causal(Qx, Kx, Vx) + attend(Qx, Kc, Vc))

    The argument z contains C[h:] and Qc[h:]. In TConstFormer x does not read C.
    """
    causal = attention_options(config, part_of(dropout, CAUSAL_ATTENTION), x, x, causal=True)
    x_attends = attend(x.Q, x.K, x.V, **causal)
    if config.architecture == "tconstformer":
        z_attends = C.read(z.Q, config, part_of(dropout, SHARED_ATTENTION), z)
    else:
        both = C.read(beside(z.Q, x.Q), config, part_of(dropout, SHARED_ATTENTION), z, x)
        z_attends, x_reads = apart(both, z.Q.shape[1])
        x_attends += x_reads
    return update_both(layer, (z.rows, x.rows), (z_attends, x_attends), dropout)


def hidden(
    layer: LayerParams, config: ModelConfig, z: Stream, x: Stream, dropout: Dropout | None = None
) -> tuple[ZRows, XRows]:
    """Runs a layer between the first and the last.

        z' = update(z, attend(Qz, Kz, Vz))
        x' = update(x, attend_causal(Qx, Kx, Vx) + attend(Qx, Kz, Vz))

    z and x read the compressed history z, not C.
    """
    causal = attention_options(config, part_of(dropout, CAUSAL_ATTENTION), x, x, causal=True)
    reading_z = attention_options(config, part_of(dropout, SHARED_ATTENTION), z, z, x)
    z_attends, x_reads = apart(attend(beside(z.Q, x.Q), z.K, z.V, **reading_z), z.Q.shape[1])
    x_attends = attend(x.Q, x.K, x.V, **causal) + x_reads
    return update_both(layer, (z.rows, x.rows), (z_attends, x_attends), dropout)


def restore(
    layer: LayerParams,
    config: ModelConfig,
    C: ReadableHistory,
    z: Stream,
    x: Stream,
    later: Sequence["BlockParams"] = (),
    dropout: Dropout | None = None,
) -> tuple[Any, XRows]:
    """Runs the last layer, which restores the history to its full length.

        C' = update(C, attend(Qc, Kz, Vz))
        x' = update(x, attend_causal(Qx, Kx, Vx) + attend(Qx, Kz, Vz))

    Qc are the queries of C from the block's `compress` layer. C' is None if no `later` block reads it.
    """
    causal = attention_options(config, part_of(dropout, CAUSAL_ATTENTION), x, x, causal=True)
    reading_z = attention_options(config, part_of(dropout, SHARED_ATTENTION), z, x)
    x_attends = attend(x.Q, x.K, x.V, **causal) + attend(x.Q, z.K, z.V, **reading_z)
    x_rows = update(layer, x.rows, x_attends, part_of(dropout, FEED_FORWARD))
    return restored_history(layer, config, C, z, [block.compress for block in later], dropout), x_rows


class Equations(NamedTuple):
    """A block's three kinds of layer, with the signatures of the functions above."""

    compress: Callable[..., tuple[ZRows, XRows]]
    hidden: Callable[..., tuple[ZRows, XRows]]
    restore: Callable[..., tuple[Any, XRows]]
    z_parts: tuple[str, str]  # parts of z that `compress` and `restore` need, see `Stream.of`


def equations(config: ModelConfig) -> Equations:
    """Returns the equations that the model's blocks use."""
    if config.causal_history:
        return Equations(causal_history.compress, causal_history.hidden, causal_history.restore, ("qkv", "qkv"))
    return Equations(compress, hidden, restore, ("q", "kv"))


@flax.struct.dataclass
class BlockParams:
    """Parameters of one block."""

    compress: LayerParams
    hidden: tuple[LayerParams, ...]
    restore: LayerParams

    def layers(self) -> tuple[LayerParams, ...]:
        """Returns all layers in order."""
        return (self.compress, *self.hidden, self.restore)


def dual_window_block(
    params: BlockParams,
    config: ModelConfig,
    C: History,
    x: Stream,
    window: PlacedWindow,
    later: Sequence[BlockParams] = (),
    dropout: Dropout | None = None,
) -> tuple[History | None, XRows]:
    """Runs one block on one generation window, or on g windows together; returns C' and the next x.

    Args:
      params: the block's parameters, from `prepare_layers`.
      C: the history from position 0 on, projected by `params.compress`, or `compressed` by it.
      x: the windows' rows, the same way; [batch * g, m, D] for g windows.
      window: the windows' positions and rotations.
      later: the blocks that follow; C' is None if there are none.
      dropout: None outside training.
    """
    compress, hidden, restore, (first_parts, last_parts) = equations(config)
    C = dataclasses.replace(C, observed_start=window.frame.observed_start)
    z = observed_stream(params.compress, C, window, x.rows.shape[0], first_parts)
    z, x = with_documents(window.frame, z, x)
    valid, never_empty = window.frame.observed_length, config.always_observes and window.frame.never_empty
    rows = (z.rows, x.rows) if C.compressed else compress(params.compress, config, C, z, x, part_of(dropout, 0))

    def hidden_layer(rows: tuple[ZRows, XRows], item: tuple[LayerParams, Dropout | None]) -> tuple[Any, None]:
        layer, dropout = item
        z, x = with_documents(window.frame, *project_both(layer, *rows, window.rope, valid, never_empty))
        return hidden(layer, config, z, x, dropout), None

    z_rows, x_rows = chain_layers(hidden_layer, params.hidden, rows, part_of(dropout, 1), config.plan().scan_layers)
    z = Stream.of(params.restore, z_rows, window.z_rope, last_parts, valid, never_empty)
    z, x = with_documents(window.frame, z, Stream.of(params.restore, x_rows, window.x_rope))
    return restore(params.restore, config, C, z, x, later, part_of(dropout, 2))


class DualWindowBlock(nn.Module):
    """One dual-window block as a Flax module, for use in any model.

    The block maps a generation window x of m rows and its history C of n rows to the next x and C. Positions are
    0 .. n - 1 in the history and n .. n + m - 1 in the window. The block ignores `config.vocab_size`,
    `config.window_overlap`, `config.token_shift` and `config.key_taps`; `config.generation_window` matters only with
    `config.causal_history`, where it says which windows the rows of the history were in; `config.num_blocks` only
    affects the scale of the initial weights. `taps` declares parameters that only the language model uses.

    Examples:
      >>> block = DualWindowBlock(ModelConfig(d_model=64, num_heads=4, history_window=32))
      >>> variables = block.init(jax.random.key(0), x, history)
      >>> x, history = block.apply(variables, x, history)
    """

    config: ModelConfig
    taps: int = 0

    def setup(self) -> None:
        self.compress_layer = Layer(self.config, self.taps, name="compress")
        self.hidden_layers = [Layer(self.config, name=f"hidden_{i}") for i in range(self.config.hidden_depth)]
        self.restore_layer = Layer(self.config, name="restore")

    def parameters(self) -> BlockParams:
        """Returns the block's parameters as a typed pytree."""
        return BlockParams(self.compress_layer(), tuple(layer() for layer in self.hidden_layers), self.restore_layer())

    def __call__(
        self, x: jax.Array, history: jax.Array | None = None, *, restore: bool = True, train: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns the next x, and C' (None if `restore` is false or `history` is None).

        Args:
          x: the generation window, [batch, m, D], m >= 1.
          history: C, [batch, n, D]; None or n = 0 if there is no history.
          restore: whether to return C'.
          train: whether to apply dropout, drawn from the rng stream 'dropout'.
        """
        config = self.config
        params = prepare_layers(
            self.parameters(),
            config.compute_dtype,
            head_multiple(config.compute_dtype, config.attention),
        )
        x = x.astype(config.compute_dtype)
        dropout = Dropout.by_key(self.make_rng("dropout"), config.dropout) if train and config.dropout else None
        length = 0 if history is None else history.shape[1]
        rows = x[:, :0] if history is None else history.astype(x.dtype)
        rope = rope_table(jnp.arange(length + x.shape[1]), config.head_dim, config.longest_wavelength)
        observed = config.observed_rows(length)
        width = max(observed, min(length, 1))
        C = History.whole(params.compress, rows, rope)
        window = Stream.of(params.compress, x, rope.rows(length, x.shape[1]))
        placed = place_window(WindowFrame(length, length - observed, observed, width), rope, x.shape[1])
        # C' is only computed for a block that follows. The stand-in's projections of C' are not used.
        later = (params,) if restore and history is not None else ()
        if later and config.causal_history:
            C = causal_history.with_later((params, params), config, C, rope, part_of(dropout, 3))
        restored, x = dual_window_block(params, config, C, window, placed, later, dropout)
        if restored is None or restored.z is None:
            return x, None if restored is None else restored.rows
        return x, jnp.concatenate([restored.rows[:, : length - observed], restored.z.rows[:, :observed]], axis=1)
