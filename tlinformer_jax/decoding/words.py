"""What block 0's `compress` layer projects, by word.

There the history is rows of embeddings, so queries, keys and values before rotation depend on the token alone. A
history of many more rows than the vocabulary has words is projected faster by looking its rows up.
"""

import flax.struct
import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.params import DecoderParams
from tlinformer_jax.models.cached_attention import for_writing
from tlinformer_jax.models.layers import projections
from tlinformer_jax.models.rope import Rope, rotate

# Words are projected where the rows are at least so many times as many.
ROWS_PER_WORD = 4


@flax.struct.dataclass
class WordProjections:
    """Of every word, not rotated, in the compute dtype.

    Attributes:
      query: [V, heads, d_h (padded)].
      key_value: [V, 2, heads, d_h (padded)], features as `for_writing` orders them.
    """

    query: jax.Array
    key_value: jax.Array

    def rotated_query(self, tokens: jax.Array, rope: Rope) -> jax.Array:
        """Queries of tokens int32 [1, rows] at the rope's positions, [1, rows, heads, d_h (padded)]."""
        return rotate(jnp.take(self.query, tokens, axis=0, mode="clip"), rope)


def project_words(params: DecoderParams, config: ModelConfig, rows: int, chunk: int) -> WordProjections | None:
    """The projections of every word; None where `rows` are too few for that to pay.

    Args:
      params: of the model.
      config: of the model.
      rows: of the history, an upper bound known when compiling.
      chunk: rows that are stored at a time.
    """
    if rows < ROWS_PER_WORD * config.vocab_size:
        return None
    layer, words = params.blocks[0].compress, params.embedding[None]
    writer = for_writing(layer, chunk, config.attention)
    return WordProjections(projections(layer, words, "q")[0, :, 0], projections(writer, words, "kv")[0])
