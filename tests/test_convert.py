"""python -m tlinformer_jax convert: published weights to a working directory and back."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.support import golden, reference
from tests.support.commands import check_refusal, in_forks
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.config.run import load_config, run_config
from tlinformer_jax.data.tokenizers import load_tokenizer
from tlinformer_jax.decoding import Generator
from tlinformer_jax.errors import DataError
from tlinformer_jax.interop import params_from_reference
from tlinformer_jax.training.checkpoint import restore_params
from tlinformer_jax.training.conversion import weights_to_workdir, workdir_to_weights
from tlinformer_jax.training.setup import build_run

safetensors = pytest.importorskip("safetensors.numpy")
pytest.importorskip("tokenizers")
needs_golden = pytest.mark.skipif(not golden.available(), reason=f"no golden files in {golden.FOLDER}")

SMALL = ModelConfig(
    vocab_size=257, d_model=24, num_heads=2, num_blocks=2, hidden_depth=1, d_ff=40, history_window=4,
    generation_window=8, dtype="float32",
)  # fmt: skip
TEXT = "The quick brown fox jumps over the lazy dog, again and again. " * 4


def word_tokenizer(path: pathlib.Path, size: int) -> pathlib.Path:
    """A tokenizer.json of `size` entries, as the golden models' vocabularies are smaller than the bytes."""
    vocabulary = {f"w{number}": number for number in range(size - 1)} | {"<|endoftext|>": size - 1}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    path.write_text(json.dumps({"version": "1.0", "model": model, "pre_tokenizer": {"type": "Whitespace"}}))
    return path


def run_of(model: ModelConfig, **data):
    return run_config({"model": dataclasses.asdict(model), "data": {"sequence_length": 16, **data}})


def restored(workdir: pathlib.Path):
    """Parameters of the working directory's last checkpoint."""
    run = build_run(load_config(workdir), load_tokenizer(workdir))
    return restore_params(workdir, run.abstract_state.params)[1]


@needs_golden
@pytest.mark.parametrize(
    "name",
    [
        "tlin_minimal",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("tlin_small", "tconst_small", "base_small")),
    ],
)
def test_golden_weights_there_and_back(name, tmp_path):
    truth = golden.load(name)
    weights = truth.params | {"transformer.lm_head.weight": truth.params["embedding.weight"]}
    tokenizer = word_tokenizer(tmp_path / "words.json", truth.config.vocab_size)
    safetensors.save_file(weights, tmp_path / "published.safetensors")
    config = run_of(truth.config, tokenizer=str(tokenizer))
    weights_to_workdir(tmp_path / "published.safetensors", config, tmp_path / "run")
    tokenizer.unlink()  # the working directory is complete by itself
    apply = jax.jit(build_model(load_config(tmp_path / "run").model).apply)
    logits = apply({"params": restored(tmp_path / "run")}, truth.inputs)
    np.testing.assert_allclose(np.asarray(logits), truth.logits, atol=2e-5, rtol=0)
    workdir_to_weights(tmp_path / "run", tmp_path / "again.safetensors")
    again = safetensors.load_file(tmp_path / "again.safetensors")
    assert set(again) == set(weights)
    for key, array in weights.items():
        assert again[key].dtype == np.float32
        assert again[key].tobytes() == array.tobytes(), key


@needs_golden
@pytest.mark.slow
@pytest.mark.parametrize("name", ["tlin_asym", "base_small"])
def test_golden_weights_generate(name, tmp_path):
    truth = golden.load(name)
    tokenizer = word_tokenizer(tmp_path / "words.json", truth.config.vocab_size)
    safetensors.save_file(truth.params, tmp_path / "published.safetensors")
    weights_to_workdir(
        tmp_path / "published.safetensors", run_of(truth.config, tokenizer=str(tokenizer)), tmp_path / "run"
    )
    prompt, continuation = np.split(truth.greedy, [truth.prompt_length], axis=1)
    found = Generator.from_workdir(tmp_path / "run").generate_tokens(prompt, max_new_tokens=continuation.shape[1])
    assert found == continuation.tolist()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float64, pytest.param(np.float16, marks=pytest.mark.slow)])
