"""The optimisers that `train.optimizer` names."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import golden
from tlinformer_jax.config.train import OPTIMIZERS, TrainConfig
from tlinformer_jax.interop import params_from_reference
from tlinformer_jax.models import ModelConfig
from tlinformer_jax.training import optimizer
from tlinformer_jax.training.optimizer import Horizon, build_optimizer

MODEL = ModelConfig(
    vocab_size=29,
    d_model=12,
    num_heads=2,
    num_blocks=1,
    hidden_depth=0,
    d_ff=20,
    history_window=4,
    generation_window=4,
    dtype="float32",
)
TRAIN = TrainConfig(
    optimizer="muon", learning_rate=1e-2, weight_decay=0.5, warmup_steps=0, schedule="constant", clip_norm=0
)
HORIZON = Horizon(4, 4)


def test_every_name_has_an_optimizer():
    assert tuple(optimizer.OPTIMIZERS) == OPTIMIZERS


def orthogonalised(matrix: np.ndarray) -> np.ndarray:
    """Five Newton-Schulz iterations with Muon's coefficients (Jordan 2024), in float64."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def muon_direction(name: str, gradient: np.ndarray) -> np.ndarray:
    """What Muon's first update takes from a gradient at rate 1, every matrix on its own."""
    width = MODEL.d_model
    if name == "qkv_kernel":
        matrices = [gradient[:, part].reshape(width, width) for part in range(3)]
    elif name == "gate_up_kernel":
        matrices = [gradient[:, part] for part in range(2)]
    else:
        matrices = [gradient.reshape(-1, width)]
    scaled = [0.2 * np.sqrt(max(matrix.shape)) * orthogonalised(matrix) for matrix in matrices]
    return np.stack(scaled, axis=1).reshape(gradient.shape) if len(scaled) > 1 else scaled[0].reshape(gradient.shape)


def first_update(config: TrainConfig):
    """Parameters, a gradient, and the first update, each by path."""
    params = params_from_reference(golden.random_weights(MODEL), MODEL)["params"]
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), params)
    transformation = build_optimizer(config, HORIZON)
    updates = jax.jit(lambda grads: transformation.update(grads, transformation.init(params), params)[0])(grads)
    named = [jax.tree_util.tree_leaves_with_path(tree) for tree in (params, grads, updates)]
    return [(path[-1].key, *(np.asarray(leaf, np.float64) for leaf in leaves)) for path, *leaves in zip_paths(named)]


def zip_paths(trees):
    for entries in zip(*trees, strict=True):
        yield entries[0][0], *(leaf for _, leaf in entries)


def test_muon_orthogonalises_each_hidden_matrix_and_the_rest_is_adamw():
    """Q, K, V and the feed-forward's two each on their own; all matrices decay, biases and norms do not."""
    seen = set()
    for name, param, gradient, update in first_update(TRAIN):
        if name in ("qkv_kernel", "out_kernel", "gate_up_kernel", "down_kernel"):
            seen.add(name)
            expected = muon_direction(name, gradient) + 0.5 * param
        else:
            expected = np.sign(gradient) + 0.5 * param * (name == "embedding")
        np.testing.assert_allclose(update, -1e-2 * expected, atol=3e-6, err_msg=name)
    assert len(seen) == 4


def test_muons_updates_are_about_as_large_as_adamws_and_the_gradients_size_does_not_matter():
    config = dataclasses.replace(TRAIN, weight_decay=0.0)
    for name, _, _, update in first_update(config):
        if name.endswith("kernel"):
            assert 0.1 < np.sqrt(np.mean(update**2)) / 1e-2 < 0.3, name
    clipped = first_update(dataclasses.replace(config, clip_norm=0.1))
    for (name, *_, update), (*_, other) in zip(first_update(config), clipped, strict=True):
        if name.endswith("kernel"):
            np.testing.assert_allclose(update, other, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("schedule", ["constant", "paper"])
def test_muon_decays_what_adamw_decays(schedule):
    """With gradients of 0 only the decay is left."""
    params = params_from_reference(golden.random_weights(MODEL), MODEL)["params"]
    changes = []
    for name in OPTIMIZERS:
        config = dataclasses.replace(TRAIN, optimizer=name, schedule=schedule, steps="1epoch", warmup_steps=0)
        transformation = build_optimizer(config, HORIZON)
        zeros = jax.tree.map(jnp.zeros_like, params)
        changes.append(jax.jit(lambda grads, by=transformation: by.update(grads, by.init(params), params)[0])(zeros))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, atol=1e-8), *changes)
