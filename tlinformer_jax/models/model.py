"""The language model: tied embedding, one of the architectures, final LayerNorm, head; and the baselines' layers."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tlinformer_jax.config.model import HYBRID_PERIOD, ModelConfig
from tlinformer_jax.errors import DataError
from tlinformer_jax.models.attention import attend, head_multiple
from tlinformer_jax.models.block import BlockParams, DualWindowBlock
from tlinformer_jax.models.delta import DeltaLayer, DeltaParams, DeltaState, delta_mixer
from tlinformer_jax.models.key_rows import NO_TOKEN, embedded
from tlinformer_jax.models.layers import (
    INIT_STD,
    Dropout,
    Embedded,
    Layer,
    LayerParams,
    ResidualParams,
    chain_layers,
    layer_norm,
    part_of,
    prepare_layers,
    project,
    update,
)
from tlinformer_jax.models.rope import rope_table
from tlinformer_jax.models.streams import CAUSAL_ATTENTION, FEED_FORWARD, Stream, attention_options
from tlinformer_jax.models.tlinformer import forward_windows
from tlinformer_jax.parallel.sharding import constrain_batch, gathered

# In half precision the head's product pads the vocabulary to a multiple of this: loads of the matrix units are then
# aligned, and XLA need not pad the logits by a copy.
VOCABULARY_MULTIPLE = 128


@flax.struct.dataclass
class ModelParams:
    """A model's parameters as a typed pytree."""

    embedding: jax.Array  # [V, D]; also the output head
    blocks: tuple[BlockParams, ...]  # windowed architectures only
    layers: tuple[LayerParams | DeltaParams, ...]  # baselines only
    norm_scale: jax.Array  # [D]. Final LayerNorm
    norm_bias: jax.Array  # [D]
    shift: jax.Array | None = None  # [D]; None without config.token_shift; see `models.key_rows`


class LanguageModel(nn.Module):
    """A causal language model of any architecture.

    `model.init(rng, tokens)` returns the variables, `model.apply(variables, tokens)` the logits. With
    `train=True` and a positive `config.dropout`, `apply` needs `rngs={"dropout": key}`.

    Attributes:
      config: shape and numerics.
    """

    config: ModelConfig

    def setup(self) -> None:
        config = self.config
        dtype = jnp.float32
        self.embedding = self.param(
            "embedding", nn.initializers.normal(INIT_STD), (config.vocab_size, config.d_model), dtype
        )
        windowed = config.windowed
        self.blocks = [
            DualWindowBlock(config, taps=config.key_taps if block else 0)
            for block in range(config.num_blocks if windowed else 0)
        ]
        kinds = [
            Layer if config.attends(index) else DeltaLayer for index in range(0 if windowed else config.num_layers)
        ]
        self.layers = [kind(config) for kind in kinds]
        self.norm_scale = self.param("norm_scale", nn.initializers.ones, (config.d_model,), dtype)
        self.norm_bias = self.param("norm_bias", nn.initializers.zeros, (config.d_model,), dtype)
        shifts = config.token_shift
        self.shift = self.param("shift", nn.initializers.zeros, (config.d_model,), dtype) if shifts else None

    def parameters(self) -> ModelParams:
        """Returns the parameters as a typed pytree, in their stored dtype."""
        return ModelParams(
            embedding=self.embedding,
            blocks=tuple(block.parameters() for block in self.blocks),
            layers=tuple(layer() for layer in self.layers),
            norm_scale=self.norm_scale,
            norm_bias=self.norm_bias,
            shift=self.shift,
        )

    def __call__(
        self,
        tokens: jax.Array | None = None,
        *,
        train: bool = False,
        inputs_embeds: jax.Array | None = None,
        documents: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the logits of the next token at every position.

        Args:
          tokens: integer [batch, length], both >= 1, in [0, vocab_size); other ids give NaN.
          train: whether to apply dropout.
          inputs_embeds: embeddings [batch, length, D], instead of tokens. `config.token_shift` and `config.key_taps`
            apply to them as they do to embedded tokens.
          documents: each token's document in a packed sample, int32 [batch, length], counted from 0; a token sees only
            its own document. Not supported by architectures with Gated DeltaNet.

        Returns:
          float32 [batch, length, vocab_size].

        Raises:
          DataError: if an input has the wrong shape or type, or is empty.
        """
        hidden = self.hidden_states(tokens, train=train, inputs_embeds=inputs_embeds, documents=documents)
        return output_logits(hidden, self.embedding)

    def hidden_states(
        self,
        tokens: jax.Array | None = None,
        *,
        train: bool = False,
        inputs_embeds: jax.Array | None = None,
        start: int = 0,
        documents: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the input of the head at positions start, ...: [batch, length - start, D]; see `__call__`.

        Raises:
          DataError: as `__call__`, and if `start` is not a position of the sequence.
        """
        config = self.config
        check_inputs(config, tokens, inputs_embeds, documents, start)
        params = self.parameters()
        if inputs_embeds is None:
            assert tokens is not None  # check_inputs
            embeddings = embed(params, config, tokens, documents=documents)
        else:
            rows = constrain_batch(inputs_embeds.astype(config.compute_dtype))
            embeddings = embedded(params.shift, taps_of(params.blocks), rows, documents=documents)
        if self.is_initializing():  # all parameters are declared by now; the forward pass is not needed
            return embeddings.rows
        dropout = Dropout.by_key(self.make_rng("dropout"), config.dropout) if train and config.dropout else None
        return hidden_states(prepare_params(params, config), config, embeddings, dropout, start)


def build_model(config: ModelConfig) -> LanguageModel:
    """Returns the model for a configuration."""
    return LanguageModel(config)


def parameter_shapes(config: ModelConfig) -> dict[str, Any]:
    """Returns shape and dtype of each parameter of a model, in the tree of the variables' `params`."""
    return jax.tree.map(lambda leaf: leaf, _traced_shapes(config))  # the caller may change the tree


@functools.lru_cache(maxsize=64)
def _traced_shapes(config: ModelConfig) -> dict[str, Any]:
    """`parameter_shapes`, traced once for each configuration: a command asks several times."""
    model = build_model(config)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), method=LanguageModel.parameters))["params"]


