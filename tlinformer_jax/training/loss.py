"""The loss of a batch: the cross-entropy of the model's hidden states, without holding all tokens' logits at once.

A short sequence is computed whole, a long one window by window, see `training.window_loss`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tlinformer_jax.data.tasks import AnswerPositions
from tlinformer_jax.kernels import loss as loss_kernel
from tlinformer_jax.kernels.common import usable
from tlinformer_jax.models.feed_forward import with_router_losses
from tlinformer_jax.models.layers import Dropout
from tlinformer_jax.models.model import (
    LanguageModel,
    embed,
    hidden_states,
    output_logits,
    padded_vocabulary,
    prepare_params,
)
from tlinformer_jax.models.tlinformer import prepare_sequence
from tlinformer_jax.models.windows import in_chunks, joined, num_windows, pad_rows, training_plan
from tlinformer_jax.parallel.sharding import UNSPLIT, WHOLE, BatchSplit
from tlinformer_jax.training.window_loss import (
    DeviceBatch,
    LossAndRight,
    embed_rows,
    sum_with_gradients,
    window_loops,
    window_loss,
)

LOSS_CHUNK = 8192  # tokens of a micro-batch whose logits are in memory at a time
# Length of a sample -> positions of the labels that count; None if all do.
AnswersOf = Callable[[int], AnswerPositions | None]


def summed_loss(
    params: Any,
    batch: DeviceBatch,
    key: jax.Array,
    windows: jax.Array | None = None,
    *,
    model: LanguageModel,
    split: BatchSplit = UNSPLIT,
    answers: AnswersOf | None = None,
    divisor: jax.Array | float = 1.0,
    z_loss: float = 0.0,
) -> LossAndRight:
    """Returns the weighted sum of the cross-entropy in nats, and the weight of the correctly predicted labels.

    With several devices the result is this device's share of the sum.

    Args:
      batch: as for `train_step`; with `documents` if samples hold several documents, see `Embedded`.
      key: of the dropout.
      windows: generation windows to train on, int32 [k], each of whose losses counts n / k times; None for all n.
      split: of the batch over devices.
      answers: as for `train_step`.
      divisor: by which the loss is divided.
      z_loss: its weight in the gradient, see `TrainConfig`.
    """
    shape, inputs, sequences = model.config, batch["inputs"], split.sequence
    rows = {name: batch[name] for name in ("labels", "weights")}
    length, documents = inputs.shape[1], batch.get("documents")
    known = None if answers is None else answers(length)
    most, start = (None, 0) if known is None else (known.most, known.first if windows is None else 0)
    typed = prepare_params(model.apply({"params": params}, method=model.parameters), shape)  # type: ignore[arg-type]
    rows_loss = functools.partial(weighted_loss, most=most, z_loss=z_loss)
    dropout = Dropout.by_key(key, shape.dropout, split.shard_index()) if shape.dropout else None
    first = start // shape.generation_window
    alone = windows is not None or sequences != WHOLE
    plan = training_plan(shape, length, first, alone, documents is not None)
    if not alone and not (shape.windowed and plan.checkpointing):
        typed = with_router_losses(typed, rows["weights"], divisor)
        hidden = hidden_states(typed, shape, embed(typed, shape, inputs, documents=documents), dropout, start)
        rows = jax.tree.map(lambda array: array[:, start:], rows)
        total, right = rows_loss(hidden, typed.embedding, rows)
        return total / divisor, right
    embeddings = embed_rows(typed, shape, inputs, documents, sequences)
    # Layers that run here, once for all windows, add their router losses once.
    blocks = with_router_losses(typed.blocks, rows["weights"], divisor)
    sequence = prepare_sequence(blocks, shape, embeddings, length, plan, dropout, sequences, first, windows is None)
    total, right = jnp.float32(0), jnp.float32(0)
    for loop in window_loops(shape, sequence, rows, sequences, windows):
        branches = tuple(functools.partial(window_loss, shape, segment, rows_loss) for segment in loop.segments)
        steps = loop.indices, loop.rows
        # A loop starts when the gradients of the one before are there. Otherwise XLA, which unrolls loops of one step,
        # would mix them, and the activations of both would be in memory.
        shared, own, total = jax.lax.optimization_barrier(((typed, loop.history), loop.own, total))
        loss, hits = sum_with_gradients(branches, shared, own, sequence.constants, steps, loop.which)
        total, right = total + loss, right + hits
    # Each of k sampled windows counts n / k times.
    weight = 1.0 if windows is None else num_windows(shape, length) / windows.shape[0]
    return total * weight / divisor, right


def weighted_loss(
    hidden: jax.Array, embedding: jax.Array, rows: DeviceBatch, most: int | None, z_loss: float
) -> LossAndRight:
    """Returns `summed_losses_and_hits`; for a task, computed only at the `most` rows that can have weights."""
    if most is not None and (positions := weighted_positions(rows["weights"], most)) is not None:
        hidden, rows = jax.tree.map(lambda array: at_positions(array, positions), (hidden, rows))
    return summed_losses_and_hits(hidden, embedding, rows["labels"], rows["weights"], LOSS_CHUNK, z_loss)


# ---- Cross-entropy over a large vocabulary


def token_losses_and_hits(
    hidden: Float[Array, "batch length D"],
    embedding: Float[Array, "V D"],
    labels: Int[Array, "batch length"],
    chunk: int,
) -> tuple[Float[Array, "batch length"], Bool[Array, "batch length"]]:
    """Returns each token's cross-entropy in nats, and whether greedy decoding would choose its label."""
    table = _table(embedding, hidden.dtype)

    def both(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, targets = part
        losses, logits, _ = _chunk_losses(rows, table, targets, embedding.shape[0])
        return losses, jnp.argmax(logits, axis=-1) == targets

    found = jax.lax.map(both, (_chunks(hidden, chunk), _chunks(labels, chunk)))
    losses, hits = (joined(array)[:, : hidden.shape[1]] for array in found)
    return losses, hits


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def summed_losses_and_hits(
    hidden: jax.Array, embedding: jax.Array, labels: jax.Array, weights: jax.Array, chunk: int, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted sum of the cross-entropy in nats, and the weight of the labels that greedy decoding chooses.

    Used in training. The first result has the gradient of weights * (cross-entropy + z_loss * Z^2), where Z is the
    log-sum-exp of a token's logits; the second has none. Gradients are computed together with the loss, chunk by chunk:
    logits are computed once, and their gradient is rounded to hidden's dtype.
    """
    losses, hits = token_losses_and_hits(hidden, embedding, labels, chunk)
    return jnp.sum(losses * weights), jnp.sum(hits * weights)


def _forward(hidden, embedding, labels, weights, chunk, z_loss):
    table = _table(embedding, hidden.dtype)

    def body(table_gradient, part):
        rows, targets, weight = part
        losses, hits, slope = _chunk_slope(rows, table, targets, weight, embedding.shape[0], z_loss)
        table_gradient += jnp.einsum("bcv,bcd->vd", slope, rows, preferred_element_type=jnp.float32)
        return table_gradient, (losses, hits, jnp.einsum("bcv,vd->bcd", slope, table))

    zero = jnp.zeros(table.shape, jnp.float32)
    parts = (_chunks(hidden, chunk), _chunks(labels, chunk), _chunks(weights, chunk))
    table_gradient, outputs = jax.lax.scan(body, zero, parts)
    losses, hits, hidden_gradient = (joined(array)[:, : hidden.shape[1]] for array in outputs)
    # No caller differentiates by the weights with z_loss, so their gradient has no term for Z.
    gradients = (hidden_gradient, table_gradient[: embedding.shape[0]].astype(embedding.dtype), losses)
    return (jnp.sum(losses * weights), jnp.sum(hits * weights)), gradients


def _backward(chunk, z_loss, gradients, cotangents):
    cotangent, _ = cotangents
    hidden, embedding, weights = ((array.astype(jnp.float32) * cotangent).astype(array.dtype) for array in gradients)
    return hidden, embedding, None, weights


summed_losses_and_hits.defvjp(_forward, _backward)


def _chunk_slope(
    rows: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, vocab_size: int, z_loss: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns losses and hits [batch, c], and the gradient of the losses with respect to the logits, [batch, c, V]."""
    if usable("loss", rows.dtype):
        logits = output_logits(rows, table).reshape(-1, table.shape[0])
        losses, slope = loss_kernel.loss_and_slope(
            logits, targets.reshape(-1), weights.reshape(-1), vocab_size, rows.dtype, z_loss
        )
        hits = jnp.argmax(logits[:, :vocab_size], axis=-1) == targets.reshape(-1)
        return losses.reshape(targets.shape), hits.reshape(targets.shape), slope.reshape(*targets.shape, -1)
    losses, logits, norm = _chunk_losses(rows, table, targets, vocab_size)
    chosen = jnp.arange(table.shape[0]) == targets[..., None]
    shares = jnp.exp(logits - norm[..., None])
    if z_loss:
        shares *= 1.0 + 2.0 * z_loss * norm[..., None]
    slope = ((shares - chosen) * weights[..., None]).astype(rows.dtype)
    return losses, jnp.argmax(logits, axis=-1) == targets, slope


def _chunk_losses(
    rows: jax.Array, table: jax.Array, targets: jax.Array, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns losses [batch, c], logits [batch, c, padded V] and their log-sum-exp [batch, c]."""
    logits = output_logits(rows, table)
    if table.shape[0] != vocab_size:
        logits = jnp.where(jnp.arange(table.shape[0]) < vocab_size, logits, -jnp.inf)
    norm = jax.nn.logsumexp(logits, axis=-1)
    return norm - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0], logits, norm


def _table(embedding: jax.Array, dtype: Any) -> jax.Array:
    """Returns the output embedding in `dtype`, padded with rows of zeros."""
    padding = padded_vocabulary(embedding.shape[0], dtype) - embedding.shape[0]
    return jnp.pad(embedding.astype(dtype), ((0, padding), (0, 0)))


def _chunks(array: jax.Array, chunk: int) -> jax.Array:
    """Splits [batch, length, ...] into [chunks, batch, columns, ...], padding the last columns with zeros.

    Every chunk has the whole batch, because devices split the batch.
    """
    batch, length = array.shape[:2]
    columns = max(1, min(length, chunk // batch))
    return in_chunks(pad_rows(array, -length % columns), columns)


# ---- Samples with few weighted labels


def weighted_positions(weights: jax.Array, most: int) -> jax.Array | None:
    """Returns the positions of the labels that count, int32 [batch, most]; None if `most` is the whole sample."""
    return jax.lax.top_k(weights, most)[1] if most < weights.shape[1] else None


def at_positions(array: jax.Array, positions: jax.Array) -> jax.Array:
    """Gathers [batch, most, ...] from [batch, length, ...]."""
    return jnp.take_along_axis(array, positions.reshape(*positions.shape, *(1,) * (array.ndim - 2)), axis=1)


def put_back(array: jax.Array, positions: jax.Array, length: int, rest: Any) -> jax.Array:
    """Inverts `at_positions`, with `rest` at all other positions."""
    rows = jnp.arange(array.shape[0])[:, None]
    return jnp.full((array.shape[0], length), rest, array.dtype).at[rows, positions].set(array)
