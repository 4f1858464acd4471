"""Cross-entropy over a large vocabulary without the logits of all tokens at once."""

import jax
import jax.numpy as jnp

from tlinformer_jax.models.model import output_logits


def token_losses(hidden: jax.Array, embedding: jax.Array, labels: jax.Array, chunk: int) -> jax.Array:
    """Cross-entropy in nats of every token.

    The sequence is cut in chunks of at most `chunk` tokens (all rows of the batch together); their logits are
    recomputed in the backward pass, so only one chunk's are ever held.

    Args:
      hidden: what the head reads, [batch, length, D].
      embedding: the head, [V, D].
      labels: int32 [batch, length].
      chunk: tokens at a time.

    Returns:
      float32 [batch, length].
    """
    batch, length, width = hidden.shape
    columns = max(1, min(length, chunk // batch))
    chunks = -(-length // columns)
    padding = chunks * columns - length
    # The batch stays whole in every chunk: it is what devices split.
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0))).reshape(batch, chunks, columns, width)
    labels = jnp.pad(labels, ((0, 0), (0, padding))).reshape(batch, chunks, columns)
    embedding = embedding.astype(hidden.dtype)

    @jax.checkpoint
    def chunk_losses(part: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, targets = part
        logits = output_logits(rows, embedding)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - chosen

    losses = jax.lax.map(chunk_losses, (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(labels, 1, 0)))
    return jnp.moveaxis(losses, 0, 1).reshape(batch, -1)[:, :length]
