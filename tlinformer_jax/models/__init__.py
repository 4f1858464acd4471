"""The architectures, from the paper's block to logits.

block             compress, hidden, restore: the paper's equations
causal_history    the same three of a history that is computed like the window
streams           z and x with their projections
history           C of training: how a block reads it and restores it
windows           positions of generation windows, and their rows
layers            the layer of all architectures: parameters, dropout, `project`, `update`
attention, rope   softmax attention, rotary positions
key_rows          what keys know of the tokens before theirs: token shift and key taps
feed_forward      the feed-forward of a layer, which may be a mixture of experts
tlinformer        a window through all blocks; all windows of a sequence
paired            all windows of a sequence in pairs, of a long history and a short one
recompute         loops whose gradients need the memory of one step
delta             the mixer of Gated DeltaNet
model             the whole model, and the baselines' layers
cached_attention  the layer of a generated token; writing and reading many cached rows
cached_rows       attention of a generated token to cached rows

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