def prepare_params(params: ModelParams, config: ModelConfig) -> ModelParams:
    """Prepares blocks and layers by `prepare_layers`, once for all windows."""
    multiple = head_multiple(config.compute_dtype, config.attention)
    blocks, layers = prepare_layers((params.blocks, params.layers), config.compute_dtype, multiple)
    return dataclasses.replace(params, blocks=blocks, layers=layers)


def embed(
    params: ModelParams,
    config: ModelConfig,
    tokens: Int[Array, "batch length"],
    before: Sequence[Int[Array, "batch length"]] | None = None,
    documents: Int[Array, "batch whole"] | None = None,
) -> Embedded:
    """Embeds tokens in the compute dtype; ids outside the vocabulary become NaN.

    Args:
      before: ids 1, 2, ..., `config.key_reach` positions before each token (see `tokens_before`), for the token shift
        and key taps; None if `tokens` begin at position 0.
      documents: see `Embedded`.
    """

    table = gathered(params.embedding)

    def look_up(ids: Array) -> Array:
        # jnp.take returns NaN for ids past the table but counts negative ids from its end, so these are moved past it.
        rows = jnp.take(table, jnp.where(ids < 0, config.vocab_size, ids), axis=0)
        return constrain_batch(rows.astype(config.compute_dtype))

    rows = look_up(tokens)
    earlier = None
    if before is not None:
        earlier = [jnp.where((ids == NO_TOKEN)[..., None], 0, look_up(ids)) for ids in before]
    return embedded(params.shift, taps_of(params.blocks), rows, earlier, documents)


def taps_of(blocks: Sequence[BlockParams]) -> tuple[Array, ...]:
    """Returns the key taps' parameter of each later block; empty without `config.key_taps`."""
    return tuple(block.compress.taps for block in blocks if block.compress.taps is not None)


def hidden_states(
    params: ModelParams,
    config: ModelConfig,
    embeddings: Embedded,
    dropout: Dropout | None = None,
    start: int = 0,
) -> Float[Array, "batch rest D"]:
    """Returns the hidden states after the final LayerNorm, which the head multiplies with the embedding.

    Args:
      params: from `prepare_params`.
      embeddings: embeddings of a whole sequence, in the compute dtype.
      dropout: None outside training.
      start: first position to return; generation windows before it are not run.
    """
    if config.windowed:
        first, rest = divmod(start, config.generation_window)
        hidden = forward_windows(params.blocks, config, embeddings, dropout, first)[:, rest:]
    else:
        hidden = forward_layers(params.layers, config, embeddings, dropout)[:, start:]
    return layer_norm(hidden, params.norm_scale, params.norm_bias)


