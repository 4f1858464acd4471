"""How evenly a model's experts are used."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tlinformer_jax.data.batches import num_samples, take_samples
from tlinformer_jax.data.tasks import Split
from tlinformer_jax.models.feed_forward import with_tallies
from tlinformer_jax.models.model import LanguageModel, embed, hidden_states, prepare_params
from tlinformer_jax.parallel.sharding import EVALUATION_AXES, process_rows, put_batch, replicated
from tlinformer_jax.training.loss import DeviceBatch, weighted_loss
from tlinformer_jax.training.setup import Run


def expert_load(run: Run, params: Any, stream: Split) -> Float[np.ndarray, "layers E"] | None:
    """The share of each layer's rows that its experts are given, on the first samples of a split.

    Samples are as long as those of training. None where there are no experts, or no whole sample.
    """
    length = run.config.data.sequence_length
    samples = num_samples(stream, length)
    if not run.config.model.mixture or samples < 1:
        return None
    rows = process_rows(run.mesh, run.evaluation_batch_size(length, samples), EVALUATION_AXES)
    batch = take_samples(stream, length, np.where(rows < samples, rows, -1))
    count = functools.partial(expert_rows, model=run.model)
    with jax.set_mesh(run.mesh):
        read = {name: batch[name] for name in ("inputs", "labels", "weights", "documents") if name in batch}
        placed = put_batch(read, run.mesh, EVALUATION_AXES)
        counts = np.asarray(jax.jit(count, out_shardings=replicated(run.mesh))(params, placed))
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def expert_rows(params: Any, batch: DeviceBatch, *, model: LanguageModel) -> Float[Array, "layers E"]:
    """How many rows each expert of each layer is given, of those that the loss depends on.

    In the windowed architectures a row of the history counts in each window that restores it.
    """
    config = model.config
    typed: Any = prepare_params(model.apply({"params": params}, method=model.parameters), config)  # type: ignore[arg-type]

    def loss(tallies: Array) -> Array:
        embeddings = embed(typed, config, batch["inputs"], documents=batch.get("documents"))
        hidden = hidden_states(with_tallies(typed, tallies), config, embeddings)
        return weighted_loss(hidden, typed.embedding, batch, most=None, z_loss=0.0)[0]

    return jax.grad(loss)(jnp.zeros((config.num_layers, config.num_experts), jnp.float32))
