"""What generation costs: bytes of a cache by part, hits and misses of each sequence, a warning where misses abound."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Sequence

import jax
import numpy as np

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import Cache, LayeredCache, capacity_for, history_of, init_cache
from tlinformer_jax.models.cached_attention import KeyValue


class CacheWarning(UserWarning):
    """A cache is rebuilt oftener than the architecture asks for."""


class CacheLedger:
    """What the host knows of a cache without asking the device: lengths and window phases, hits and misses.

    A hit is a token that `step` feeds; a miss is work on the whole history: the prefill, and each slide. A sequence
    misses once in generation_window tokens; one that does so oftener raises a `CacheWarning` that names the cause.
    The generator keeps one; so can a caller who drives a `Decoder` by hand.

    Attributes:
      histories: history length n of each sequence, int64 [batch]; 0 for the baselines.
      windows: tokens in the generation window of each, int64 [batch]; for the baselines all tokens.
      hits: int64 [batch].
      misses: int64 [batch].
    """

    def __init__(self, config: ModelConfig, batch: int) -> None:
        self._config = config
        self.histories, self.windows, self.hits, self.misses = (np.zeros(batch, np.int64) for _ in range(4))

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in the cache of each sequence, int64 [batch]."""
        return self.histories + self.windows

    def full(self, row: int) -> bool:
        """Whether the window of a sequence must slide before the next token."""
        return self._config.windowed and self.windows[row] >= self._config.generation_window

    def prefilled(self, row: int, length: int) -> None:
        """Sequence `row` was filled from a prompt of `length` tokens."""
        held, added = int(self.lengths[row]), int(length - self.lengths[row])
        if held and self._config.windowed and 0 < added < self._config.generation_window:
            self._warn(row, f"prefill was called again for {added} new tokens after {held}; feed them by step instead")
        history = history_of(self._config, length) if self._config.windowed else 0
        self.histories[row], self.windows[row] = history, length - history
        self.misses[row] += 1

    def fed(self, counts: np.ndarray) -> None:
        """`step` has fed so many tokens to each sequence, int [batch]."""
        self.windows += counts
        self.hits += counts

    def slid(self, row: int) -> None:
        """The window of sequence `row` was made history."""
        size, held = self._config.generation_window, int(self.windows[row])
        if held < size:
            self._warn(
                row,
                f"slide was called out of phase, on a window that holds only {held} of {size} tokens; its history "
                f"now counts {size - held} tokens that were never fed; slide only where the window is full",
            )
        self.histories[row] += size
        self.windows[row] = 0
        self.misses[row] += 1

    def _warn(self, row: int, cause: str) -> None:
        size = self._config.generation_window
        warnings.warn(
            f"sequence {row} misses its cache oftener than once in model.generation_window = {size} tokens: {cause}",
            CacheWarning,
            stacklevel=3,
        )


def warn_of_continuation(config: ModelConfig, before: Sequence[np.ndarray], prompts: Sequence[np.ndarray]) -> None:
    """Warns where a prompt is a sequence that the call before has just ended with, and little more.

    Args:
      config: of the model.
      before: prompt and continuation of each sequence of the call before, int [length].
      prompts: of the new call, int [length].
    """
    size = config.generation_window
    if not config.windowed:
        return
    for row, prompt in enumerate(prompts):
        for old in before:
            added = len(prompt) - len(old)
            if 0 <= added < size and np.array_equal(prompt[: len(old)], old):
                warnings.warn(
                    f"prompt {row} misses its cache oftener than once in model.generation_window = {size} tokens: it "
                    f"repeats the {len(old)} tokens that the call before ended with and adds {added}, and its cache is "
                    "rebuilt from nothing; ask for more tokens in one call, and take them as they come from stream()",
                    CacheWarning,
                    stacklevel=4,
                )
                return


