"""Bytes of a KV cache: allocated and in use, and by the paper's equation 7."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import Cache, LayeredCache, capacity_for, has_growing_rows, history_of, init_cache
from tlinformer_jax.decoding.sampling import INT8
from tlinformer_jax.kernels.key_value import SCALE_DTYPE


@dataclasses.dataclass(frozen=True)
class PartBytes:
    """Bytes of one part of a cache: allocated bytes, and how many of them are in use."""

    allocated: int
    used: int


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """Bytes of a cache on one device; if the history is split, on the first device, which has most rows.

    Attributes:
      parts: bytes by field of the cache; 'lengths' is the sum of the fields that count rows.
      paper: bytes on all devices together by the paper's equation 7, 2 * tokens * D * bytes * layers / (H + 2). For the
        baselines 2 * tokens * D * bytes * attention layers. None for caches that do not grow.
      devices: number of devices that the history is split over; each has all other parts whole.
      cache_dtype: 'auto', or 'int8' for the parts that grow; `parts` includes the scales of int8, `paper` does not.
    """

    parts: dict[str, PartBytes]
    paper: int | None
    devices: int = 1
    cache_dtype: str = "auto"

    @property
    def allocated(self) -> int:
        """Allocated bytes of all parts."""
        return sum(part.allocated for part in self.parts.values())

    @property
    def used(self) -> int:
        """Bytes in use in all parts."""
        return sum(part.used for part in self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {part.allocated:,}" for name, part in self.parts.items())
        devices = "" if self.devices == 1 else f"on each of {self.devices} devices "
        paper = "" if self.paper is None else f"; by the paper's formula {self.paper:,}"
        kept = "" if self.cache_dtype == "auto" else f"{self.cache_dtype}, "
        return f"{kept}{devices}{self.allocated:,} bytes ({parts}), of which {self.used:,} are in use{paper}"


def cache_bytes(config: ModelConfig, cache: Cache, lengths: Sequence[int]) -> CacheBytes:
    """Returns the bytes of a cache, which may be donated or abstract, for sequences of these lengths.

    Assumes that a full window has not slid yet.
    """
    tokens, devices, cache_dtype = sum(lengths), 1, cache.cache_dtype
    row, kept_row = row_bytes(config), row_bytes(config, cache_dtype)
    if isinstance(cache, LayeredCache):
        held = sum(min(length, cache.capacity) for length in lengths)
        used = {"layers": held * config.attention_layers * kept_row}
        arrays: dict[str, Any] = {"layers": cache.layers, "lengths": cache.length}
        arrays |= {"state": cache.state, "last": cache.last}
    else:
        devices = 1 if cache.split is None else cache.split.parts
        histories = [history_of(config, length) for length in lengths]
        kept = sum(-(-history // devices) for history in histories) * len(cache.history)
        observed = sum(config.observed_rows(history) for history in histories)
        used = {
            "history": kept * kept_row,
            "context": observed * config.num_blocks * (config.hidden_depth + 1) * row,
            "window": (tokens - sum(histories) + observed * config.causal_history) * config.num_layers * row,
            "tokens": 4 * tokens,
        }
        lengths_of = (cache.history_length, cache.observed_length, cache.window_length)
        arrays = {name: getattr(cache, name) for name in used} | {"lengths": lengths_of}
    sizes = {name: tree_bytes(part) for name, part in arrays.items() if part is not None}
    parts = {name: PartBytes(size, used.get(name, size)) for name, size in sizes.items()}
    layers = config.num_blocks if config.windowed else config.attention_layers
    paper = tokens * layers * paper_row_bytes(config, cache_dtype) if has_growing_rows(config) else None
    return CacheBytes(parts, paper, devices, cache_dtype)


def row_bytes(config: ModelConfig, cache_dtype: str = "auto") -> int:
    """Returns the bytes of one token's key and value in one layer, including the scales of int8."""
    scales = 2 * config.num_heads * jnp.dtype(SCALE_DTYPE).itemsize if cache_dtype == INT8 else 0
    return paper_row_bytes(config, cache_dtype) + scales


def paper_row_bytes(config: ModelConfig, cache_dtype: str = "auto") -> int:
    """Returns the bytes of one token's key and value in one layer by the paper's equation: without scales."""
    return 2 * config.d_model * (1 if cache_dtype == INT8 else config.compute_dtype.itemsize)


def cache_bytes_at(config: ModelConfig, tokens: int) -> CacheBytes:
    """Returns the bytes of the cache of one sequence of `tokens` tokens, without allocating it."""
    cache = jax.eval_shape(functools.partial(init_cache, config, 1, capacity_for(config, tokens)))
    return cache_bytes(config, cache, [tokens])


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of a pytree's arrays (or abstract arrays) on one device."""

    def shape(leaf: Any) -> tuple[int, ...]:
        sharding = getattr(leaf, "sharding", None)
        return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)

    return sum(math.prod(shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
