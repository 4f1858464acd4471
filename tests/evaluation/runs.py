"""A small run in memory, and what each of its tokens costs by the NumPy reference, on samples cut by hand."""

import functools

import jax
import numpy as np

from tests.support import golden, reference
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.tokenizers import ByteTokenizer
from tlinformer_jax.interop import params_from_reference
from tlinformer_jax.models import ModelConfig
from tlinformer_jax.training.setup import TrainedRun, build_run

MODEL = ModelConfig(
    vocab_size=257,
    d_model=16,
    num_heads=2,
    num_blocks=2,
    hidden_depth=0,
    d_ff=24,
    history_window=3,
    generation_window=4,
    dtype="float32",
)
LENGTH = 12


@functools.cache
def weights(model: ModelConfig) -> dict[str, np.ndarray]:
    return golden.random_weights(model)


@functools.cache
def trained(model: ModelConfig = MODEL) -> TrainedRun:
    """A run of 7 "steps" whose weights are of golden scale."""
    data = DataConfig(dataset="pydoc", tokenizer="bytes", sequence_length=LENGTH)
    run = build_run(RunConfig(model, TrainConfig(batch_size=4), data), ByteTokenizer())
    params = params_from_reference(weights(model), model)["params"]
    return TrainedRun(run, jax.device_put(params, run.shardings.params), 7)


def costs(tokens: np.ndarray, length: int, model: ModelConfig = MODEL) -> list[np.ndarray]:
    """Nats of every token but the first, one array for each sample of `length` labels; the last may be shorter."""
    samples = []
    for start in range(0, len(tokens) - 1, length):
        cut = np.asarray(tokens[start : start + length + 1], int)
        logits = reference.logits(weights(model), model, cut[None, :-1])[0]
        samples.append(reference.token_losses(logits, cut[1:]))
    return samples
