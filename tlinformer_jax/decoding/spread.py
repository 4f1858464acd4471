"""Generation over the devices of a mesh: how a cache lies on them, and what runs its functions there.

The rows of TLinFormer's history are split over the mesh's axis `context`; every device has everything else whole
and computes the same of it. Each device runs the program of one, kernels included, on its share of the cache
(`jax.shard_map`, all axes manual), and talks to the others only where a softmax over the history ends. The mesh's
other axes hold copies.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import Cache, WindowedCache, init_cache
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.parallel.batch_split import SplitRows
from tlinformer_jax.parallel.mesh import MeshConfig
from tlinformer_jax.parallel.sharding import build_mesh

AXIS = "context"
WHOLE = PartitionSpec()
# Of keys and values [batch, heads, d_h, rows].
SPLIT_ROWS = PartitionSpec(None, None, None, AXIS)


def context_mesh(context: int) -> Mesh | None:
    """A mesh over the first `context` devices for a history spread over them; None for one device, which needs none.

    Raises:
      ConfigError: if there are not so many.
    """
    devices = jax.local_devices()
    if not 1 <= context <= len(devices):
        allowed = f"must be from 1 to {len(devices)}, as many devices as this machine has"
        raise ConfigError("mesh.context", context, allowed)
    return None if context == 1 else build_mesh(MeshConfig(context=context), devices[:context])


def split_of(mesh: Mesh | None, config: ModelConfig) -> SplitRows | None:
    """How a mesh splits the history's rows; None if it does not.

    Raises:
      ConfigError: if the architecture has no history that could be split.
    """
    if mesh is None or mesh.shape[AXIS] == 1:
        return None
    if not config.windowed:
        allowed = f"must be 1 for model.architecture = {config.architecture!r}; only the history of tlinformer and "
        raise ConfigError("mesh.context", mesh.shape[AXIS], f"{allowed}tconstformer can be spread over devices")
    return SplitRows(AXIS, mesh.shape[AXIS])


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays as every device of the mesh holds them, whole; without a mesh as they are."""
    return tree if mesh is None else jax.device_put(tree, NamedSharding(mesh, WHOLE))


def cache_specs(cache: Cache) -> Any:
    """A cache whose arrays are replaced by how they lie on a mesh."""
    specs: Any = jax.tree.map(lambda _: WHOLE, cache)
    if isinstance(cache, WindowedCache):
        specs = dataclasses.replace(specs, history=jax.tree.map(lambda _: SPLIT_ROWS, cache.history))
    return specs


def init_spread_cache(config: ModelConfig, batch: int, capacity: int, mesh: Mesh | None) -> Cache:
    """`cache.init_cache` on the devices of a mesh: no device ever has more of it than its share."""
    make = functools.partial(init_cache, config, batch, capacity, split_of(mesh, config))
    if mesh is None:
        return make()
    shapes = abstract_cache(config, batch, capacity, mesh)
    return jax.jit(make, out_shardings=jax.tree.map(lambda shape: shape.sharding, shapes))()


def abstract_cache(config: ModelConfig, batch: int, capacity: int, mesh: Mesh) -> Any:
    """Shapes of the same, with how they lie on the mesh."""
    shapes = jax.eval_shape(functools.partial(init_cache, config, batch, capacity, split_of(mesh, config)))
    return jax.tree.map(
        lambda shape, spec: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec)),
        shapes,
        cache_specs(shapes),
    )


def over_devices(function: Callable[..., Any], mesh: Mesh | None) -> Callable[..., Any]:
    """`function`, run by every device of the mesh on its share of the cache; without a mesh the function itself.

    Args:
      function: of (parameters, configuration, cache, arrays ...); it returns a cache, or a tuple that begins with one.
        All devices have and return the same of whatever is no cache.
      mesh: or None.
    """
    if mesh is None:
        return function

    def spread(params: Any, config: ModelConfig, cache: Cache, *arrays: Any) -> Any:
        def one(params: Any, cache: Cache, *arrays: Any) -> tuple[Cache, tuple[Any, ...]]:
            result = function(params, config, cache, *arrays)
            return (result[0], result[1:]) if isinstance(result, tuple) else (result, ())

        specs = cache_specs(cache)
        inputs = (WHOLE, specs, *[WHOLE] * len(arrays))
        mapped = jax.shard_map(one, mesh=mesh, in_specs=inputs, out_specs=(specs, WHOLE), check_vma=False)
        cache, rest = mapped(params, cache, *arrays)
        return (cache, *rest) if rest else cache

    return spread


def widened(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Zeros of a larger shape that begin with `array`, and lie as it does.

    What is split is widened on each device, so that its rows stay where they are.
    """
    sharding = array.sharding
    return _widened(array, shape, sharding if isinstance(sharding, NamedSharding) else None)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _widened(array: jax.Array, shape: tuple[int, ...], sharding: NamedSharding | None) -> jax.Array:
    def widen(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jnp.pad(array, [(0, new - old) for new, old in zip(shape, array.shape)])

    if sharding is None:
        return widen(array, shape)
    spec, mine = sharding.spec, functools.partial(widen, shape=sharding.shard_shape(shape))
    return jax.shard_map(mine, mesh=sharding.mesh, in_specs=spec, out_specs=spec, check_vma=False)(array)


def empty(shape: tuple[int, ...], dtype: Any, sharding: Sharding) -> jax.Array:
    """Zeros that lie on their devices from the beginning."""
    if not isinstance(sharding, NamedSharding):
        return jnp.zeros(shape, dtype)
    return jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=sharding)()
