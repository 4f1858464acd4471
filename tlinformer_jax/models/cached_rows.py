"""Attention of one new row per sequence to cached rows, in plain JAX; the reference for the kernel.

Keys and values are [batch, heads, d_h, rows]. Only a chunk of int8 rows is ever converted in memory.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tlinformer_jax.kernels.common import merge_softmaxes
from tlinformer_jax.kernels.key_value import KeyValue, value_dtype
from tlinformer_jax.parallel.mesh import platform
from tlinformer_jax.parallel.sharding import SplitRows

# Most int8 rows that a token reads at once without a kernel. XLA may convert them in memory before the product: on CPUs
# the converted rows should fit into the processor's cache; on accelerators fewer, larger chunks launch fewer kernels.
INT8_ROWS = 4096
INT8_ROWS_ON_ACCELERATORS = 32768


@flax.struct.dataclass
class CachedRows:
    """The first `length` rows of a cache, for one softmax.

    Attributes:
      cache: keys and values of one layer or of several.
      length: number of valid rows of each sequence, int32 [batch].
      layer: index of the layer to read; None if the cache has a single layer.
      split: how the rows are split over devices; `cache` then contains this device's rows. None if it contains all.
    """

    cache: KeyValue
    length: Array
    layer: int | None = flax.struct.field(pytree_node=False, default=None)
    split: SplitRows | None = flax.struct.field(pytree_node=False, default=None)

    def arrays(self, start: Array | int = 0, count: int | None = None) -> KeyValue:
        """Returns keys and values of the layer, [batch, heads, d_h, rows]: `count` rows from `start` on, or all."""

        def some(array: Array) -> Array:
            leading = [] if self.layer is None else [self.layer]
            at = [*leading, *[0] * (array.ndim - len(leading) - 1), start]
            shape = [*[1] * len(leading), *array.shape[len(leading) : -1], count]
            return jax.lax.dynamic_slice(array, at, shape).reshape(shape[len(leading) :])

        if count is not None:
            return jax.tree.map(some, self.cache)
        return self.cache if self.layer is None else jax.tree.map(lambda array: array[self.layer], self.cache)

    def merged(
        self, output: Float[Array, "b h d"], lse: Float[Array, "b h"]
    ) -> tuple[Float[Array, "b h d"], Float[Array, "b h"]]:
        """Merges this device's softmax with those of the other devices; returns output and log-sum-exp of all rows."""
        if self.split is None:
            return output, lse
        # A single collective: for the few queries of a token, latency costs more than bytes.
        both = jax.lax.all_gather(jnp.concatenate([output, lse[..., None]], axis=-1), self.split.axis)
        return merge_softmaxes(both[..., :-1], both[..., -1], axis=0)


def attend_cached(
    query: Float[Array, "b h d"], own: KeyValue, past: CachedRows, context: CachedRows | None, scale: float
) -> tuple[Float[Array, "sources b h d"], Float[Array, "sources b h"]]:
    """Computes exact attention of one new row per sequence to each source, and its log-sum-exp; float32.

    The first source is `past` with the new row's own key, the second `context` if given, on this device. See
    `cached_attention.token_layer`.
    """
    sources = [_softmax_sum(query, past, own, scale)]
    if context is not None:
        sources.append(_softmax_sum(query, context, None, scale))
    outputs, lses = zip(*sources)
    return jnp.stack(outputs), jnp.stack(lses)


def merge_sources(
    outputs: Float[Array, "sources b h d"], lses: Float[Array, "sources b h"], context: CachedRows | None, joint: bool
) -> Float[Array, "sums b h d"]:
    """Returns the outputs whose sum is the row's attention, given those of the sources as by `attend_cached`.

    Merges the softmaxes over `context` of all devices, and if `joint` both sources to a single softmax.
    """
    if context is None:
        return outputs
    if context.split is not None:
        output, lse = context.merged(outputs[1], lses[1])
        outputs, lses = jnp.stack([outputs[0], output]), jnp.stack([lses[0], lse])
    return merge_softmaxes(outputs, lses, axis=0)[0][None] if joint else outputs


def _softmax_sum(
    query: Float[Array, "b h d"], source: CachedRows, own: KeyValue | None, scale: float
) -> tuple[Float[Array, "b h d"], Float[Array, "b h"]]:
    """Returns softmax attention in float32 and its log-sum-exp; 0 and -inf if no row is valid."""
    rows, most = source.cache.rows, INT8_ROWS if platform() == "cpu" else INT8_ROWS_ON_ACCELERATORS
    if source.cache.key_scale is None or rows <= most:
        return _softmax_of(query, source.arrays(), source.length, own, scale)
    chunk = min(most, rows & -rows)

    def some(start: Array) -> tuple[Array, Array]:
        return _softmax_of(query, source.arrays(start, chunk), source.length - start, None, scale)

    outputs, lse = jax.lax.map(some, jnp.arange(0, rows, chunk))
    if own is not None:
        outputs = jnp.concatenate([outputs, own.value.astype(jnp.float32)[None]])
        lse = jnp.concatenate([lse, _own_score(query, own, scale)[None, ..., 0]])
    return merge_softmaxes(outputs, lse, axis=0)


def _softmax_of(
    query: Float[Array, "b h d"], cache: KeyValue, length: Int[Array, " b"], own: KeyValue | None, scale: float
) -> tuple[Float[Array, "b h d"], Float[Array, "b h"]]:
    """Computes `_softmax_sum` of all rows at once, without chunks."""
    if cache.key_scale is None:
        scores = jnp.einsum("bhd,bhdk->bhk", query, cache.key, preferred_element_type=jnp.float32) * scale
    else:
        key = cache.key.astype(query.dtype)
        scores = jnp.einsum("bhd,bhdk->bhk", query, key, preferred_element_type=jnp.float32) * scale * cache.key_scale
    valid = jnp.arange(cache.rows) < length[:, None, None]
    scores = jnp.where(valid, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    if own is not None:
        own_score = _own_score(query, own, scale)
        top = jnp.maximum(top, own_score)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    value = cache.value
    if cache.value_scale is not None:
        weights, value = weights * cache.value_scale, value.astype(value_dtype(query.dtype))
    output = jnp.einsum("bhk,bhdk->bhd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    if own is not None:
        own_weight = jnp.exp(own_score - top)
        total = total + own_weight
        output = output + own_weight * own.value.astype(jnp.float32)
    safe = jnp.where(total > 0, total, 1.0)
    lse = jnp.where(total > 0, top + jnp.log(safe), -jnp.inf)
    return output / safe, lse[..., 0]


def _own_score(query: Float[Array, "b h d"], own: KeyValue, scale: float) -> Float[Array, "b h 1"]:
    return jnp.sum(query.astype(jnp.float32) * own.key.astype(jnp.float32), axis=-1, keepdims=True) * scale