def test_other_dtypes(dtype, tmp_path):
    weights = {name: array.astype(dtype) for name, array in golden.random_weights(SMALL).items()}
    safetensors.save_file(weights, tmp_path / "published.safetensors")
    weights_to_workdir(tmp_path / "published.safetensors", run_of(SMALL), tmp_path / "run")
    workdir_to_weights(tmp_path / "run", tmp_path / "again.safetensors")
    again = safetensors.load_file(tmp_path / "again.safetensors")
    for name, array in weights.items():
        np.testing.assert_array_equal(again[name], array.astype(np.float32), err_msg=name)


def write_config(path: pathlib.Path, model: ModelConfig, data: dict) -> pathlib.Path:
    values = {"model": dataclasses.asdict(model), "data": data, "train": {"steps": 2, "batch_size": 4}}
    path.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({values!r})\n"
    )
    return path


@pytest.mark.slow
def test_the_commands(tmp_path):
    """Converted, evaluated (against the NumPy reference), generated from, trained on, and converted back."""
    weights = golden.random_weights(SMALL)
    safetensors.save_file(weights, tmp_path / "published.safetensors")
    (tmp_path / "text.txt").write_text(TEXT)
    text = str(tmp_path / "text.txt")
    data = {"dataset": "text", "train_files": text, "validation_files": text, "sequence_length": 32}
    config = write_config(tmp_path / "config.py", SMALL, data)
    workdir, file = f"--workdir={tmp_path}/run", f"{tmp_path}/again.safetensors"
    made, evaluated, generated, *_ = results = in_forks(
        [
            ("convert", [f"--from={tmp_path}/published.safetensors", f"--config={config}", workdir]),
            ("evaluate", [workdir, "--json"]),
            ("generate", [workdir, "--prompt=The quick", "--max_new_tokens=3", "--json"]),
            ("convert", [workdir, f"--to={file}"]),
            ("tlinformer_jax.main", [f"--config={config}", workdir]),
        ]
    )
    for result in results:
        assert result.returncode == 0, result.stderr
    assert f"{sum(array.size for name, array in weights.items() if 'lm_head' not in name):,} parameters" in made.stdout

    tokens = np.append(np.frombuffer(TEXT.encode(), np.uint8).astype(int), 256)
    rows = np.stack([tokens[start : start + 33] for start in range(0, len(tokens) - 32, 32)])
    truth = reference.mean_loss(reference.logits(weights, SMALL, rows[:, :-1]), rows[:, 1:])
    assert abs(json.loads(evaluated.stdout)["loss"] - truth) < 1e-4

    assert len(json.loads(generated.stdout)["tokens"]) >= 1

    again = safetensors.load_file(file)
    assert {name: array.tobytes() for name, array in again.items()} == {
        name: array.tobytes() for name, array in weights.items()
    }

    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["train/loss"] < 1.2 * truth  # of the published weights; of new ones it would be log(257)


def faulty(weights, **changes):
    """`weights` with entries changed; None takes one away."""
    return {name: array for name, array in (weights | changes).items() if array is not None}


