"""The decoder: one interface to all four architectures, compiled once per length class."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding import layered, windowed
from tlinformer_jax.decoding.cache import (
    Cache,
    LayeredCache,
    WindowedCache,
    capacity_for,
    history_of,
    init_cache,
    length_class,
    stored_rows,
)
from tlinformer_jax.decoding.params import DecoderParams, decoder_params
from tlinformer_jax.decoding.spread import (
    WHOLE,
    empty,
    init_spread_cache,
    over_devices,
    replicate,
    split_of,
    widened,
)
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.models.cached_attention import KeyValue
from tlinformer_jax.models.model import LanguageModel


def step(
    params: DecoderParams, config: ModelConfig, cache: Cache, tokens: jax.Array, active: jax.Array
) -> tuple[Cache, jax.Array]:
    """Feeds one token to every active sequence: `windowed.step` or `layered.step`, which see."""
    if isinstance(cache, WindowedCache):
        return windowed.step(params, config, cache, tokens, active)
    return layered.step(params, config, cache, tokens, active)


def jitted(config: ModelConfig, mesh: Mesh | None) -> tuple[Any, Any, Any]:
    """`prefill`, `step` and `slide`, each run by all devices of the mesh; their caches are donated."""
    functions = (windowed.prefill if config.windowed else layered.prefill, step, windowed.slide)
    prefill, one, slide = (
        jax.jit(over_devices(function, mesh), static_argnums=1, donate_argnums=2) for function in functions
    )
    return prefill, one, slide


class Decoder:
    """A model's parameters and its compiled functions; the caches belong to the caller.

    A cache handed to `prefill`, `step` or `slide` is donated: use the one that comes back. The functions are pure
    but for that; lengths and phases are the caller's to keep, because they decide on the host when to slide.

    Attributes:
      config: of the model.
      mesh: of the devices that the history is spread over; None for one device.
      devices: that it is spread over.
      params: in the compute dtype, on every device of the mesh.
    """

    def __init__(self, model: LanguageModel, variables: Mapping[str, Any], mesh: Mesh | None = None) -> None:
        """Takes a model, its variables, and the devices to use.

        Args:
          model: of any architecture.
          variables: {"params": ...} as `model.init` gives them, wherever they lie.
          mesh: its axis `context` splits the rows of the history; along every other axis all devices do the same.
            None: one device, the one of the variables.

        Raises:
          ConfigError: for a model whose observation window does not hold the last rows of the history, or that has no
            history to split.
        """
        self.config, self.mesh = model.config, mesh
        if self.config.observed_selection != "recent":
            raise ConfigError(
                "model.observed_selection",
                self.config.observed_selection,
                "must be 'recent' for generation, whose cache holds those rows; others are for training and evaluation",
            )
        split = split_of(mesh, self.config)
        self.devices = 1 if split is None else split.parts
        typed = model.apply(replicate(dict(variables), mesh), method=model.parameters)
        place = None if mesh is None else NamedSharding(mesh, WHOLE)
        self.params = jax.jit(decoder_params, static_argnums=1, out_shardings=place)(typed, self.config)
        self._prefill, self._step, self._slide = jitted(self.config, mesh)

    def init_cache(self, batch: int, tokens: int, final: int | None = None) -> Cache:
        """An empty cache for `batch` sequences of up to `tokens` tokens (in the end `final`)."""
        return init_spread_cache(self.config, batch, self._capacity_for(tokens, final), self.mesh)

    def prefill(self, cache: Cache, row: int, prompt: np.ndarray) -> tuple[Cache, jax.Array]:
        """Fills sequence `row` from its prompt, int [length >= 1]; returns the cache and the logits float32 [V]."""
        length = len(prompt)
        if isinstance(cache, WindowedCache):
            room = cache.tokens.shape[1]
            observed = [np.int32(self.config.observed_rows(history_of(self.config, length)))]
        else:
            room, observed = length_class(length), []
        padded = np.zeros((room,), np.int32)
        padded[:length] = prompt
        return self._prefill(self.params, self.config, cache, np.int32(row), padded, np.int32(length), *observed)

    def step(self, cache: Cache, tokens: jax.Array, active: jax.Array) -> tuple[Cache, jax.Array]:
        """Feeds tokens int32 [batch] to the active (bool [batch]) sequences; returns logits float32 [batch, V]."""
        return self._step(self.params, self.config, cache, tokens, active)

    def slide(self, cache: WindowedCache, row: int, history: int) -> WindowedCache:
        """Slides the full window of sequence `row`, whose history then has `history` tokens.

        The cache must have room for them: see `grow`.
        """
        observed = np.int32(self.config.observed_rows(history))
        return self._slide(self.params, self.config, cache, np.int32(row), observed)

    def grow(self, cache: Cache, tokens: int, final: int | None = None) -> Cache:
        """Gives the cache room for sequences of `tokens` tokens (in the end `final`), if it has not.

        Array by array, so that at most one of them exists twice. Where the cache holds a single sequence this must
        come right before a slide: of TLinFormer's history only block 0's rows are copied then, as the slide makes the
        other blocks' anew.
        """
        if self.config.architecture == "sliding_window" or stored_rows(self.config, tokens) <= cache.capacity:
            return cache
        return grow(self.config, cache, self._capacity_for(tokens, final))

    def _capacity_for(self, tokens: int, final: int | None) -> int:
        return capacity_for(self.config, tokens, final, self.devices)


def grow(config: ModelConfig, cache: Cache, capacity: int) -> Cache:
    """The cache's contents in a cache with room for `capacity` rows; `cache` must not be used again."""
    split = cache.split if isinstance(cache, WindowedCache) else None
    shapes = jax.eval_shape(functools.partial(init_cache, config, cache.position.shape[0], capacity, split))

    def widen(array: jax.Array, shape: jax.ShapeDtypeStruct, keep: bool = True) -> jax.Array:
        if array.shape == shape.shape:
            return array
        wide, place = widened(array, shape.shape) if keep else None, array.sharding
        array.delete()
        return empty(shape.shape, shape.dtype, place) if wide is None else wide

    if isinstance(cache, LayeredCache):
        layers = KeyValue(widen(cache.layers.key, shapes.layers.key), widen(cache.layers.value, shapes.layers.value))
        return dataclasses.replace(cache, layers=layers, capacity=capacity)
    alone = cache.position.shape[0] == 1
    history = tuple(
        KeyValue(
            *(widen(*arrays, keep=index == 0 or not alone) for arrays in ((old.key, new.key), (old.value, new.value)))
        )
        for index, (old, new) in enumerate(zip(cache.history, shapes.history))
    )
    context = KeyValue(widen(cache.context.key, shapes.context.key), widen(cache.context.value, shapes.context.value))
    return dataclasses.replace(
        cache, tokens=widen(cache.tokens, shapes.tokens), history=history, context=context, capacity=capacity
    )
