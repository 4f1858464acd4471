"""Records of runs that were never run."""

import json
import pathlib
from typing import Any

from tlinformer_jax.config.run import run_config

BASE = {
    "model": {"architecture": "transformer", "vocab_size": 257, "d_model": 16, "num_heads": 2, "d_ff": 32},
    "train": {"steps": 100, "batch_size": 8},
    "data": {"dataset": "pydoc", "tokenizer": "bytes", "sequence_length": 1024},
}

# What the action `history` measures.
MEASURED = {
    "length": 12,
    "samples": 2,
    "starts": [0, 4, 8],
    "tokens": [8, 8, 0],
    "losses": {"0": [3.0, 3.5, None], "all": [3.0, 2.5, None]},
    "cuts": [{"distance": 0, "loss": 3.25, "change": 0.5, "affected_tokens": 8, "affected_change": 1.0}],
    "same_tokens": {"tokens": 16, "distances": [0, None], "losses": [3.25, 2.75]},
    "mass": {"edges": [1, 2, 4], "x": [[0.25, 0.75], [0.5, 0.5]], "z": [[0.1, 0.9], [0.2, 0.8]]},
    "share": [0.25, 0.5],
}


def made_result(name: str, perplexity: float, seed: int = 0, point: str | None = None, **parts: Any) -> dict[str, Any]:
    """A record; `model`, `train` and `data` in `parts` change fields of BASE, all else is part of the record."""
    sections = {
        "model": BASE["model"] | parts.pop("model", {}),
        "train": BASE["train"] | {"seed": seed} | parts.pop("train", {}),
        "data": BASE["data"] | parts.pop("data", {}),
    }
    return {
        "format": "tlinformer_jax run 1",
        "name": name,
        "study": "architectures",
        "sweep": None,
        "point": point,
        "overrides": {},
        "seed": seed,
        "command": "python -m tlinformer_jax.main --then=",
        "version": "0",
        "jax": "1.2.3",
        "device": {"kind": "Abacus", "platform": "cpu", "count": 2},
        "config": run_config(sections).to_dict(),
        "parameters": 1234,
        "steps": 100,
        "tokens": 3_000_000,
        "seconds": {"wall": 61.0},
        "attempts": 1,
        "speed": {"tokens_per_second": 60_000.0, "mfu": 0.25},
        "peak_bytes": 2_500_000_000,
        "cache": {"used": 1_500_000, "allocated": 2_000_000, "paper": None, "dtype": "float32"},
        "validation": {"loss": 3.0, "perplexity": perplexity, "bits_per_byte": 1.5},
        "history": [[50, 4.0], [100, 3.0]],
        "then": {},
        **parts,
    }


def as_earlier(result: dict[str, Any]) -> dict[str, Any]:
    """Changes a record to the fields that records had before train.stop_at_accuracy, cache_dir and mesh moved."""
    config = result["config"]
    steps, _, accuracy = str(config["train"]["steps"]).partition("@")
    del config["train"]["mesh"]
    config["train"] |= {"steps": int(steps), "stop_at_accuracy": float(accuracy or 0)}
    config["data"]["cache_dir"] = "/elsewhere"
    config["mesh"] = {"fsdp": 2, "tensor": 1, "window": 1}
    return result


def windows_result(history: int | str, generation: int, perplexity: float, seed: int = 0) -> dict[str, Any]:
    """The record of a point of a sweep of windows."""
    point = f"{history}-{generation}"
    model = {"architecture": "tlinformer", "history_window": history, "generation_window": generation}
    return made_result(
        f"{point}-seed{seed}", perplexity, seed, point, study="windows", sweep="sweep_windows", model=model
    )


def save(folder: pathlib.Path, *results: dict[str, Any]) -> None:
    """Writes records as a report reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        (folder / f"{result['name']}.json").write_text(json.dumps(result))
