"""What generation costs: bytes of a cache by part, and a warning about caches rebuilt in vain."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import Cache, LayeredCache, capacity_for, history_of, init_cache


class CacheWarning(UserWarning):
    """A cache is rebuilt although the one of the call before could have been continued."""


def warn_of_continuation(
    config: ModelConfig, before: Sequence[tuple[np.ndarray, list[int]]], prompts: Sequence[np.ndarray]
) -> None:
    """Warns if a prompt repeats a sequence of the call before, prompt and new tokens, and adds less than a window."""
    size = config.generation_window
    for row, prompt in enumerate(prompts if config.windowed else ()):
        for old, new in before:
            length = len(old) + len(new)
            added = len(prompt) - length
            if 0 <= added < size and np.array_equal(prompt[:length], np.concatenate([old, np.array(new, int)])):
                warnings.warn(
                    f"prompt {row} misses its cache more often than once in model.generation_window = {size} tokens: "
                    f"it repeats the {length} tokens that the call before ended with and adds {added}, and its cache "
                    "is rebuilt from nothing; ask for more tokens in one call and take them as they come, by stream()",
                    CacheWarning,
                    stacklevel=4,
                )
                return


@dataclasses.dataclass(frozen=True)
class PartBytes:
    """Bytes of one part of a cache: allocated, and of these in use."""

    allocated: int
    used: int


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """Bytes of a cache on one device. If its history is split over several devices: on the first, which has most.

    Attributes:
      parts: by name. TLinFormer and TConstFormer have `history` (empty for TConstFormer), `context` (compressed
        context), `window` (generation window) and `tokens` (ids), the baselines `layers`; all have `lengths`.
      paper: for TLinFormer the paper's equation 7, 2 * tokens * D * bytes * layers / (H + 2), with the tokens of all
        sequences; for the Transformer the same without the divisor; None for caches that do not grow. For all
        devices together.
      devices: that the history is split over; each has everything else whole.
    """

    parts: dict[str, PartBytes]
    paper: int | None
    devices: int = 1

    @property
    def allocated(self) -> int:
        """Bytes of all arrays."""
        return sum(part.allocated for part in self.parts.values())

    @property
    def used(self) -> int:
        """Bytes in use."""
        return sum(part.used for part in self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {part.allocated:,}" for name, part in self.parts.items())
        devices = "" if self.devices == 1 else f"on each of {self.devices} devices "
        paper = "" if self.paper is None else f"; by the paper's formula {self.paper:,}"
        return f"{devices}{self.allocated:,} bytes ({parts}), of which {self.used:,} are in use{paper}"


def cache_bytes(config: ModelConfig, cache: Cache, lengths: Sequence[int]) -> CacheBytes:
    """Bytes of a cache by part. It reads shapes only, so the cache may be donated or abstract.

    Args:
      config: of the model.
      cache: of the sequences.
      lengths: tokens of each sequence; a full window has not been slid.
    """
    tokens, batch = sum(lengths), len(lengths)
    row = 2 * config.d_model * config.compute_dtype.itemsize  # key and value of one token under one layer

    def part(arrays: Any, used: int) -> PartBytes:
        return PartBytes(tree_bytes(arrays), used)

    if isinstance(cache, LayeredCache):
        held = sum(min(length, cache.capacity) for length in lengths)
        parts = {
            "layers": part(cache.layers, held * config.num_layers * row),
            "lengths": part(cache.length, 4 * batch),
        }
        paper = tokens * config.num_layers * row
        return CacheBytes(parts, paper if config.architecture == "transformer" else None)
    histories = [history_of(config, length) for length in lengths]
    observed = sum(config.observed_rows(history) for history in histories)
    devices = 1 if cache.split is None else cache.split.parts
    kept = sum(-(-history // devices) for history in histories) * len(cache.history)
    numbers = (cache.history_length, cache.observed_length, cache.window_length)
    parts = {
        "history": part(cache.history, kept * row),
        "context": part(cache.context, observed * config.num_blocks * (config.hidden_depth + 1) * row),
        "window": part(cache.window, (tokens - sum(histories)) * config.num_layers * row),
        "tokens": part(cache.tokens, 4 * tokens),
        "lengths": part(numbers, 4 * batch * len(numbers)),
    }
    paper = tokens * row * config.num_layers // config.layers_per_block
    return CacheBytes(parts, paper if config.architecture == "tlinformer" else None, devices)


def cache_bytes_at(config: ModelConfig, tokens: int) -> CacheBytes:
    """Bytes of the cache of one sequence of `tokens` tokens, without allocating one."""
    cache = jax.eval_shape(functools.partial(init_cache, config, 1, capacity_for(config, tokens)))
    return cache_bytes(config, cache, [tokens])


def tree_bytes(tree: Any) -> int:
    """Bytes of a pytree's arrays, or of their shapes, on one device."""

    def shape(leaf: Any) -> tuple[int, ...]:
        sharding = getattr(leaf, "sharding", None)
        return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)

    return sum(math.prod(shape(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
