"""Converts between the published checkpoint's names and layouts and this library's parameters.

Published matrices are [out, in]. The feed-forward's w1 and w3 are separate there, and one `gate_up_kernel` here. The
tied table occurs twice there. No published model has the token shift, experts or Gated DeltaNet layers.
"""

import functools
import operator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from tlinformer_jax.config.delta import CONVOLUTION
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.errors import DataError

EMBEDDING, HEAD = "embedding.weight", "transformer.lm_head.weight"
SHIFT = "token_shift"
FINAL_NORM = {"norm_scale": "transformer.norm.weight", "norm_bias": "transformer.norm.bias"}


def params_from_reference(state_dict: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns Flax variables for `build_model(config).apply`, in float32, from a published checkpoint.

    The tied head may be missing. Raises a DataError that lists every missing, extra, misshapen or contradicting entry,
    and every entry with values that are not finite numbers.
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
    params |= {"shift": arrays[SHIFT]} if config.token_shift else {}
    for index, (path, prefix) in enumerate(layer_names(config)):
        names = _layer_arrays(config, index).items()
        layer = {ours: arrays[prefix + theirs].T.reshape(shape) for theirs, (ours, shape, _) in names}
        node = functools.reduce(lambda node, part: node.setdefault(part, {}), path, params)
        node |= _joined(layer, config)
    return {"params": jax.tree.map(lambda array: jax.numpy.asarray(array, np.float32), params)}


def params_to_reference(variables: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Maps published names to float32 arrays, including both tied entries."""
    params = jax.tree.map(lambda array: np.asarray(array, np.float32), variables["params"])
    arrays = {EMBEDDING: params["embedding"], HEAD: params["embedding"]}
    arrays |= {theirs: params[ours] for ours, theirs in FINAL_NORM.items()}
    arrays |= {SHIFT: params["shift"]} if config.token_shift else {}
    for index, (path, prefix) in enumerate(layer_names(config)):
        layer = _apart(functools.reduce(operator.getitem, path, params), config)
        for theirs, (ours, _, shape) in _layer_arrays(config, index).items():
            arrays[prefix + theirs] = np.ascontiguousarray(layer[ours].reshape(shape[::-1]).T)
    return arrays


def layer_names(config: ModelConfig) -> list[tuple[tuple[str, ...], str]]:
    """Returns each layer's path in the Flax parameters and its published prefix."""
    top = "transformer.transformer_layers"
    if not config.windowed:
        return [((f"layers_{i}",), f"{top}.{i}.") for i in range(config.num_layers)]
    hidden = [(f"hidden_{depth}", f"hidden_layers.{depth}") for depth in range(config.hidden_depth)]
    layers = [("compress", "compress_context_layer"), *hidden, ("restore", "restore_context_shape_layer")]
    blocks = range(config.num_blocks)
    return [((f"blocks_{block}", ours), f"{top}.{block}.{theirs}.") for block in blocks for ours, theirs in layers]


def reference_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns published names and shapes of a model's parameters."""
    table = (config.vocab_size, config.d_model)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: table, HEAD: table}
    shapes |= dict.fromkeys((*FINAL_NORM.values(), *(SHIFT,) * config.token_shift), (config.d_model,))
    for index, (_, prefix) in enumerate(layer_names(config)):
        shapes |= {prefix + name: shape for name, (_, _, shape) in _layer_arrays(config, index).items()}
    return shapes


def _layer_arrays(config: ModelConfig, index: int) -> dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Maps layer `index`'s published names to (our name, our shape, published shape).

    A published array has our order of numbers after transposition. For 'gate', 'up' and 'down' see `_joined`.
    """
    width, inner, heads = config.d_model, config.feed_forward_dim, (config.num_heads, config.head_dim)
    mixer: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
        "qkv_proj.weight": ("qkv_kernel", (width, 3, *heads), (3 * width, width)),
        "qkv_proj.bias": ("qkv_bias", (3, *heads), (3 * width,)),
    }
    if not config.attends(index):
        delta = config.delta
        inner, heads, all_heads = delta.feed_forward, (delta.heads, delta.width), delta.inner
        mixer = {
            "qkvg_proj.weight": ("qkvg_kernel", (width, 4, *heads), (4 * all_heads, width)),
            "conv.weight": ("conv_kernel", (CONVOLUTION, 3, *heads), (3 * all_heads, CONVOLUTION)),
            "rates_proj.weight": ("rates_kernel", (width, 2, delta.heads), (2 * delta.heads, width)),
            "A_log": ("A_log", (delta.heads,), (delta.heads,)),
            "dt_bias": ("dt_bias", (delta.heads,), (delta.heads,)),
            "head_norm.weight": ("head_norm_scale", (delta.width,), (delta.width,)),
        }
    feed_forward = {"ffn.router.weight": ("router_kernel", (width, config.num_experts), (config.num_experts, width))}
    feed_forward = feed_forward if config.mixture else {}
    for expert in _experts(config):
        feed_forward |= {
            f"ffn.{expert}w1.weight": (f"{expert}gate", (width, inner), (inner, width)),
            f"ffn.{expert}w2.weight": (f"{expert}down", (inner, width), (width, inner)),
            f"ffn.{expert}w3.weight": (f"{expert}up", (width, inner), (inner, width)),
        }
    return {
        "norm1.weight": ("norm1_scale", (width,), (width,)),
        "norm1.bias": ("norm1_bias", (width,), (width,)),
        **mixer,
        "out_proj.weight": ("out_kernel", (*heads, width), (width, heads[0] * heads[1])),
        "out_proj.bias": ("out_bias", (width,), (width,)),
        "norm2.weight": ("norm2_scale", (width,), (width,)),
        "norm2.bias": ("norm2_bias", (width,), (width,)),
        **feed_forward,
    }


def _experts(config: ModelConfig) -> list[str]:
    """Returns the prefixes of each expert's names; '' for a single feed-forward."""
    return [f"experts.{number}." for number in range(config.num_experts)] if config.mixture else [""]


def _joined(layer: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns a layer's parameters with 'gate' and 'up' of all experts in one array."""
    experts = _experts(config)
    gate_up = [np.stack([layer.pop(f"{expert}gate"), layer.pop(f"{expert}up")], axis=1) for expert in experts]
    down = [layer.pop(f"{expert}down") for expert in experts]
    if config.mixture:
        return layer | {"experts_gate_up_kernel": np.stack(gate_up), "experts_down_kernel": np.stack(down)}
    return layer | {"gate_up_kernel": gate_up[0], "down_kernel": down[0]}


def _apart(layer: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Inverts `_joined`."""
    if config.mixture:
        gate_up, down = layer["experts_gate_up_kernel"], layer["experts_down_kernel"]
    else:
        gate_up, down = layer["gate_up_kernel"][None], layer["down_kernel"][None]
    parts = dict(layer)
    for number, expert in enumerate(_experts(config)):
        parts |= {f"{expert}gate": gate_up[number, :, 0], f"{expert}up": gate_up[number, :, 1]}
        parts[f"{expert}down"] = down[number]
    return parts


def _bad_values(name: str, array: np.ndarray | None, shape: tuple[int, ...]) -> str:
    """Says what is wrong with the values of an array of the right shape; '' if nothing is."""
    if array is None or array.shape != shape:
        return ""
    if not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
        return f"{name} has dtype {array.dtype}, must be floating point"
    with np.errstate(over="ignore"):
        finite = bool(np.isfinite(array.astype(np.float32)).all())
    return "" if finite else f"{name} has values that are not finite in float32"
