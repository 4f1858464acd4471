"""TLinFormer in JAX and Flax: exact softmax attention to the whole history, with a small cache.

    from tlinformer_jax import ModelConfig, build_model

The names below are imported at first use, so that light modules (tokenisation workers, `--help`) start without JAX.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
_HOMES = {
    "ModelConfig": "tlinformer_jax.models",
    "build_model": "tlinformer_jax.models",
    "DualWindowBlock": "tlinformer_jax.models",
    "LanguageModel": "tlinformer_jax.models",
    "train_and_evaluate": "tlinformer_jax.training.loop",
    "TokenFile": "tlinformer_jax.data.given",
    "Callback": "tlinformer_jax.training.callbacks",
    "Call": "tlinformer_jax.training.callbacks",
    "TrainingView": "tlinformer_jax.training.callbacks",
    "WandB": "tlinformer_jax.training.wandb",
    "load_run": "tlinformer_jax.training.checkpoint",
    "TrainedRun": "tlinformer_jax.training.setup",
    "evaluate_run": "tlinformer_jax.evaluation.report",
    "text_perplexity": "tlinformer_jax.evaluation.report",
    "TextFigures": "tlinformer_jax.evaluation.report",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tlinformer_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
