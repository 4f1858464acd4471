"""The PyTorch file against the published models, the NumPy reference and the JAX models."""

import dataclasses
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.support import golden, reference
from tests.support.optional import need_modules
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.config.run import load_config, run_config
from tlinformer_jax.interop import params_from_reference, params_to_reference
from tlinformer_jax.interop.files import write_safetensors
from tlinformer_jax.models.rope import rope_table
from tlinformer_jax.training.conversion import weights_to_workdir, workdir_to_weights

pytestmark = pytest.mark.slow  # .ci/run installs torch for these alone
needs_golden = pytest.mark.skipif(not golden.available(), reason=f"no golden files in {golden.FOLDER}")
TOLERANCE = 1e-4


@pytest.fixture
def torch():
    need_modules("torch", extra="torch")
    need_modules("safetensors", extra="convert")
    import torch

    return torch


def published(weights):
    return weights | {"transformer.lm_head.weight": weights["embedding.weight"]}


def loaded(path: pathlib.Path, weights, config: ModelConfig):
    """The PyTorch model of weights that were written as `convert` writes them."""
    from tlinformer_jax.interop.pytorch import from_safetensors

    write_safetensors(path / "model.safetensors", published(weights), config)
    return from_safetensors(path / "model.safetensors")


def jax_logits(weights, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(build_model(config).apply)(params_from_reference(weights, config), tokens))


