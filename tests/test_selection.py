"""Rows of the observation window: chosen as the NumPy reference chooses them, however windows are computed."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import golden, reference
from tests.test_model import SMALL
from tlinformer_jax import DualWindowBlock, ModelConfig, build_model
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.decoding.generator import Generator
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.interop import params_from_reference
from tlinformer_jax.training.batch_loss import summed_loss

CONFIG = dataclasses.replace(SMALL, history_segments=1, observed_selection="random")
TOKENS = np.random.default_rng(5).integers(0, 31, (2, 27))


def logits(config: ModelConfig) -> np.ndarray:
    variables = params_from_reference(golden.random_weights(config), config)
    return np.asarray(jax.jit(build_model(config).apply)(variables, TOKENS))


WAYS = {
    "plain": {},
    "segments": {"history_segments": 3},
    "together": {"windows_together": 3},
    "chunks": {"history_chunk": 4, "remat": "window"},
    "auto": {"history_window": "auto"},
    "tconst": {"architecture": "tconstformer", "num_blocks": 3, "hidden_depth": 0},
    "wide": {"history_window": 9},
}


@pytest.mark.parametrize(
    ("way", "selection"),
    [
        ("together", "random"),
        ("together", "top_k"),
        # The others by one of the two, in turn.
        *(
            pytest.param(way, ("random", "top_k")[number % 2], marks=pytest.mark.slow)
            for number, way in enumerate(sorted(set(WAYS) - {"together"}))
        ),
    ],
)
def test_logits_are_those_of_the_chosen_rows(selection, way):
    config = dataclasses.replace(CONFIG, observed_selection=selection, **WAYS[way])
    expected = reference.logits(golden.random_weights(config), config, TOKENS)
    np.testing.assert_allclose(logits(config), expected, atol=2e-5, rtol=0)
    recent = dataclasses.replace(config, observed_selection="recent")
    others = reference.logits(golden.random_weights(config), recent, TOKENS)
    if way != "auto":  # whose windows hold all rows of so short a history
        assert np.abs(expected - others)[:, 8:].max() > 0.01


def chosen_rows(config: ModelConfig, windows: int) -> list[np.ndarray]:
    """Rows of the observation window of each generation window after the first.

    They are those that the logits depend on, in a model whose `compress` layer has values of zero, so that a
    compressed row tells of nothing but the row it was.
    """
    weights = golden.random_weights(config)
    for name in ("weight", "bias"):
        values = weights[f"transformer.transformer_layers.0.compress_context_layer.qkv_proj.{name}"]
        values[2 * config.d_model :] = 0
    variables, model, size = params_from_reference(weights, config), build_model(config), config.generation_window
    embeddings = np.random.default_rng(0).standard_normal((1, windows * size, config.d_model)).astype(np.float32)

    @jax.jit
    def influence(position):
        gradient = jax.grad(lambda inputs: model.apply(variables, inputs_embeds=inputs)[0, position, 0])(embeddings)
        return jnp.abs(gradient[0]).max(-1)

    return [np.flatnonzero(influence(number * size)[: number * size]) for number in range(1, windows)]


def test_random_rows_are_spread_over_the_history_and_differ_by_window():
    config = dataclasses.replace(CONFIG, num_blocks=1, hidden_depth=0)
    chosen = chosen_rows(config, 48)
    assert [len(rows) for rows in chosen] == [3] * 47
    lengths = config.generation_window * np.arange(1, 48)
    shares = np.concatenate([rows / length for rows, length in zip(chosen[9:], lengths[9:])])
    counts = np.histogram(shares, 5, (0, 1))[0]
    assert counts.min() > len(shares) / 5 / 2
    pairs = list(itertools.pairwise(chosen[9:]))
    assert sum(len(np.intersect1d(one, other)) for one, other in pairs) < len(pairs)


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["random", "top_k"])
def test_training_window_by_window_is_training_of_the_whole(selection):
    """Loss and gradients, and those of all windows sampled."""
    config = dataclasses.replace(CONFIG, observed_selection=selection)
    params = params_from_reference(golden.random_weights(config), config)["params"]
    batch = {"inputs": TOKENS[:, :-1], "labels": TOKENS[:, 1:], "weights": np.ones((2, 26), np.float32)}

    def loss(remat, windows=None):
        model = build_model(dataclasses.replace(config, remat=remat))

        def total(params):
            key = jax.random.key(0)
            return summed_loss(params, batch, key, model=model, config=TrainConfig(), windows=windows)[0]

        return jax.jit(jax.value_and_grad(total))(params)

    expected = loss("none")
    for found in (loss("window"), loss("window", jnp.arange(7, dtype=jnp.int32))):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-4), found, expected)


def test_the_last_rows_need_no_choice():
    config = dataclasses.replace(CONFIG, observed_selection="recent")
    shapes = jax.eval_shape(build_model(config).init, jax.random.key(0), TOKENS)
    assert "top_k" not in str(jax.make_jaxpr(build_model(config).apply)(shapes, TOKENS))
    assert "top_k" in str(jax.make_jaxpr(build_model(CONFIG).apply)(shapes, TOKENS))


@pytest.mark.slow
def test_a_block_by_itself_chooses_too():
    config = dataclasses.replace(CONFIG, num_blocks=1, observed_selection="top_k")
    weights = golden.random_weights(config)
    block = params_from_reference(weights, config)["params"]["blocks_0"]
    embedded = weights["embedding.weight"][TOKENS[:1, :12]]
    x, _ = DualWindowBlock(config).apply({"params": block}, embedded[:, 8:], embedded[:, :8], restore=False)
    double = {name: np.asarray(array, np.float64) for name, array in weights.items()}
    expected = reference._window(double, config, embedded[0, :8].astype(float), 8, embedded[0, 8:].astype(float))
    np.testing.assert_allclose(x[0], expected, atol=2e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"model.observed_selection = 'random': must be 'recent' for architecture"):
        dataclasses.replace(CONFIG, architecture="sliding_window")
    with pytest.raises(ConfigError, match=r"model.observed_selection = 'best': must be one of recent, random, top_k"):
        dataclasses.replace(CONFIG, observed_selection="best")
    variables = params_from_reference(golden.random_weights(CONFIG), CONFIG)
    with pytest.raises(ConfigError, match=r"model.observed_selection = 'random': must be 'recent' for generation"):
        Generator(build_model(CONFIG), variables)
