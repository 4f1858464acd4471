"""The loss of a batch: the model gives hidden states, of a sequence or of a window; here they meet their labels."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.dropout import Dropout
from tlinformer_jax.models.layers import layer_norm
from tlinformer_jax.models.model import LanguageModel, ModelParams, embed, hidden_states, prepare_params
from tlinformer_jax.models.streams import History, Stream
from tlinformer_jax.models.tlinformer import place_in_run, prepare_sequence, window_states
from tlinformer_jax.models.windows import Segment, num_windows
from tlinformer_jax.parallel.batch_split import UNSPLIT, WHOLE, BatchSplit
from tlinformer_jax.training.answers import AnswersOf, at_places, weighted_places
from tlinformer_jax.training.loss import LOSS_CHUNK, summed_losses_and_hits
from tlinformer_jax.training.window_loss import pad_rows, sum_with_gradients, window_loops, window_weight

DeviceBatch = dict[str, jax.Array]


class LossAux(NamedTuple):
    """What is summed along with the loss, without a gradient.

    Attributes:
      window_losses: of each window that is run, float32 [windows], where one is computed after the other, else [0].
      right: weight of the labels that greedy decoding would choose, float32 [].
    """

    window_losses: jax.Array
    right: jax.Array


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
) -> tuple[jax.Array, LossAux]:
    """Cross-entropy in nats, weighted and summed over a batch; of all windows, or estimated from the given ones.

    The hidden states of a whole sequence, and one cross-entropy; or, for a long sequence, those of a window and its
    cross-entropy, window after window. Where devices share the batch, or its sequences, it is this device's share.

    Args:
      params: parameters, as `model.init` names them.
      batch: as `train_step` takes it.
      key: of the dropout.
      windows: generation windows to train on, int32 [k], whose losses count n / k times; None for all n.
      model: of the parameters.
      split: of the batch over devices.
      answers: as `train_step` takes it.
      divisor: of the sum.

    Returns:
      float32 [], and what is summed along with it.
    """
    shape, inputs, sequences = model.config, batch["inputs"], split.sequence
    rows = {name: batch[name] for name in ("labels", "weights")}
    length = inputs.shape[1]
    known = None if answers is None else answers(length)
    most, start = (None, 0) if known is None else (known.most, known.first if windows is None else 0)
    typed = prepare_params(model.apply({"params": params}, method=model.parameters), shape)  # type: ignore[arg-type]
    dropout = Dropout.by_key(key, shape.dropout, split.shard_index()) if shape.dropout else None
    first = start // shape.generation_window
    plan = shape.plan(num_windows(shape, length) - first)
    if windows is None and sequences == WHOLE and not (shape.windowed and plan.checkpointing):
        hidden = hidden_states(typed, shape, embed(typed.embedding, shape, inputs), dropout, start)
        rows = jax.tree.map(lambda array: array[:, start:], rows)
        total, right = weighted_loss(hidden, typed.embedding, rows, most)
        return total / divisor, LossAux(jnp.zeros(0, jnp.float32), right)
    if sequences.rows is not None:
        inputs = sequences.rows.take(pad_rows(inputs, -length % sequences.row_parts))
    if windows is not None or sequences != WHOLE:
        plan = dataclasses.replace(plan, together=1)
    embeddings = embed(typed.embedding, shape, inputs)
    sequence = prepare_sequence(typed.blocks, shape, embeddings, length, plan, dropout, sequences, first)
    total, right, found = jnp.float32(0), jnp.float32(0), []
    for loop in window_loops(shape, sequence, rows, sequences, windows):
        branches = tuple(functools.partial(window_loss, shape, run, most) for run in loop.runs)
        shared, steps = (typed, loop.history), (loop.indices, loop.rows)
        (loss, hits), each = sum_with_gradients(branches, shared, loop.own, sequence.fixed, steps, loop.which)
        total, right = total + loss, right + hits
        found.append(loop.gathered(each))
    # Other micro-batches draw other windows.
    each = jnp.concatenate(found) if windows is None else jnp.zeros(0, jnp.float32)
    return total * window_weight(shape, length, windows) / divisor, LossAux(each, right)


def window_loss(
    shape: ModelConfig,
    run: Segment,
    most: int | None,
    fixed: Any,
    step: tuple[jax.Array, DeviceBatch],
    shared: tuple[ModelParams, History],
    x: Stream | None,
) -> tuple[jax.Array, jax.Array]:
    """`weighted_loss` of a generation window, or of those that run together, as `sum_with_gradients` takes it.

    Args:
      shape: of the model.
      run: of windows, whose static shapes it has.
      most: see `weighted_loss`.
      fixed: that of the sequence.
      step: (the window's index, its labels and weights).
      shared: (parameters from `prepare_params`, the history).
      x: the window's own rows, None where devices share them.

    Returns:
      float32 [] both; where rows are split over devices, of this device's rows of the window.
    """
    (params, history), (index, rows) = shared, step
    size, split = shape.generation_window, history.split
    if split is not None:
        whole = Stream(history.rows, history.Q, history.K, history.V)
        x = jax.tree.map(lambda array: history.slice(array, index * size, size), whole)
    assert x is not None
    C, frame, dropout = place_in_run(shape, run, history, fixed, index)
    states = window_states(params.blocks, shape, C, x, frame, dropout)
    if split is not None:
        states, rows = jax.tree.map(lambda array: split.take(pad_rows(array, -size % split.parts)), (states, rows))
    hidden = layer_norm(states, params.norm_scale, params.norm_bias)
    return weighted_loss(hidden, params.embedding, rows, most)


def weighted_loss(
    hidden: jax.Array, embedding: jax.Array, rows: DeviceBatch, most: int | None
) -> tuple[jax.Array, jax.Array]:
    """`summed_losses_and_hits`; of tasks, where at most `most` rows of a sample have weights, of those rows alone."""
    if most is not None and (places := weighted_places(rows["weights"], most)) is not None:
        hidden, rows = jax.tree.map(lambda array: at_places(array, places), (hidden, rows))
    return summed_losses_and_hits(hidden, embedding, rows["labels"], rows["weights"], LOSS_CHUNK)