@dataclasses.dataclass(frozen=True)
class PartBytes:
    """Bytes of one part of a cache: what there is room for, and what tokens have filled."""

    allocated: int
    used: int


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """Bytes of a cache on one device, exactly; where its history is spread over several, on the first, which never has
    less than another.

    Attributes:
      parts: by name. Of TLinFormer and TConstFormer `history` (keys and values of all history rows; empty for
        TConstFormer), `context` (of the compressed context), `window` (of the generation window), `tokens` (ids);
        of the baselines `layers`; of all `lengths`.
      paper: for TLinFormer the paper's equation 7, 2 * tokens * D * bytes * layers / (H + 2), the tokens being those
        of all sequences; for the Transformer the same without the divisor; None for the others, whose caches do not
        grow with the sequence. Of all devices together.
      devices: that the history is spread over; whatever is no history each of them has whole.
    """

    parts: dict[str, PartBytes]
    paper: int | None
    devices: int = 1

    @property
    def allocated(self) -> int:
        """Bytes of all arrays of the cache."""
        return sum(part.allocated for part in self.parts.values())

    @property
    def used(self) -> int:
        """Bytes that hold something of the sequences."""
        return sum(part.used for part in self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {part.allocated:,}" for name, part in self.parts.items())
        text = f"{self.allocated:,} bytes ({parts}), of which {self.used:,} are in use"
        spread = "" if self.devices == 1 else f"on each of {self.devices} devices "
        return spread + text if self.paper is None else f"{spread}{text}; by the paper's formula {self.paper:,}"


def cache_bytes(config: ModelConfig, cache: Cache, ledger: CacheLedger) -> CacheBytes:
    """Bytes of a cache by part; reads shapes only, so the cache may have been donated already.

    Args:
      config: of the model.
      cache: of the sequences.
      ledger: that was kept of it.
    """
    histories, windows = ledger.histories, ledger.windows
    tokens, batch = int(ledger.lengths.sum()), len(windows)
    row = 2 * config.d_model * config.compute_dtype.itemsize  # key and value of one token under one layer
    if isinstance(cache, LayeredCache):
        held = int(np.minimum(ledger.lengths, cache.capacity).sum())
        parts = {
            "layers": PartBytes(_nbytes(cache.layers), held * config.num_layers * row),
            "lengths": PartBytes(_nbytes(cache.length), 4 * batch),
        }
        grows = config.architecture == "transformer"
        return CacheBytes(parts, tokens * config.num_layers * row if grows else None)
    observed = sum(config.observed_rows(int(history)) for history in histories)
    lengths = (cache.history_length, cache.observed_length, cache.window_length)
    devices = 1 if cache.split is None else cache.split.parts
    rows = int((-(-histories // devices)).sum())
    parts = {
        "history": PartBytes(_nbytes(*cache.history) // devices, rows * len(cache.history) * row),
        "context": PartBytes(_nbytes(cache.context), observed * config.num_blocks * (config.hidden_depth + 1) * row),
        "window": PartBytes(_nbytes(cache.window), int(windows.sum()) * config.num_layers * row),
        "tokens": PartBytes(_nbytes(cache.tokens), 4 * tokens),
        "lengths": PartBytes(_nbytes(*lengths), 4 * batch * len(lengths)),
    }
    grows = config.architecture == "tlinformer"
    paper = tokens * row * config.num_layers // config.layers_per_block if grows else None
    return CacheBytes(parts, paper, devices)


def cache_bytes_at(config: ModelConfig, tokens: int) -> CacheBytes:
    """Bytes of the cache of one sequence of `tokens` tokens, without making one."""
    cache = jax.eval_shape(functools.partial(init_cache, config, 1, capacity_for(config, tokens)))
    ledger = CacheLedger(config, 1)
    ledger.prefilled(0, tokens)
    return cache_bytes(config, cache, ledger)


def _nbytes(*arrays) -> int:
    """Bytes of arrays or of their shapes, or of pairs of keys and values."""
    leaves = [leaf for array in arrays for leaf in _leaves(array)]
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _leaves(array) -> tuple:
    return (array.key, array.value) if isinstance(array, KeyValue) else (array,)