def output_logits(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
    """Returns logits, float32 [..., V], of hidden states [..., D]: a product in their dtype, summed in float32."""
    return jnp.einsum("...d,vd->...v", hidden, embedding.astype(hidden.dtype), preferred_element_type=jnp.float32)


def padded_vocabulary(vocab_size: int, dtype: Any) -> int:
    """Returns the number of rows to which the head is padded for products with many tokens in `dtype`."""
    half = jnp.dtype(dtype).itemsize < 4
    return vocab_size + (-vocab_size % VOCABULARY_MULTIPLE if half else 0)


def check_inputs(config: ModelConfig, tokens: Any, inputs_embeds: Any, documents: Any = None, start: int = 0) -> None:
    """Raises a DataError if the model cannot take these inputs."""
    if (tokens is None) == (inputs_embeds is None):
        raise DataError("model inputs: give either tokens or inputs_embeds")
    if tokens is not None:
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise DataError(f"tokens {tokens.dtype}{list(tokens.shape)}: must be integers [batch, length]")
    elif inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != config.d_model:
        raise DataError(
            f"inputs_embeds {list(inputs_embeds.shape)}: must be [batch, length, model.d_model = {config.d_model}]"
        )
    batch, length = (tokens if tokens is not None else inputs_embeds).shape[:2]
    if length < 1:
        raise DataError(f"sequence of length {length}: must hold at least one token")
    if batch < 1:
        raise DataError(f"batch of {batch} sequences: must hold at least one")
    if not 0 <= start < length:
        raise DataError(f"start = {start}: must be a position of the sequence, 0 .. {length - 1}")
    if documents is None:
        return
    if config.recurrent:
        raise DataError(f"documents: must be None for model.architecture = {config.architecture!r}")
    # Too short an array would be padded, and its last tokens would silently join the first document.
    if documents.shape != (batch, length) or not jnp.issubdtype(documents.dtype, jnp.integer):
        given = f"documents {documents.dtype}{list(documents.shape)}"
        raise DataError(f"{given}: must be integers [batch, length] = [{batch}, {length}], like the tokens")


def attention_window(config: ModelConfig) -> int | None:
    """Returns how many positions a baseline's query sees, including its own; None for all up to its own."""
    if config.architecture == "sliding_window":
        return int(config.history_window) + config.generation_window
    return None


def forward_layers(
    layers: tuple[LayerParams | DeltaParams, ...],
    config: ModelConfig,
    embeddings: Embedded,
    dropout: Dropout | None = None,
) -> Float[Array, "batch length D"]:
    """Returns a baseline's hidden states of a whole sequence, before the final LayerNorm."""
    rope = rope_table(jnp.arange(embeddings.rows.shape[1], dtype=jnp.int32), config.head_dim, config.longest_wavelength)
    window, plan = attention_window(config), config.plan()
    stream = Stream(None, documents=embeddings.documents)

    def layer(
        x: jax.Array, item: tuple[ResidualParams, Dropout | None], key_rows: jax.Array | None = None
    ) -> tuple[jax.Array, None]:
        params, dropout = item
        if isinstance(params, DeltaParams):
            mixed, _ = delta_mixer(params, x, DeltaState.zeros(config, x.shape[0]))
        else:
            assert isinstance(params, LayerParams)
            own = part_of(dropout, CAUSAL_ATTENTION)
            causal = attention_options(config, own, stream, stream, causal=True, window=window)
            query, key, value = project(params, x, rope, key_rows=key_rows)
            mixed = attend(query, key, value, **causal)
        return update(params, x, mixed, part_of(dropout, FEED_FORWARD)), None

    if plan.checkpointing:
        layer = jax.checkpoint(layer, prevent_cse=not plan.scan_layers)
    x, key_rows = embeddings.rows, embeddings.key_rows
    if key_rows is not None:
        x, _ = layer(x, (layers[0], part_of(dropout, 0)), key_rows)
        layers, dropout = layers[1:], part_of(dropout, 1)
    period = 1 if config.attention_layers in (0, config.num_layers) else HYBRID_PERIOD
    return chain_layers(layer, layers, x, dropout, plan.scan_layers, period)
