"""Block 0's `compress` projections of every token of the vocabulary.

There the history is rows of embeddings, so queries, keys and values before rotation depend on the token alone. A
history of many more rows than the vocabulary has tokens is projected faster by looking its rows up.
"""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.params import DecoderParams
from tlinformer_jax.models.cached_attention import for_writing
from tlinformer_jax.models.layers import projections
from tlinformer_jax.models.rope import Rope, rotate

# The vocabulary is projected where the rows of history are at least so many times as many.
ROWS_PER_TOKEN = 4


@flax.struct.dataclass
class VocabularyProjections:
    """Of every token, not rotated, in the compute dtype.

    Attributes:
      query: [V, heads, d_h (padded)].
      key_value: [V, 2, heads, d_h (padded)], features as `for_writing` orders them.
    """

    query: Float[Array, "V heads d_h"]
    key_value: Float[Array, "V 2 heads d_h"]

    def rotated_query(self, tokens: Int[Array, "1 rows"], rope: Rope) -> Float[Array, "1 rows heads d_h"]:
        """Queries of tokens at the rope's positions."""
        return rotate(jnp.take(self.query, tokens, axis=0, mode="clip"), rope)


def project_vocabulary(
    params: DecoderParams, config: ModelConfig, rows: int, chunk: int
) -> VocabularyProjections | None:
    """The projections of every token; None where `rows` are too few for that to pay.

    Args:
      params: of the model.
      config: of the model.
      rows: of the history, an upper bound known when compiling.
      chunk: rows that are stored at a time.
    """
    if rows < ROWS_PER_TOKEN * config.vocab_size:
        return None
    layer, embeddings = params.blocks[0].compress, params.embedding[None]
    writer = for_writing(layer, chunk, config.attention)
    return VocabularyProjections(projections(layer, embeddings, "q")[0, :, 0], projections(writer, embeddings, "kv")[0])
