"""The decoder: one interface to all architectures, compiled once per length class."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding import layered, spread, windowed
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
from tlinformer_jax.models.model import LanguageModel


def step(
    params: DecoderParams,
    config: ModelConfig,
    cache: Cache,
    tokens: Int[Array, " batch"],
    active: Bool[Array, " batch"],
) -> tuple[Cache, Float[Array, "batch V"]]:
    """Feeds one token to every active sequence, see `windowed.step` and `layered.step`."""
    if isinstance(cache, WindowedCache):
        return windowed.step(params, config, cache, tokens, active)
    return layered.step(params, config, cache, tokens, active)


def jitted(config: ModelConfig, mesh: Mesh | None) -> tuple[Any, Any, Any]:
    """`prefill`, `step` and `slide`, each run on all devices of the mesh; their caches are donated."""
    functions = (windowed.prefill if config.windowed else layered.prefill, step, windowed.slide)
    prefill, one, slide = (
        jax.jit(spread.over_devices(function, mesh), static_argnums=1, donate_argnums=2) for function in functions
    )
    return prefill, one, slide


class Decoder:
    """A model's parameters, in the compute dtype on every device of the mesh, and its compiled functions.

    `prefill`, `step` and `slide` donate the cache they are given: use the one they return. The caller keeps the lengths
    of the sequences, and so knows when to slide.
    """

    def __init__(self, model: LanguageModel, variables: Mapping[str, Any], mesh: Mesh | None = None) -> None:
        """Takes a model of any architecture and its variables, {"params": ...}.

        The mesh's axis `context` splits the rows of the history; other axes hold copies. None: the variables' device.

        Raises:
          ConfigError: where several devices would split the history of a model that has none.
        """
        self.config, self.mesh = model.config, mesh
        split = spread.split_of(mesh, self.config)
        self.devices = 1 if split is None else split.parts
        typed = model.apply(spread.replicate(dict(variables), mesh), method=model.parameters)
        sharding = None if mesh is None else NamedSharding(mesh, spread.WHOLE)
        self.params = jax.jit(decoder_params, static_argnums=1, out_shardings=sharding)(typed, self.config)
        self._prefill, self._step, self._slide = jitted(self.config, mesh)

    def init_cache(self, batch: int, tokens: int, final: int | None = None) -> Cache:
        """An empty cache for `batch` sequences of up to `tokens` tokens, in the end `final` if that is known."""
        return spread.init_spread_cache(self.config, batch, self._capacity_for(tokens, final), self.mesh)

    def prefill(self, cache: Cache, row: int, prompt: np.ndarray) -> tuple[Cache, Float[Array, " V"]]:
        """Fills sequence `row` from its prompt, int [length >= 1]; returns the cache and the next token's logits."""
        length = len(prompt)
        if isinstance(cache, WindowedCache):
            room = cache.tokens.shape[1]
            observed = [np.int32(self.config.observed_rows(history_of(self.config, length)))]
        else:
            room, observed = length_class(length), []
        padded = np.zeros((room,), np.int32)
        padded[:length] = prompt
        return self._prefill(self.params, self.config, cache, np.int32(row), padded, np.int32(length), *observed)

    def step(
        self, cache: Cache, tokens: Int[Array, " batch"], active: Bool[Array, " batch"]
    ) -> tuple[Cache, Float[Array, "batch V"]]:
        """Feeds tokens to the active sequences; returns the cache and the next tokens' logits."""
        return self._step(self.params, self.config, cache, tokens, active)

    def slide(self, cache: WindowedCache, row: int, history: int) -> WindowedCache:
        """Slides the full window of sequence `row`, whose history then has `history` tokens; see `grow` for room."""
        observed = np.int32(self.config.observed_rows(history))
        return self._slide(self.params, self.config, cache, np.int32(row), observed)

    def grow(self, cache: Cache, tokens: int, final: int | None = None) -> Cache:
        """Gives the cache room for sequences of `tokens` tokens (in the end `final`) if it has less.

        Array by array, so that at most one of them exists twice. The cache of a single sequence must be grown directly
        before a slide: of TLinFormer's history only block 0's rows are copied then, and the slide rebuilds the others.
        """
        if self.config.architecture == "sliding_window" or stored_rows(self.config, tokens) <= cache.capacity:
            return cache
        return grow(self.config, cache, self._capacity_for(tokens, final))

    def _capacity_for(self, tokens: int, final: int | None) -> int:
        return capacity_for(self.config, tokens, final, self.devices)


def grow(config: ModelConfig, cache: Cache, capacity: int) -> Cache:
    """The cache's contents in a cache with room for `capacity` rows; `cache` must not be used again."""
    split = cache.split if isinstance(cache, WindowedCache) else None
    batch = cache.position.shape[0]
    shapes = jax.eval_shape(functools.partial(init_cache, config, batch, capacity, split))

    def copied(array: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if array.shape == shape.shape:
            return array
        wide = spread.widened(array, shape.shape)
        array.delete()
        return wide

    def dropped(array: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
        sharding = array.sharding
        array.delete()
        return spread.empty(shape.shape, shape.dtype, sharding)

    if isinstance(cache, LayeredCache):
        return dataclasses.replace(cache, layers=jax.tree.map(copied, cache.layers, shapes.layers), capacity=capacity)
    history = [
        jax.tree.map(copied if index == 0 or batch > 1 else dropped, *block)
        for index, block in enumerate(zip(cache.history, shapes.history))
    ]
    tokens, context = jax.tree.map(copied, (cache.tokens, cache.context), (shapes.tokens, shapes.context))
    return dataclasses.replace(cache, tokens=tokens, history=tuple(history), context=context, capacity=capacity)
