"""The options for memory all at once: token shift, overlapping windows, no slow rotations."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decoding.test_context import make_decoder as spread_decoder
from tests.decoding.test_context import small_caches
from tests.decoding.test_exactness import TOLERANCE, check_every_way, largest_error, truth
from tests.parallel.test_batch_split import MESHES, check
from tests.parallel.test_batch_split import MODEL as TRAINED
from tests.support import golden, reference
from tests.support.models import SMALL
from tests.test_window_sampling import LENGTH, batch_of, loss_and_gradient
from tlinformer_jax import build_model
from tlinformer_jax.config.model import ExecutionPlan
from tlinformer_jax.interop import params_from_reference

ALL = {"token_shift": True, "window_overlap": 2, "longest_wavelength": 20}
CONFIG = dataclasses.replace(SMALL, hidden_depth=1, history_window=3, **ALL)
PROMPTS = [3, 8, 9, 1, 12]  # before, at and after the edges of windows of 4
FED = 27
BOTH = ["tlinformer", pytest.param("tconstformer", marks=pytest.mark.slow)]


@pytest.mark.parametrize("architecture", BOTH)
def test_the_forward_pass_is_the_references(architecture):
    config = dataclasses.replace(CONFIG, architecture=architecture)
    tokens, expected = truth(config, FED, 3)
    variables = params_from_reference(golden.random_weights(config), config)
    np.testing.assert_allclose(jax.jit(build_model(config).apply)(variables, tokens), expected, atol=TOLERANCE)
    for name, value in (("token_shift", False), ("window_overlap", 0), ("longest_wavelength", 0)):
        without = reference.logits(golden.random_weights(config), dataclasses.replace(config, **{name: value}), tokens)
        assert np.abs(without - expected).max() > 0.1, f"{name} does nothing"


@pytest.mark.parametrize("architecture", BOTH)
def test_prefill_step_and_slide_are_the_references(architecture):
    config = dataclasses.replace(CONFIG, architecture=architecture)
    check_every_way(config, PROMPTS, FED, alone=(1, 8, 9, FED))


@pytest.mark.slow
@pytest.mark.parametrize("context", [2, 8])
def test_a_history_over_devices_is_the_references(context, monkeypatch, own_traces):
    small_caches(monkeypatch, rows_per_token=0)
    config = dataclasses.replace(CONFIG, generation_window=5, history_window=7)
    assert largest_error(spread_decoder(config, context), [5, 16, 1], 33, room=16) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["data, window, context", "window", "context"])
def test_loss_and_gradients_on_eight_devices_are_those_of_one(axes):
    check(dataclasses.replace(TRAINED, **ALL), MESHES[axes])


@pytest.mark.slow
def test_sampled_windows_are_unbiased():
    """The mean over every two of five windows is the whole."""
    config = dataclasses.replace(CONFIG, history_window=5, memory=ExecutionPlan(2))
    params = params_from_reference(golden.random_weights(config), config)["params"]
    function = loss_and_gradient(config)
    loss, gradients = function(params, None)
    sampled = [function(params, jnp.array(subset)) for subset in itertools.combinations(range(-(-LENGTH // 4)), 2)]
    assert np.mean([float(value) for value, _ in sampled]) == pytest.approx(float(loss), rel=1e-6)
    mean = np.mean([np.asarray(each["shift"], np.float64) for _, each in sampled], axis=0)
    np.testing.assert_allclose(mean, gradients["shift"], atol=1e-5 * np.abs(gradients["shift"]).max())
    whole = reference.logits(golden.random_weights(config), config, batch_of()["inputs"])
    assert float(loss) == pytest.approx(reference.mean_loss(whole, batch_of()["labels"]), rel=1e-5)
