"""Architectures: configuration, the layer, attention, the dual-window block, the four models.

The names below are imported on first use: configuration alone does not need JAX.
"""

import importlib
from typing import Any

_HOMES = {
    "DualWindowBlock": "tlinformer_jax.models.block",
    "LanguageModel": "tlinformer_jax.models.model",
    "ModelConfig": "tlinformer_jax.config.model",
    "ModelParams": "tlinformer_jax.models.model",
    "build_model": "tlinformer_jax.models.model",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tlinformer_jax.models' has no attribute {name!r}")