@needs_golden
@pytest.mark.parametrize("name", golden.NAMES)
def test_golden(name, torch, tmp_path):
    """Logits, loss, gradients and the greedy continuation of the published models."""
    truth = golden.load(name)
    model = loaded(tmp_path, truth.params, truth.config)
    logits = model(torch.from_numpy(truth.inputs).long())
    np.testing.assert_allclose(logits.detach().numpy(), truth.logits, atol=TOLERANCE, rtol=0)
    ours = jax_logits(truth.params, truth.config, truth.inputs)
    np.testing.assert_allclose(logits.detach().numpy(), ours, atol=TOLERANCE, rtol=0)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(truth.labels).long().flatten())
    assert abs(loss.item() - truth.loss) < 1e-5
    loss.backward()
    found = {name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert set(found) == set(truth.gradients)
    for key, value in truth.gradients.items():
        assert np.linalg.norm(found[key] - value) < 1e-4 * np.linalg.norm(value), key
    prompt = torch.from_numpy(truth.greedy[:, : truth.prompt_length]).long()
    generated = model.generate(prompt, truth.greedy.shape[1] - truth.prompt_length)
    np.testing.assert_array_equal(generated.numpy(), truth.greedy)


# architecture, hidden_depth, history_window, generation_window, length; then options that are on
SHAPES = [
    ("tlinformer", 0, 3, 5, 23),
    ("tlinformer", 2, 9, 4, 19),
    ("tlinformer", 1, "auto", 6, 67),
    ("tlinformer", 1, 3, 1, 9),
    ("tlinformer", 1, 3, 50, 12),
    ("tconstformer", 1, 5, 4, 22),
    ("tconstformer", 0, "auto", 8, 41),
    ("transformer", 1, 5, 4, 22),
    ("sliding_window", 1, 5, 4, 22),
    ("sliding_window", 0, 3, 1, 17),
    ("tlinformer", 1, 3, 4, 22, "shift"),
    ("tconstformer", 1, 5, 4, 22, "shift"),
    ("transformer", 0, 5, 4, 22, "shift"),
    ("sliding_window", 0, 5, 4, 22, "shift"),
    ("tlinformer", 1, 3, 4, 22, "wavelength"),
    ("tconstformer", 0, 5, 4, 22, "wavelength"),
    ("transformer", 0, 5, 4, 22, "wavelength"),
    ("tlinformer", 1, 3, 4, 22, "shift", "overlap", "taps"),
    ("tconstformer", 0, "auto", 4, 22, "overlap"),
    ("tlinformer", 1, 6, 4, 22, "causal", "shift", "taps"),
    ("tlinformer", 0, 3, 5, 22, "causal", "shift", "taps", "deep"),
    ("tlinformer", 0, "auto", 6, 67, "causal", "taps", "deep"),
    ("tlinformer", 0, "auto", 1, 9, "causal"),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_every_architecture(shape, torch, tmp_path):
    """Logits as the reference's and ours; tokens generated with a cache as without."""
    architecture, hidden_depth, history_window, generation_window, length, *options = shape
    config = ModelConfig(
        architecture=architecture, vocab_size=41, d_model=24, num_heads=2, num_blocks=2 + 2 * ("deep" in options),
        hidden_depth=hidden_depth, d_ff=40, history_window=history_window, generation_window=generation_window,
        token_shift="shift" in options, key_taps=3 * ("taps" in options), window_overlap=3 * ("overlap" in options),
        longest_wavelength=20 * ("wavelength" in options), causal_history="causal" in options, dtype="float32",
    )  # fmt: skip
    weights = golden.random_weights(config, seed=length)
    model = loaded(tmp_path, weights, config)
    tokens = np.random.default_rng(length).integers(0, 41, (2, length))
    logits = model(torch.from_numpy(tokens)).detach().numpy()
    truth = reference.logits(weights, config, tokens)
    assert truth.std() > 0.5
    np.testing.assert_allclose(logits, truth, atol=TOLERANCE, rtol=0)
    if config.causal_history or not config.windowed:  # the others are compared above, and take long to compile
        np.testing.assert_allclose(logits, jax_logits(weights, config, tokens), atol=TOLERANCE, rtol=0)
    prompt = torch.from_numpy(tokens[:, :3])
    generated = model.generate(prompt, 15)
    assert generated[:, :3].equal(prompt)
    assert generated[:, 3:].equal(model(generated).argmax(-1)[:, 2:-1])
    assert len(set(generated.flatten().tolist())) > 5


def test_positions_are_exact_where_float32_is_not(torch):
    from tlinformer_jax.interop.pytorch import Config, rotations

    config = Config("tlinformer", 1, 36, 1, 1, 0, 1, 8, 8)
    for start in (0, 1_000_000, 2**31 - 9):
        exact = rope_table(np.arange(start, start + 8).astype(np.int32), 36)
        found = rotations(config, start + 8, start).numpy()
        np.testing.assert_allclose(found, [exact.cos, exact.sin], atol=2e-6, rtol=0)


SMALL = ModelConfig(
    vocab_size=257, d_model=24, num_heads=2, num_blocks=2, hidden_depth=1, history_window=4, generation_window=8,
    dtype="float32", dropout=0.1,
)  # fmt: skip


def test_a_trained_model_goes_there_and_comes_back(torch, tmp_path):
    """From a working directory to PyTorch, a step of training with dropout there, and back; d_ff by the rule."""
    from tlinformer_jax.interop.pytorch import from_safetensors

    write_safetensors(tmp_path / "x.safetensors", published(golden.random_weights(SMALL)))
    config = run_config({"model": dataclasses.asdict(SMALL), "data": {"sequence_length": 16}})
    weights_to_workdir(tmp_path / "x.safetensors", config, tmp_path / "run")
    workdir_to_weights(tmp_path / "run", tmp_path / "y.safetensors")
    model = from_safetensors(tmp_path / "y.safetensors")
    tokens = torch.arange(60).reshape(2, 30)
    before = model(tokens)
    assert model(tokens).equal(before)
    model.train()
    assert not model(tokens).equal(model(tokens))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    optimizer.step()
    torch.save(model.state_dict(), tmp_path / "trained.pt")
    weights_to_workdir(tmp_path / "trained.pt", config, tmp_path / "back")
    workdir_to_weights(tmp_path / "back", tmp_path / "back.safetensors")
    trained = model.eval()(tokens).detach().numpy()
    assert abs(trained - before.detach().numpy()).max() > 0.01
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    ours = jax_logits(weights, load_config(tmp_path / "back").model, tokens.numpy())
    np.testing.assert_allclose(trained, ours, atol=TOLERANCE, rtol=0)
    assert from_safetensors(tmp_path / "back.safetensors")(tokens).detach().numpy() == pytest.approx(trained)


def test_a_new_model_begins_as_ours(torch):
    from tlinformer_jax.interop.pytorch import Config, LanguageModel

    fields = {"vocab_size": 500, "d_model": 96, "num_heads": 4, "num_blocks": 2, "hidden_depth": 2, "d_ff": 256}
    fields |= {"key_taps": 2}
    config = Config("tlinformer", **fields, history_window=8, generation_window=8)
    ours = jax.jit(build_model(ModelConfig(**fields)).init)(jax.random.key(0), np.zeros((1, 1), np.int32))
    ours = params_to_reference(ours, ModelConfig(**fields))
    found = {name: tensor.numpy() for name, tensor in LanguageModel(config).state_dict().items()}
    assert {name: array.shape for name, array in found.items()} == {name: array.shape for name, array in ours.items()}
    for name, array in found.items():
        assert array.mean() == pytest.approx(ours[name].mean(), abs=2e-3), name
        assert array.std() == pytest.approx(ours[name].std(), rel=0.05), name


def test_the_file_alone(torch, tmp_path):
    """Copied elsewhere it needs neither this package nor JAX nor safetensors."""
    model = loaded(tmp_path, golden.random_weights(SMALL), SMALL)
    from tlinformer_jax.interop import pytorch

    shutil.copy(pytorch.__file__, tmp_path / "copied.py")
    others = ("tlinformer_jax", "jax", "flax", "safetensors", "ml_dtypes")
    script = f"""
import sys
sys.modules.update(dict.fromkeys({others}))
import torch
from copied import from_safetensors
model = from_safetensors("model.safetensors")
torch.save(model(torch.arange(60).reshape(2, 30)), "logits.pt")
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)
    logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(logits, model(torch.arange(60).reshape(2, 30)), rtol=0, atol=1e-6)


def test_a_file_that_does_not_say_what_it_is_of(torch, tmp_path):
    from tlinformer_jax.interop.pytorch import from_safetensors

    path = tmp_path / "x.safetensors"
    weights = published(golden.random_weights(SMALL))
    write_safetensors(path, weights)
    with pytest.raises(ValueError, match="give config=Config"):
        from_safetensors(path)
    config = loaded(tmp_path, weights, SMALL).config
    assert from_safetensors(path, config).embedding.weight.detach().numpy() == pytest.approx(
        weights["embedding.weight"]
    )


def test_a_damaged_file_is_named(torch, tmp_path):
    from tlinformer_jax.interop.pytorch import read_safetensors

    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.ones(8, np.float32), "b": np.ones(8, np.int32)})
    whole = path.read_bytes()
    for content in (whole, whole[:-50], whole[:5], b"", b"\xff" * 8 + whole[8:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.safetensors: must be a whole safetensors file, of F64, .* cannot be"):
            read_safetensors(path)
