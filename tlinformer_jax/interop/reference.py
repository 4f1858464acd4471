"""The published checkpoint's names and layouts, to and from this library's parameters.

The published matrices are [out, in]; query, key and value share one projection in this order; w1 and w3 of the
feed-forward, separate there, are `gate_up_kernel` here. The tied table appears twice there, as
`embedding.weight` and as `transformer.lm_head.weight`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.errors import DataError

EMBEDDING, HEAD = "embedding.weight", "transformer.lm_head.weight"
FINAL_NORM = {"norm_scale": "transformer.norm.weight", "norm_bias": "transformer.norm.bias"}


def params_from_reference(state_dict: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Flax variables from a published checkpoint.

    Args:
      state_dict: published names to arrays (anything NumPy converts). The tied head may be left out; if there, it
        must equal the embedding.
      config: of the model the checkpoint belongs to.

    Returns:
      {"params": ...} for `build_model(config).apply`, in config.param_dtype.

    Raises:
      DataError: one message that lists every missing, extra, misshapen or contradicting entry, and every one that
        holds other things than finite numbers.
    """
    arrays = {name: np.asarray(array) for name, array in state_dict.items()}
    shapes = reference_shapes(config)
    faults = [f"missing {name}" for name in shapes if name not in arrays and name != HEAD]
    faults += [f"unknown {name}" for name in arrays if name not in shapes]
    faults += [
        f"{name} has shape {list(arrays[name].shape)}, must be {list(shape)}"
        for name, shape in shapes.items()
        if name in arrays and arrays[name].shape != shape
    ]
    faults += [fault for name, shape in shapes.items() if (fault := _bad_values(name, arrays.get(name), shape))]
    if not faults and HEAD in arrays and not np.array_equal(arrays[HEAD], arrays[EMBEDDING]):
        faults.append(f"{HEAD} differs from {EMBEDDING}, but the model ties them")
    if faults:
        raise DataError(f"state_dict does not fit the model ({len(faults)} faults): " + "; ".join(faults))

    params: dict[str, Any] = {"embedding": arrays[EMBEDDING]}
    params |= {ours: arrays[theirs] for ours, theirs in FINAL_NORM.items()}
    for path, prefix in layer_names(config):
        layer = _layer_from_reference(arrays, prefix, config)
        node = params
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = layer
    dtype = np.dtype(config.param_dtype) if config.param_dtype == "float32" else jax.numpy.dtype(config.param_dtype)
    return {"params": jax.tree.map(lambda array: jax.numpy.asarray(array, dtype), params)}


def params_to_reference(variables: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """The inverse of `params_from_reference`: published names to float32 NumPy arrays, both tied entries included."""
    params = jax.tree.map(lambda array: np.asarray(array, np.float32), variables["params"])
    arrays = {EMBEDDING: params["embedding"], HEAD: params["embedding"]}
    arrays |= {theirs: params[ours] for ours, theirs in FINAL_NORM.items()}
    for path, prefix in layer_names(config):
        node = params
        for part in path:
            node = node[part]
        arrays |= _layer_to_reference(node, prefix, config)
    return arrays


def layer_names(config: ModelConfig) -> list[tuple[tuple[str, ...], str]]:
    """For every layer its path in the Flax parameters and its published prefix."""
    top = "transformer.transformer_layers"
    if not config.windowed:
        return [((f"layers_{i}",), f"{top}.{i}.") for i in range(config.num_layers)]
    names: list[tuple[tuple[str, ...], str]] = []
    for block in range(config.num_blocks):
        names.append(((f"blocks_{block}", "compress"), f"{top}.{block}.compress_context_layer."))
        names += [
            ((f"blocks_{block}", f"hidden_{depth}"), f"{top}.{block}.hidden_layers.{depth}.")
            for depth in range(config.hidden_depth)
        ]
        names.append(((f"blocks_{block}", "restore"), f"{top}.{block}.restore_context_shape_layer."))
    return names


def reference_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a model's parameters."""
    width, inner = config.d_model, config.feed_forward_dim
    layer = {
        "norm1.weight": (width,),
        "norm1.bias": (width,),
        "qkv_proj.weight": (3 * width, width),
        "qkv_proj.bias": (3 * width,),
        "out_proj.weight": (width, width),
        "out_proj.bias": (width,),
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "ffn.w1.weight": (inner, width),
        "ffn.w2.weight": (width, inner),
        "ffn.w3.weight": (inner, width),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, width), HEAD: (config.vocab_size, width)}
    shapes |= dict.fromkeys(FINAL_NORM.values(), (width,))
    for _, prefix in layer_names(config):
        shapes |= {prefix + name: shape for name, shape in layer.items()}
    return shapes


def _bad_values(name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> str:
    """What is wrong with the values of an array of the right shape; '' if nothing is."""
    if array is None or array.shape != shape:
        return ""
    if not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
        return f"{name} has dtype {array.dtype}, must be floating point"
    with np.errstate(over="ignore"):
        finite = bool(np.isfinite(array.astype(np.float32)).all())
    return "" if finite else f"{name} holds values that are no finite float32"


def _layer_from_reference(arrays: Mapping[str, np.ndarray], prefix: str, config: ModelConfig) -> dict[str, np.ndarray]:
    width, heads, head_dim = config.d_model, config.num_heads, config.head_dim
    gate, up = arrays[prefix + "ffn.w1.weight"].T, arrays[prefix + "ffn.w3.weight"].T
    return {
        "norm1_scale": arrays[prefix + "norm1.weight"],
        "norm1_bias": arrays[prefix + "norm1.bias"],
        "qkv_kernel": arrays[prefix + "qkv_proj.weight"].T.reshape(width, 3, heads, head_dim),
        "qkv_bias": arrays[prefix + "qkv_proj.bias"].reshape(3, heads, head_dim),
        "out_kernel": arrays[prefix + "out_proj.weight"].T.reshape(heads, head_dim, width),
        "out_bias": arrays[prefix + "out_proj.bias"],
        "norm2_scale": arrays[prefix + "norm2.weight"],
        "norm2_bias": arrays[prefix + "norm2.bias"],
        "gate_up_kernel": np.stack([gate, up], axis=1),
        "down_kernel": arrays[prefix + "ffn.w2.weight"].T,
    }


def _layer_to_reference(layer: Mapping[str, np.ndarray], prefix: str, config: ModelConfig) -> dict[str, np.ndarray]:
    width = config.d_model
    entries = {
        "norm1.weight": layer["norm1_scale"],
        "norm1.bias": layer["norm1_bias"],
        "qkv_proj.weight": layer["qkv_kernel"].reshape(width, -1).T,
        "qkv_proj.bias": layer["qkv_bias"].reshape(-1),
        "out_proj.weight": layer["out_kernel"].reshape(-1, width).T,
        "out_proj.bias": layer["out_bias"],
        "norm2.weight": layer["norm2_scale"],
        "norm2.bias": layer["norm2_bias"],
        "ffn.w1.weight": layer["gate_up_kernel"][:, 0].T,
        "ffn.w3.weight": layer["gate_up_kernel"][:, 1].T,
        "ffn.w2.weight": layer["down_kernel"].T,
    }
    return {prefix + name: np.ascontiguousarray(array) for name, array in entries.items()}
