"""Generation: caches, prefill, step and slide, sampling, the generator.

The names below are imported on first use, so that importing the package is cheap.
"""

import importlib
from typing import Any

_HOMES = {
    "CacheWarning": "generator",
    "Decoder": "decoder",
    "Generation": "stream",
    "GenerationConfig": "sampling",
    "Generator": "generator",
    "Piece": "stream",
    "Stream": "stream",
    "cache_bytes": "cache",
    "context_mesh": "spread",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
