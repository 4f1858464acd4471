"""Generation on the devices of a mesh: how a cache is split, how it grows, and how functions run on it.

The rows of TLinFormer's history are split over the mesh's axis `context`. Every device has all other arrays whole and
does the same computations on them. The devices communicate only to merge softmaxes over the history. The mesh's other
axes hold copies.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import Cache, WindowedCache, init_cache
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.parallel.sharding import SplitRows, build_mesh, number_of

AXIS = "context"
REPLICATED = PartitionSpec()


def context_mesh(context: int) -> Mesh | None:
    """Returns a mesh of the first `context` devices, to split a history over them; None for one device.

    Raises:
      ConfigError: if this machine has fewer devices.
    """
    devices = jax.local_devices()
    if not 1 <= context <= len(devices):
        allowed = f"must be from 1 to the number of devices of this machine; {number_of(devices)}"
        raise ConfigError("generation.context", context, allowed)
    return None if context == 1 else build_mesh({AXIS: context}, devices[:context])


def split_of(mesh: Mesh | None, config: ModelConfig) -> SplitRows | None:
    """Returns how a mesh splits the history's rows; None if it does not.

    Raises:
      ConfigError: if the architecture has no history to split.
    """
    if mesh is None or mesh.shape[AXIS] == 1:
        return None
    if not config.windowed:
        allowed = (
            f"must be 1 for model.architecture = {config.architecture!r}; "
            "only the history of tlinformer and tconstformer can be split over devices"
        )
        raise ConfigError("generation.context", mesh.shape[AXIS], allowed)
    return SplitRows(AXIS, mesh.shape[AXIS])


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Copies arrays to every device of the mesh; returns them unchanged without a mesh."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, REPLICATED))


def cache_specs(cache: Cache) -> Any:
    """Returns the partition specs of a cache's arrays, as a pytree like the cache."""
    specs: Any = jax.tree.map(lambda _: REPLICATED, cache)
    if isinstance(cache, WindowedCache):
        # Rows are the last axis of keys, values and scales.
        split = jax.tree.map(lambda array: PartitionSpec(*[None] * (array.ndim - 1), AXIS), cache.history)
        specs = dataclasses.replace(specs, history=split)
    return specs


def init_split_cache(
    config: ModelConfig, batch: int, capacity: int, mesh: Mesh | None, cache_dtype: str = "auto"
) -> Cache:
    """Runs `cache.init_cache` on the devices of a mesh; no device ever allocates more than its part."""
    make = functools.partial(init_cache, config, batch, capacity, split_of(mesh, config), cache_dtype)
    if mesh is None:
        return make()
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), cache_specs(jax.eval_shape(make)))
    return jax.jit(make, out_shardings=shardings)()


@functools.partial(jax.jit, static_argnums=(0, 1, 3), donate_argnums=4)
def on_devices(
    function: Callable[..., Any], mesh: Mesh | None, params: Any, config: ModelConfig, cache: Cache, *rest: Any
) -> Any:
    """Runs `function(params, config, cache, *rest)` on every device with its part of the cache, which is donated.

    The function must return a cache, or a tuple that begins with a cache; other results must be equal on all devices.
    Without a mesh one device runs the function.
    """
    if mesh is None:
        return function(params, config, cache, *rest)

    def one(params: Any, cache: Cache, *rest: Any) -> tuple[Cache, tuple[Any, ...]]:
        result = function(params, config, cache, *rest)
        return (result[0], result[1:]) if isinstance(result, tuple) else (result, ())

    specs = cache_specs(cache)
    inputs = (REPLICATED, specs, *[REPLICATED] * len(rest))
    mapped = jax.shard_map(one, mesh=mesh, in_specs=inputs, out_specs=(specs, REPLICATED), check_vma=False)
    cache, others = mapped(params, cache, *rest)
    return (cache, *others) if others else cache


def grow(config: ModelConfig, cache: Cache, capacity: int) -> Cache:
    """Copies a cache's contents to a cache of `capacity` rows; `cache` must not be used again.

    Arrays are copied one after another, so that at most one exists twice.
    """
    split = cache.split if isinstance(cache, WindowedCache) else None
    batch = cache.position.shape[0]
    make = functools.partial(init_cache, config, batch, capacity, split, cache.cache_dtype)
    shapes, structure = jax.tree.flatten(jax.eval_shape(make))

    def grown(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if array.shape == shape:
            return array
        wide = _widened(array, shape, array.sharding if isinstance(array.sharding, NamedSharding) else None)
        array.delete()
        return wide

    arrays = [grown(array, wanted.shape) for array, wanted in zip(jax.tree.leaves(cache), shapes)]
    return jax.tree.unflatten(structure, arrays)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _widened(array: jax.Array, shape: tuple[int, ...], sharding: NamedSharding | None) -> jax.Array:
    """Pads `array` with zeros at the end to a larger shape; each device pads its own part of a split array."""

    def widen(array: jax.Array) -> jax.Array:
        wide = shape if sharding is None else sharding.shard_shape(shape)
        return jnp.pad(array, [(0, new - old) for new, old in zip(wide, array.shape)])

    if sharding is None:
        return widen(array)
    spec = sharding.spec
    return jax.shard_map(widen, mesh=sharding.mesh, in_specs=spec, out_specs=spec, check_vma=False)(array)
