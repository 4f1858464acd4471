"""The paper's block, section 3: a generation window x and a compressed history z, layer by layer.

    compress:  z  = update(C[h:], attend(Qc[h:], Kc, Vc))
               x  = update(x, attend_causal(Qx, Kx, Vx) + attend(Qx, Kc, Vc))
    hidden:    z' = update(z, attend(Qz, Kz, Vz))
               x' = update(x, attend_causal(Qx, Kx, Vx) + attend(Qx, Kz, Vz))
    restore:   C' = update(C, attend(Qc, Kz, Vz))
               x' = update(x, attend_causal(Qx, Kx, Vx) + attend(Qx, Kz, Vz))

C is the history, of n rows; z the observation window, made of the rows of C from h on; x the generation window. Q, K
and V are a stream's projections under the layer (`Stream.of`), and `update` is the rest of the layer, row by row
(`layers.update`). Without history C and z have no rows, attention to no keys is 0, and nothing is compiled for them.

Where a sample holds several documents, each stream knows its rows' (`Stream.documents`), and in all of these reads a
query sees the keys of its own document only. Positions need no new start: rotations tell distances, and those within a
document are the same wherever it begins.

Training, evaluation, `prefill` and `slide` all call the three functions below. How C is kept is its own matter: `read`
is attend(Q, Kc, Vc), and `restore` maps the last equation over the rows of C (`streams.History`: all at once, in
chunks, or split over devices; `decoding.history`: beside a KV cache).

Where z and x read the same keys they lie side by side, and share one call of `attend` and of `update`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.attention import attend, head_multiple
from tlinformer_jax.models.layers import Dropout, Layer, LayerParams, chain_layers, part_of, prepare_layers, update
from tlinformer_jax.models.rope import rope_table
from tlinformer_jax.models.streams import (
    History,
    PlacedWindow,
    Stream,
    apart,
    attention_options,
    beside,
    observed_stream,
    place_window,
    project_both,
    side_by_side,
    with_documents,
)
from tlinformer_jax.models.windows import WindowFrame

# Parts of a layer that draw dropout masks of their own.
SHARED_ATTENTION, CAUSAL_ATTENTION, FEED_FORWARD, CONTEXT_ATTENTION, CONTEXT_FEED_FORWARD = range(5)
# Rows of z, of x, and of C.
Zs = Float[Array, "batch width D"]
Xs = Float[Array, "batch m D"]
Cs = Float[Array, "batch n D"]


@runtime_checkable
class ReadableHistory(Protocol):
    """C as the equations need it; see `streams.History`."""

    def read(self, query: Array, config: ModelConfig, dropout: Dropout | None, *readers: Stream) -> Array:
        """attend(Q, Kc, Vc); the queries are those of `readers`."""

    def restore(
        self, restore_rows: Callable[..., Array], shared: Any, fixed: Any, next_layer: LayerParams, parts: str
    ) -> Any:
        """C' of every row by `restore_rows`, ready for the layer that reads it next."""


def compress(
    layer: LayerParams, config: ModelConfig, C: ReadableHistory, z: Stream, x: Stream, dropout: Dropout | None = None
) -> tuple[Zs, Xs]:
    """The first layer, which compresses the history. Of z, rows h .. n - 1 of C, it takes rows and queries.

        z = update(C[h:], attend(Qc[h:], Kc, Vc))
        x = update(x, attend_causal(Qx, Kx, Vx) + attend(Qx, Kc, Vc))

    TConstFormer's x does not read C.
    """
    causal = attention_options(config, part_of(dropout, CAUSAL_ATTENTION), x, x)
    x_attends = attend(x.Q, x.K, x.V, causal=True, **causal)
    if config.architecture == "tconstformer":
        z_attends = C.read(z.Q, config, part_of(dropout, SHARED_ATTENTION), z)
    else:
        both = C.read(beside(z.Q, x.Q), config, part_of(dropout, SHARED_ATTENTION), z, x)
        z_attends, x_reads = apart(both, z.Q.shape[1])
        x_attends += x_reads
    return _update(layer, (z.rows, x.rows), (z_attends, x_attends), dropout)


def hidden(
    layer: LayerParams, config: ModelConfig, z: Stream, x: Stream, dropout: Dropout | None = None
) -> tuple[Zs, Xs]:
    """A layer between the first and the last.

    z' = update(z, attend(Qz, Kz, Vz))
    x' = update(x, attend_causal(Qx, Kx, Vx) + attend(Qx, Kz, Vz))
    """
    causal = attention_options(config, part_of(dropout, CAUSAL_ATTENTION), x, x)
    shared = attention_options(config, part_of(dropout, SHARED_ATTENTION), z, z, x)
    z_attends, x_reads = apart(attend(beside(z.Q, x.Q), z.K, z.V, **shared), z.Q.shape[1])
    x_attends = attend(x.Q, x.K, x.V, causal=True, **causal) + x_reads
    return _update(layer, (z.rows, x.rows), (z_attends, x_attends), dropout)


