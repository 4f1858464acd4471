"""The options for memory all at once: token shift, key taps, overlapping windows, no slow rotations."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.decoding.test_context import make_decoder as spread_decoder
from tests.decoding.test_context import small_caches
from tests.decoding.test_exactness import TOLERANCE, check_every_way, largest_error, truth
from tests.parallel.test_batch_split import MESHES, check
from tests.parallel.test_batch_split import MODEL as TRAINED
from tests.support import golden, reference
from tests.support.models import SMALL
from tlinformer_jax import build_model
from tlinformer_jax.interop import params_from_reference

ALL = {"token_shift": True, "key_taps": 3, "window_overlap": 2, "longest_wavelength": 20}
CONFIG = dataclasses.replace(SMALL, hidden_depth=1, history_window=3, **ALL)
PROMPTS = [3, 8, 9, 1, 12]  # before, at and after the edges of windows of 4
FED = 27
BOTH = ["tlinformer", pytest.param("tconstformer", marks=pytest.mark.slow)]


@pytest.mark.parametrize("architecture", BOTH)
def test_the_forward_pass_is_the_references(architecture):
    """Of tokens, and of their embeddings."""
    config = dataclasses.replace(CONFIG, architecture=architecture)
    tokens, expected = truth(config, FED, 3)
    variables = params_from_reference(golden.random_weights(config), config)
    model, rows = build_model(config), variables["params"]["embedding"][tokens]
    both = jax.jit(lambda *given: (model.apply(given[0], given[1]), model.apply(given[0], inputs_embeds=given[2])))
    for logits in both(variables, tokens, rows):
        np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
    for name, value in (("token_shift", False), ("key_taps", 0), ("window_overlap", 0), ("longest_wavelength", 0)):
        without = reference.logits(golden.random_weights(config), dataclasses.replace(config, **{name: value}), tokens)
        assert np.abs(without - expected).max() > 0.1, f"{name} does nothing"


@pytest.mark.parametrize("architecture", BOTH)
def test_prefill_step_and_slide_are_the_references(architecture):
    config = dataclasses.replace(CONFIG, architecture=architecture)
    check_every_way(config, PROMPTS, FED, alone=(1, 8))


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "context"), [("tlinformer", 2), ("tlinformer", 8), ("tconstformer", 8)])
def test_a_history_over_devices_is_the_references(architecture, context, monkeypatch, own_traces):
    """Windows of 5, which no number of devices divides; growing caches of several chunks, whose rows are not looked up
    by token, though they are many enough."""
    small_caches(monkeypatch, rows_per_token=0)
    config = dataclasses.replace(CONFIG, architecture=architecture, generation_window=5, history_window=7)
    assert largest_error(spread_decoder(config, context), [5, 16, 1], 33, room=16) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "architecture"),
    [
        *((axes, "tlinformer") for axes in ("data, window, context", "fsdp, tensor")),
        *((axes, "tconstformer") for axes in ("window", "context")),
    ],
)
def test_loss_and_gradients_on_eight_devices_are_those_of_one(axes, architecture):
    check(dataclasses.replace(TRAINED, architecture=architecture, **ALL), MESHES[axes])
