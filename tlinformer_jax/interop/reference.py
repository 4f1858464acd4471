"""Converts between the published checkpoint's names and layouts and this library's parameters.

Published matrices are [out, in]. The feed-forward's w1 and w3 are separate there, and one `gate_up_kernel` here. The
tied table occurs twice there. No published model has the token shift, key taps, experts or Gated DeltaNet layers.
"""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.errors import DataError
from tlinformer_jax.models.feed_forward import EXPERTS
from tlinformer_jax.models.model import parameter_shapes

EMBEDDING, HEAD = "embedding.weight", "transformer.lm_head.weight"
TOP = {"transformer.norm.weight": "norm_scale", "transformer.norm.bias": "norm_bias", "token_shift": "shift"}
KEY_TAPS, TAPS = "key_taps", "taps"
# A layer's published names -> our name, and how many of our array's axes are inputs of a matrix (0: it is a vector).
# The feed-forward's matrices and the key taps are not listed.
LAYER = {
    "norm1.weight": ("norm1_scale", 0),
    "norm1.bias": ("norm1_bias", 0),
    "qkv_proj.weight": ("qkv_kernel", 1),
    "qkv_proj.bias": ("qkv_bias", 0),
    "qkvg_proj.weight": ("qkvg_kernel", 1),
    "conv.weight": ("conv_kernel", 1),
    "rates_proj.weight": ("rates_kernel", 1),
    "A_log": ("A_log", 0),
    "dt_bias": ("dt_bias", 0),
    "head_norm.weight": ("head_norm_scale", 0),
    "out_proj.weight": ("out_kernel", 2),
    "out_proj.bias": ("out_bias", 0),
    "norm2.weight": ("norm2_scale", 0),
    "norm2.bias": ("norm2_bias", 0),
    "ffn.router.weight": ("router_kernel", 1),
}


MOST_LISTED = 8  # faults of a file that a message names


def params_from_reference(state_dict: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns Flax variables for `build_model(config).apply`, in float32, from a published checkpoint.

    The tied head may be missing. Raises a DataError that lists missing, extra, misshapen or contradicting entries, and
    entries with values that are not finite numbers, at most MOST_LISTED; and says if they are another architecture's.
    """
    arrays = {name: np.asarray(array) for name, array in state_dict.items()}
    shapes = parameter_shapes(config)
    # Zeros that take no memory.
    views = published_views(jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes), config)
    faults = [f"missing {name}" for name in views if name not in arrays and name != HEAD]
    faults += [f"unknown {name}" for name in arrays if name not in views]
    for name, view in views.items():
        if name in arrays and (fault := _fault(arrays[name], view.shape)):
            faults.append(f"{name} {fault}")
    if not faults and HEAD in arrays and not np.array_equal(arrays[HEAD], arrays[EMBEDDING]):
        faults.append(f"{HEAD} differs from {EMBEDDING}, but the model ties them")
    if faults:
        more = [f"{len(faults) - MOST_LISTED} more"] if len(faults) > MOST_LISTED else []
        found = "; ".join(faults[:MOST_LISTED] + more)
        windowed = any("compress_context_layer" in name for name in arrays)
        if windowed != config.windowed:
            kind = "with windows" if windowed else "without windows, such as a Transformer"
            found += (
                f". The file holds a model {kind}: convert it with such a configuration, then train with --init_from"
            )
        raise DataError(f"state_dict does not fit the model ({len(faults)} faults): {found}")
    params = jax.tree.map(lambda leaf: np.empty(leaf.shape, np.float32), shapes)
    views = published_views(params, config)
    for name, array in arrays.items():
        views[name][...] = array
    return {"params": jax.tree.map(jnp.asarray, params)}


def params_to_reference(variables: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Maps published names to float32 arrays, including both tied entries."""
    params = jax.tree.map(lambda array: np.asarray(array, np.float32), variables["params"])
    return {name: np.ascontiguousarray(view) for name, view in published_views(params, config).items()}


def layer_names(config: ModelConfig) -> list[tuple[tuple[str, ...], str]]:
    """Returns each layer's path in the Flax parameters and its published prefix."""
    top = "transformer.transformer_layers"
    if not config.windowed:
        return [((f"layers_{i}",), f"{top}.{i}.") for i in range(config.num_layers)]
    hidden = [(f"hidden_{depth}", f"hidden_layers.{depth}") for depth in range(config.hidden_depth)]
    layers = [("compress", "compress_context_layer"), *hidden, ("restore", "restore_context_shape_layer")]
    blocks = range(config.num_blocks)
    return [((f"blocks_{block}", ours), f"{top}.{block}.{theirs}.") for block in blocks for ours, theirs in layers]


def published_views(params: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Maps published names to views of our arrays in the published layouts; writing to a view changes our array."""
    views = {EMBEDDING: params["embedding"], HEAD: params["embedding"]}
    views |= {theirs: params[ours] for theirs, ours in TOP.items() if ours in params}
    for path, prefix in layer_names(config):
        layer = functools.reduce(operator.getitem, path, params)
        for theirs, (ours, inputs) in LAYER.items():
            if ours in layer:
                matrix = layer[ours].reshape(-1, np.prod(layer[ours].shape[inputs:]))
                views[prefix + theirs] = matrix.T if inputs else matrix[0]
        if TAPS in layer:  # one vector after another, not a matrix
            views[prefix + KEY_TAPS] = layer[TAPS]
        name, experts = (EXPERTS, config.num_experts) if config.mixture else ("", 1)
        gate_up, down = (layer[name + kernel] for kernel in ("gate_up_kernel", "down_kernel"))
        gate_up, down = gate_up.reshape(experts, *gate_up.shape[-3:]), down.reshape(experts, *down.shape[-2:])
        for number in range(experts):
            own = f"{prefix}ffn.experts.{number}." if config.mixture else f"{prefix}ffn."
            views[f"{own}w1.weight"] = gate_up[number, :, 0].T
            views[f"{own}w2.weight"] = down[number].T
            views[f"{own}w3.weight"] = gate_up[number, :, 1].T
    return views


def _fault(array: np.ndarray, shape: tuple[int, ...]) -> str:
    """Says what is wrong with the shape or the values of an array; '' if nothing is."""
    if array.shape != shape:
        return f"has shape {list(array.shape)}, must be {list(shape)}"
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return f"has dtype {array.dtype}, must be floating point"
    with np.errstate(over="ignore"):
        finite = bool(np.isfinite(array.astype(np.float32)).all())
    return "" if finite else "has values that are not finite in float32"