NORM = "transformer.norm.bias"
QKV = "transformer.transformer_layers.0.compress_context_layer.qkv_proj.weight"
FAULTS = {
    "missing": ({NORM: None}, f"missing {NORM}"),
    "unknown": ({"rotary.inv_freq": np.zeros(3, np.float32)}, "unknown rotary.inv_freq"),
    "shape": ({QKV: np.zeros((71, 24), np.float32)}, f"{QKV} has shape [71, 24], must be [72, 24]"),
    "integers": ({NORM: np.zeros(24, np.int64)}, f"{NORM} has dtype int64"),
    "not finite": ({NORM: np.full(24, np.nan, np.float32)}, f"{NORM} has values that are not finite"),
    "too large": ({NORM: np.full(24, 1e300)}, f"{NORM} has values that are not finite"),
    "untied": ({"transformer.lm_head.weight": np.zeros((257, 24), np.float32)}, "but the model ties them"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_weights_that_do_not_fit(name, tmp_path):
    changes, message = FAULTS[name]
    safetensors.save_file(faulty(golden.random_weights(SMALL), **changes), tmp_path / "x.safetensors")
    with pytest.raises(DataError) as caught:
        weights_to_workdir(tmp_path / "x.safetensors", run_of(SMALL), tmp_path / "new" / "run")
    assert message in str(caught.value)
    assert str(tmp_path / "x.safetensors") in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors"]


def test_all_faults_are_in_one_message(tmp_path):
    changes = {NORM: None, QKV: np.zeros((2, 2), np.float32), "surplus": np.zeros(1, np.float32)}
    safetensors.save_file(faulty(golden.random_weights(SMALL), **changes), tmp_path / "x.safetensors")
    with pytest.raises(DataError, match="3 faults"):
        weights_to_workdir(tmp_path / "x.safetensors", run_of(SMALL), tmp_path / "run")


@pytest.mark.parametrize(("file", "model"), [("transformer", "tlinformer"), ("tlinformer", "transformer")])
def test_a_file_of_another_architecture_is_recognised(file, model, tmp_path):
    """A few of its many faults are named."""
    weights = golden.random_weights(dataclasses.replace(SMALL, architecture=file))
    safetensors.save_file(weights, tmp_path / "x.safetensors")
    run = run_of(dataclasses.replace(SMALL, architecture=model))
    with pytest.raises(DataError, match=r"[0-9]+ more\. The file holds a model with(out)? win.*--init_from") as caught:
        weights_to_workdir(tmp_path / "x.safetensors", run, tmp_path / "run")
    assert str(caught.value).count(";") == 8
    assert ("without windows" in str(caught.value)) == (file == "transformer")


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    safetensors.save_file(golden.random_weights(SMALL), tmp_path / "x.safetensors")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tlinformer_jax.training.conversion.save_config", full)
    with pytest.raises(DataError, match="No space left"):
        weights_to_workdir(tmp_path / "x.safetensors", run_of(SMALL), tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors"]


def test_an_empty_directory_is_taken_and_a_full_one_left_alone(tmp_path):
    safetensors.save_file(golden.random_weights(SMALL), tmp_path / "x.safetensors")
    (tmp_path / "run").mkdir()
    weights_to_workdir(tmp_path / "x.safetensors", run_of(SMALL), tmp_path / "run")
    before = (tmp_path / "run" / "config.json").stat().st_mtime_ns
    with pytest.raises(DataError, match="new or an empty directory"):
        weights_to_workdir(tmp_path / "x.safetensors", run_of(SMALL), tmp_path / "run")
    assert (tmp_path / "run" / "config.json").stat().st_mtime_ns == before
    params = params_from_reference(golden.random_weights(SMALL), SMALL)["params"]
    assert jax.tree.all(jax.tree.map(jnp.array_equal, restored(tmp_path / "run"), params))


def test_mistakes_get_one_line_and_status_2(tmp_path):
    config = write_config(tmp_path / "config.py", SMALL, {"sequence_length": 32})
    safetensors.save_file(faulty(golden.random_weights(SMALL), **{NORM: None}), tmp_path / "x.safetensors")
    workdir = f"--workdir={tmp_path}/run"
    # The other mistakes are among tests/support/bad_inputs.py's.
    faults, surplus = in_forks(
        [
            ("convert", [workdir, f"--from={tmp_path}/x.safetensors", f"--config={config}"]),
            ("convert", [workdir, f"--to={tmp_path}/y.safetensors", f"--config={config}"]),
        ]
    )
    check_refusal(faults, f"1 faults): missing {NORM}")
    check_refusal(surplus, "must be left out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.py", "x.safetensors"]
