"""`model.longest_wavelength`, which leaves slow feature pairs unrotated, against the NumPy reference on every path."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.decoding.test_exactness import TOLERANCE, check_every_way, compared, make_decoder, truth
from tests.support import golden, reference
from tests.support.models import SMALL
from tests.support.optional import need_modules
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.decoding import decoder, history, layered, windowed
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.interop import params_from_reference, params_to_reference
from tlinformer_jax.interop.files import read_weights, write_safetensors
from tlinformer_jax.models import rope

# Heads of 8 features: pairs with wavelengths of 6.3, 63, 628 and 6,283 positions, of which the first alone rotates.
SLOW = dataclasses.replace(SMALL, hidden_depth=0, history_window=3, longest_wavelength=20)
PROMPTS = [3, 8, 9, 1, 12]  # before, at and after the edges of windows of 4
FED = 27
CHUNKS = ExecutionPlan(segments=2, chunk=2, checkpointing=True)


def variant(architecture: str = "tlinformer", **changes) -> ModelConfig:
    return dataclasses.replace(SLOW, architecture=architecture, **changes)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("tlinformer", {"num_blocks": 3, "memory": CHUNKS}),
        ("transformer", {}),
        ("sliding_window", {}),
        pytest.param("gated_deltanet_hybrid", {}, marks=pytest.mark.slow),
    ],
)
def test_logits_are_the_references(architecture, changes):
    config = variant(architecture, **changes)
    tokens, expected = truth(config, FED, 2)
    weights = golden.random_weights(config)
    logits = jax.jit(build_model(config).apply)(params_from_reference(weights, config), tokens)
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE)
    others = reference.logits(weights, dataclasses.replace(config, longest_wavelength=0), tokens)
    assert np.abs(others - expected).max() > 0.01


@pytest.mark.parametrize("longest", [7, 28, 30, 1000, 10**9])
def test_pairs_rotate_up_to_the_wavelength(longest):
    wavelengths = 2 * np.pi * 10000 ** (np.arange(6) / 6)
    positions = np.array([0, 1, 5, 123_456], np.int32)
    expected = np.where(wavelengths <= longest, positions[:, None] / wavelengths % 1, 0)
    found = np.asarray(rope.rotary_angles(positions, 12, longest)) / (2 * np.pi) % 1
    np.testing.assert_allclose(np.exp(2j * np.pi * found), np.exp(2j * np.pi * expected), atol=1e-5)


def test_what_is_refused():
    allowed = r"model\.longest_wavelength = 6: must be 0, or an integer >= 7"
    with pytest.raises(ConfigError, match=allowed):
        ModelConfig(longest_wavelength=6)
    with pytest.raises(ConfigError, match=r"model\.longest_wavelength = 64: must be 0 for .* 'gated_deltanet'"):
        ModelConfig(architecture="gated_deltanet", longest_wavelength=64)


@pytest.mark.slow
def test_a_baseline_decodes_as_the_reference():
    """Windowed architectures: tests/test_options_together.py."""
    check_every_way(variant("transformer", hidden_depth=1), PROMPTS, FED, alone=(1, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "architecture"),
    [(decoder, "tlinformer"), (windowed, "tlinformer"), (history, "tlinformer"), (layered, "transformer")],
    ids=lambda value: value if isinstance(value, str) else value.__name__.rpartition(".")[2],
)
def test_a_path_that_rotates_all_pairs_is_caught(module, architecture, monkeypatch, own_traces):
    real = rope.rope_table
    monkeypatch.setattr(module, "rope_table", lambda positions, head_dim, longest: real(positions, head_dim))
    error, _ = compared(make_decoder(variant(architecture)), [3, 9], 15)
    assert error > 100 * TOLERANCE


def test_files_say_it(tmp_path):
    need_modules("safetensors", extra="convert")
    import safetensors

    variables = params_from_reference(golden.random_weights(SLOW), SLOW)
    for config in (SLOW, dataclasses.replace(SLOW, longest_wavelength=0)):
        path = tmp_path / f"{config.longest_wavelength}.safetensors"
        write_safetensors(path, params_to_reference(variables, config), config)
        jax.tree.map(np.testing.assert_array_equal, params_from_reference(read_weights(path), config), variables)
        with safetensors.safe_open(path, "numpy") as file:
            shape = json.loads(file.metadata()["tlinformer"])
        assert shape.get("longest_wavelength", 0) == config.longest_wavelength
