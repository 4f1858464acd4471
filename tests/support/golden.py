"""Golden values of the published models, and random weights of the same scale."""

import dataclasses
import json
import os
import pathlib

import jax
import numpy as np

from tlinformer_jax import ModelConfig
from tlinformer_jax.interop.reference import published_views
from tlinformer_jax.models.model import parameter_shapes

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = pathlib.Path(os.environ.get("TLINFORMER_GOLDEN", ROOT.parent / "shared" / "golden"))
NAMES = ("base_small", "tconst_small", "tlin_asym", "tlin_auto", "tlin_minimal", "tlin_small")
KINDS = {"tlin": "tlinformer", "tconst": "tconstformer", "base": "transformer"}


@dataclasses.dataclass(frozen=True)
class Golden:
    """One golden file; see the golden folder's README for its fields."""

    config: ModelConfig
    inputs: np.ndarray
    labels: np.ndarray
    logits: np.ndarray
    loss: float
    params: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    prompt_length: int
    greedy: np.ndarray


def available() -> bool:
    return all((FOLDER / f"{name}.npz").is_file() for name in NAMES)


def load(name: str, **overrides) -> Golden:
    """Reads one golden file; `overrides` are fields of its ModelConfig."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = dict(file)
    meta = json.loads(str(arrays["meta"]))
    base = meta["kind"] == "base"
    fields = {
        "architecture": KINDS[meta["kind"]],
        "vocab_size": meta["vocab"],
        "d_model": meta["d_model"],
        "num_heads": meta["heads"],
        # the file counts a baseline's layers; here they are num_blocks * (hidden_depth + 2)
        "num_blocks": 1 if base else meta["blocks"],
        "hidden_depth": (meta["blocks"] if base else meta["inner_depth"]) - 2,
        "history_window": meta["w_oh"] or 8,
        "generation_window": meta["w_og"] or 8,
        "dtype": "float32",
    }
    return Golden(
        config=ModelConfig(**(fields | overrides)),
        inputs=arrays["tokens"][:, :-1],
        labels=arrays["tokens"][:, 1:],
        logits=arrays["logits"],
        loss=float(arrays["loss"]),
        params={key.removeprefix("param/"): value for key, value in arrays.items() if key.startswith("param/")},
        gradients={key.removeprefix("grad/"): value for key, value in arrays.items() if key.startswith("grad/")},
        prompt_length=int(arrays["prompt_len"]),
        greedy=arrays["greedy"],
    )


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a model's parameters."""
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), parameter_shapes(config))
    return {name: view.shape for name, view in published_views(zeros, config).items()}


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Published-name weights so large that every connection moves the logits, like the golden files'."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in published_shapes(config).items():
        if name.endswith(("norm1.weight", "norm2.weight")) or name == "transformer.norm.weight":
            value = 1 + 0.1 * rng.standard_normal(shape)
        elif name.endswith("head_norm.weight"):  # small: outputs near 0 are divided by their size, and so is rounding
            value = 0.1 + 0.01 * rng.standard_normal(shape)
        elif name.endswith("dt_bias"):  # heads that forget at different rates, from half a row to a dozen rows
            value = rng.uniform(-2.5, 0.5, shape)
        elif len(shape) == 1 or name.endswith("key_taps"):  # s of the order of 1, like the embeddings
            value = 0.1 * rng.standard_normal(shape)
        elif name == "embedding.weight":
            value = rng.standard_normal(shape) * 0.5
        else:
            value = rng.standard_normal(shape) / np.sqrt(shape[1])
        weights[name] = value.astype(np.float32)
    weights["transformer.lm_head.weight"] = weights["embedding.weight"]
    return weights