def restore(
    layer: LayerParams,
    config: ModelConfig,
    C: ReadableHistory,
    z: Stream,
    x: Stream,
    later: Sequence["BlockParams"] = (),
    dropout: Dropout | None = None,
) -> tuple[Any, Xs]:
    """The last layer, which gives the history back its length.

        C' = update(C, attend(Qc, Kz, Vz))
        x' = update(x, attend_causal(Qx, Kx, Vx) + attend(Qx, Kz, Vz))

    Qc are the queries under the block's `compress`. Without `later` blocks, which read C', it is None.
    """
    causal = attention_options(config, part_of(dropout, CAUSAL_ATTENTION), x, x)
    shared = attention_options(config, part_of(dropout, SHARED_ATTENTION), z, x)
    x_attends = attend(x.Q, x.K, x.V, causal=True, **causal) + attend(x.Q, z.K, z.V, **shared)
    x_rows = update(layer, x.rows, x_attends, part_of(dropout, FEED_FORWARD))
    if not later:
        return None, x_rows
    parts = "qkv" if len(later) > 1 else "kv"  # the last block asks nothing of C but what z asks
    restore_some = functools.partial(restore_rows, config, z.never_empty)
    read, fixed = (layer, z.K, z.V), (z.length, z.documents, dropout)
    return C.restore(restore_some, read, fixed, later[0].compress, parts), x_rows


def restore_rows(
    config: ModelConfig,
    never_empty: bool,
    C: Cs,
    Qc: Array,
    shared: Any,
    fixed: Any,
    documents: Array | None = None,
    attend: Callable[..., Array] = attend,
) -> Cs:
    """C' = update(C, attend(Qc, Kz, Vz)), for any rows of C: they do not read each other.

    `shared` is (the layer, Kz, Vz), `fixed` (valid rows of z, its documents, dropout), `documents` those of C; `attend`
    is `attention.attend`, or what else computes it.
    """
    (layer, Kz, Vz), (length, read, dropout) = shared, fixed
    z = Stream(None, K=Kz, length=length, never_empty=never_empty, documents=read)
    options = attention_options(config, part_of(dropout, CONTEXT_ATTENTION), z, Stream(C, documents=documents))
    return update(layer, C, attend(Qc, Kz, Vz, **options), part_of(dropout, CONTEXT_FEED_FORWARD))


def _update(
    layer: LayerParams, rows: tuple[Zs, Xs], attended: tuple[Array, Array], dropout: Dropout | None
) -> tuple[Zs, Xs]:
    """(update(z, ...), update(x, ...)), side by side."""
    return side_by_side(
        lambda rows, attended: update(layer, rows, attended, part_of(dropout, FEED_FORWARD)), rows, attended
    )


@flax.struct.dataclass
class BlockParams:
    """Parameters of one block."""

    compress: LayerParams
    hidden: tuple[LayerParams, ...]
    restore: LayerParams

    def layers(self) -> tuple[LayerParams, ...]:
        """All layers of the block in order."""
        return (self.compress, *self.hidden, self.restore)


def dual_window_block(
    params: BlockParams,
    config: ModelConfig,
    C: History,
    x: Stream,
    window: PlacedWindow,
    later: Sequence[BlockParams] = (),
    dropout: Dropout | None = None,
) -> tuple[History | None, Xs]:
    """One block for one generation window, or for g windows that run together.

    Args:
      params: of the block, from `prepare_layers`.
      config: of the model.
      C: the history, from position 0 on, projected by `compress`.
      x: the windows' rows, projected likewise; of g windows [batch * g, m, D].
      window: where they stand.
      later: the blocks that follow, which read C'.
      dropout: None outside training.
    """
    z = observed_stream(params.compress, C, window, x.rows.shape[0])
    z, x = with_documents(window.frame, z, x)
    valid, never_empty = window.frame.observed_length, config.always_observes
    rows = compress(params.compress, config, C, z, x, part_of(dropout, 0))

    def hidden_layer(rows: tuple[Zs, Xs], item: tuple[LayerParams, Dropout | None]) -> tuple[Any, None]:
        layer, dropout = item
        z, x = with_documents(window.frame, *project_both(layer, *rows, window.rope, valid, never_empty))
        return hidden(layer, config, z, x, dropout), None

    z_rows, x_rows = chain_layers(hidden_layer, params.hidden, rows, part_of(dropout, 1), config.plan().scan_layers)
    z = Stream.of(params.restore, z_rows, window.z_rope, "kv", valid, never_empty)
    z, x = with_documents(window.frame, z, Stream.of(params.restore, x_rows, window.x_rope))
    return restore(params.restore, config, C, z, x, later, part_of(dropout, 2))


class DualWindowBlock(nn.Module):
    """One dual-window block as a Flax module, for use in any model.

    It maps a generation window x and its history C to the next x and C. Positions run 0 .. n - 1 over the
    history and n .. n + m - 1 over the window, which is as long as the x it is given. Of the configuration
    `vocab_size`, `generation_window` and `num_blocks` (but for the initial scale) do not matter here.

    Examples:
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
        """x, and C' (None if `restore` is false or there is no history).

        Args:
          x: the generation window, [batch, m, D], m >= 1.
          history: C, [batch, n, D]; None or n = 0 where there is none.
          restore: whether to return C'.
          train: apply dropout, drawn from the rng stream 'dropout'.
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
        placed = place_window(WindowFrame(length, length - width, observed, width), rope, x.shape[1])
        # No block follows: what is projected for it is not read.
        later = (params,) if restore and history is not None else ()
        restored, x = dual_window_block(params, config, C, window, placed, later, dropout)
        return x, None if restored is None else restored.rows
