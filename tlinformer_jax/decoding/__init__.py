"""From a prompt to text, with a cache.

generator  prompts in, tokens or text out
stream     a running generation: when the host calls the device, when a window slides
decoder    the token step, the loop on the device, one interface to all architectures
windowed   `prefill` and `slide` of TLinFormer and TConstFormer
history    C in `prefill` and `slide`, in chunks of rows
layered    `prefill` of the baselines
cache      types and sizes of the caches
memory     bytes of a cache
spread     generation on several devices
sampling   options, and sampling of the next token
params     parameters in the form that the decoder reads

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
    "cache_bytes": "tlinformer_jax.decoding.memory",
    "context_mesh": "tlinformer_jax.decoding.spread",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'tlinformer_jax.decoding' has no attribute {name!r}")
