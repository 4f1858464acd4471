"""Generation: caches, prefill, step and slide, sampling, the generator.

The names below are imported on first use, so that importing the package is cheap.
"""

import importlib
from typing import Any

_HOMES = {
    "CacheWarning": "tlinformer_jax.decoding.generator",
    "Decoder": "tlinformer_jax.decoding.decoder",
    "Generation": "tlinformer_jax.decoding.stream",
    "GenerationConfig": "tlinformer_jax.decoding.sampling",
    "Generator": "tlinformer_jax.decoding.generator",
    "Piece": "tlinformer_jax.decoding.stream",
    "Stream": "tlinformer_jax.decoding.stream",
    "cache_bytes": "tlinformer_jax.decoding.cache",
    "context_mesh": "tlinformer_jax.decoding.spread",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tlinformer_jax.decoding' has no attribute {name!r}")
