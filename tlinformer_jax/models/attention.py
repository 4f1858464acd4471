"""The one attention entry point; backends are its private matter.

`attend` is exact softmax attention with scale 1 / sqrt(d_h). What a query may see is stated by structure
(causal, local window, number of valid keys) and never by a mask tensor: kernels can skip what is not seen.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.kernels import dropout as dropout_kernel
from tlinformer_jax.kernels.common import merge_softmaxes
from tlinformer_jax.models.dropout import Dropout
from tlinformer_jax.models.recompute import map_rows
from tlinformer_jax.parallel.mesh import is_nvidia_gpu, platform

# Keys of one part where attention to many keys is split; a power of two.
KEYS_PER_PART = 1024
# Scores that attention with dropout holds at a time, in float32.
DROPOUT_SCORES = 1 << 27


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    causal: bool = False,
    window: int | None = None,
    key_length: jax.Array | int | None = None,
    dropout: Dropout | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    scale: float | None = None,
    never_empty: bool = False,
) -> Any:
    """Exact softmax attention.

    Args:
      query: [batch, queries, heads, d_h].
      key: [batch, keys, heads, d_h].
      value: [batch, keys, heads, d_h].
      causal: query i sees keys 0 .. i only (queries and keys start at the same position).
      window: with `causal`, query i sees the last `window` of those keys.
      key_length: only the first `key_length` keys are valid; a scalar or int32 [batch]. Where it is 0 the
        result is 0, never NaN.
      dropout: on the attention weights; the mask is drawn per softmax.
      backend: 'auto', 'xla', 'cudnn' (NVIDIA, half precision), 'splash' (TPU, elsewhere interpreted) or 'triton'
        (NVIDIA, half precision, for dropout only). Only XLA's log-sum-exp is differentiable.
      return_lse: also return the log-sum-exp of the scaled scores, float32 [batch, queries, heads]; -inf where
        there is no valid key. It lets partial attentions over disjoint keys be merged exactly.
      scale: of the scores; None is 1 / sqrt(d_h). Padded heads need that of their true width.
      never_empty: `key_length` is never 0; knowing it saves a pass over the output.

    Returns:
      [batch, queries, heads, d_h] in query's dtype, or (that, log-sum-exp).

    Raises:
      ValueError: for a window without `causal`, an unknown backend, dropout or the log-sum-exp with a backend that has
        none, or 'triton' without dropout.
    """
    if window is not None and not causal:
        raise ValueError("attend: window needs causal=True")
    if key_length is not None:
        key_length = jnp.broadcast_to(jnp.asarray(key_length, jnp.int32), query.shape[:1])
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    if query.shape[1] == 0 or key.shape[1] == 0:  # no window yet, or no history
        output, lse = jnp.zeros_like(query), jnp.full(query.shape[:3], -jnp.inf, jnp.float32)
        return (output, lse) if return_lse else output
    chosen = choose_backend(query, dropout, return_lse) if backend == "auto" else backend
    if chosen == "xla":
        output, lse = _attend_in_chunks(query, key, value, scale, causal, window, key_length, dropout)
        return (output, lse) if return_lse else output
    if chosen == "triton":
        if dropout is None or return_lse:
            raise ValueError("attend: backend 'triton' is for dropout, and returns no log-sum-exp")
        return dropout_kernel.attend_with_dropout(
            query, key, value, scale, causal, window, key_length, dropout.words, dropout.rate
        )
    if chosen == "splash" and dropout is None and not return_lse:
        from tlinformer_jax.kernels.splash import attend_splash

        return attend_splash(query, key, value, scale, causal, window, key_length, interpret=platform() != "tpu")
    if chosen == "cudnn" and dropout is None:
        return _attend_cudnn(query, key, value, scale, causal, window, key_length, return_lse, never_empty)
    if chosen in ("cudnn", "splash"):
        what = "log-sum-exp" if dropout is None else "dropout on the attention weights"
        raise ValueError(f"attend: backend {chosen!r} has no {what}")
    raise ValueError(f"attend: unknown backend {backend!r}")


def head_multiple(dtype: Any, backend: str) -> int:
    """Features that heads are padded to a multiple of, see `layers.prepare_layers`: 8 for cuDNN, else 1."""
    return 8 if backend == "cudnn" or (backend == "auto" and fused_kernel(dtype)) else 1


def choose_backend(query: jax.Array, dropout: Dropout | None, return_lse: bool) -> str:
    """The backend that 'auto' stands for: in half precision cuDNN on NVIDIA GPUs, with dropout on one of them our own
    kernel, 'triton'; splash on TPUs; else XLA."""
    # The other fused kernels offer neither weight dropout nor a differentiable log-sum-exp through JAX.
    if dropout is not None and not return_lse:
        return "triton" if dropout_kernel.use_kernel(query.dtype, query.shape[-1]) else "xla"
    if return_lse:
        return "xla"
    if fused_kernel(query.dtype):
        return "cudnn"
    return "splash" if query.dtype == jnp.bfloat16 and platform() == "tpu" else "xla"


def fused_kernel(dtype: Any) -> bool:
    """Whether cuDNN's kernel can take queries of this dtype here: half precision, on an NVIDIA GPU."""
    half = dtype in (jnp.bfloat16, jnp.float16)
    return half and is_nvidia_gpu()


def attend_parts(
    query: jax.Array, key: jax.Array, value: jax.Array, key_length: jax.Array, scale: float, backend: str = "auto"
) -> tuple[jax.Array, jax.Array]:
    """Attention of a few queries of one sequence to some of the many keys they read; not differentiable.

    A fused kernel gives each block of queries to one multiprocessor; with few queries most would idle, so the keys
    are split into parts that run as a batch.

    Args:
      query: [1, queries, heads, d_h].
      key: [1, keys, heads, d_h].
      value: [1, keys, heads, d_h].
      key_length: keys that are valid, int32 []; may be negative or too large.
      scale: of the scores.
      backend: 'auto', 'xla' or 'cudnn'.

    Returns:
      float32 [1, queries, heads, d_h], and the log-sum-exp float32 [1, queries, heads]; see `merge_parts`.
    """
    keys = key.shape[1]
    key_length = jnp.clip(key_length, 0, keys)
    if backend in ("xla", "splash") or (backend == "auto" and not fused_kernel(query.dtype)):
        output, lse = attend(query, key, value, key_length=key_length, backend="xla", return_lse=True, scale=scale)
        return output.astype(jnp.float32), lse
    count = max(1, math.gcd(keys, 1 << 20) // KEYS_PER_PART)
    parted_key, parted_value = (part.reshape(count, keys // count, *part.shape[2:]) for part in (key, value))
    lengths = jnp.clip(key_length - jnp.arange(count) * (keys // count), 0, keys // count)
    queries = jnp.broadcast_to(query, (count, *query.shape[1:]))
    output, lse = attend(
        queries, parted_key, parted_value, key_length=lengths, backend="cudnn", return_lse=True, scale=scale
    )
    output, lse = merge_softmaxes(output.astype(jnp.float32), lse, axis=0)
    return output[None], lse[None]


def attend_chunk(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    start: jax.Array,
    window: int | None,
    scale: float,
    backend: str = "auto",
) -> jax.Array:
    """Causal attention of a chunk of a sequence's rows to all rows up to their own; not differentiable.

    Args:
      query: of rows start .. start + queries - 1, [1, queries, heads, d_h].
      key: of rows 0, 1, ..., at least up to those, [1, keys, heads, d_h].
      value: the same.
      start: a multiple of `queries`, int32 [].
      window: rows that each query sees, its own included; None for all before it.
      scale: of the scores.
      backend: 'auto', 'xla' or 'cudnn'.

    Returns:
      [1, queries, heads, d_h] in query's dtype.
    """
    size = query.shape[1]
    backend = "cudnn" if backend == "cudnn" or (backend == "auto" and fused_kernel(query.dtype)) else "xla"
    if window is not None:
        # The rows that the chunk's window reaches, with stand-ins for the queries before the chunk.
        reach = min(key.shape[1] - size, window - 1)
        first = jnp.maximum(start - reach, 0)
        near_key, near_value = (
            jax.lax.dynamic_slice_in_dim(part, first, size + reach, axis=1) for part in (key, value)
        )
        offset = start - first
        queries = jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(near_key), query, offset, axis=1)
        output = attend(queries, near_key, near_value, causal=True, window=window, backend=backend, scale=scale)
        return jax.lax.dynamic_slice_in_dim(output, offset, size, axis=1)
    own_key, own_value = (jax.lax.dynamic_slice_in_dim(part, start, size, axis=1) for part in (key, value))
    own = attend(query, own_key, own_value, causal=True, backend=backend, return_lse=True, scale=scale)
    if key.shape[1] == size:
        return own[0]
    parts = own[0].astype(jnp.float32), own[1]
    if backend == "cudnn":
        before, lse = attend(query, key, value, key_length=start, backend=backend, return_lse=True, scale=scale)
        return merge_parts(parts, (before.astype(jnp.float32), lse))[0].astype(query.dtype)

    def block(number: jax.Array, parts: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        keys, values = (jax.lax.dynamic_slice_in_dim(rows, number * size, size, axis=1) for rows in (key, value))
        return merge_parts(parts, attend_parts(query, keys, values, jnp.int32(size), scale, backend))

    # As many rows at a time as there are queries, so that the scores in memory do not grow with the sequence.
    return jax.lax.fori_loop(0, start // size, block, parts)[0].astype(query.dtype)


def no_parts(query: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What attention of `query` to no key at all gives, as `merge_parts` takes it."""
    return jnp.zeros(query.shape, jnp.float32), jnp.full(query.shape[:3], -jnp.inf, jnp.float32)


def merge_parts(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """`merge_softmaxes` of two (output, log-sum-exp) pairs."""
    output, lse = jax.tree.map(lambda *arrays: jnp.stack(arrays), first, second)
    return merge_softmaxes(output, lse, axis=0)


def visible(
    queries: int,
    keys: int,
    causal: bool,
    window: int | None,
    key_length: jax.Array | None,
    start: jax.Array | int = 0,
) -> jax.Array | None:
    """Boolean [batch or 1, 1, queries, keys]: which keys a query sees; None if it sees all.

    Query i stands at position start + i, key j at j.
    """
    mask: jax.Array | None = None
    if causal:
        distance = start + np.arange(queries)[:, None] - np.arange(keys)[None, :]
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        mask = jnp.asarray(seen)[None, None]
    if key_length is not None:
        valid = jnp.arange(keys)[None, None, None, :] < key_length[:, None, None, None]
        mask = valid if mask is None else mask & valid
    return mask


def _attend_xla(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: float,
    causal: bool,
    window: int | None,
    key_length: jax.Array | None,
    dropout: Dropout | None,
    start: jax.Array | int = 0,
) -> tuple[jax.Array, jax.Array]:
    """Attention by plain matrix products; scores and softmax in float32. Query i stands at position start + i."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * scale
    mask = visible(query.shape[1], key.shape[1], causal, window, key_length, start)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))  # rows that see nothing stay finite
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    lse = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + top, -jnp.inf)
    weights = weights / jnp.where(total > 0, total, 1.0)
    if dropout is not None:
        weights = dropout(weights, start)
    output = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
    return output, jnp.swapaxes(lse[..., 0], 1, 2)


def _attend_in_chunks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: float,
    causal: bool,
    window: int | None,
    key_length: jax.Array | None,
    dropout: Dropout | None,
) -> tuple[jax.Array, jax.Array]:
    """`_attend_xla`; with dropout, by as many queries at a time as keep the scores at DROPOUT_SCORES.

    Neither pass ever holds the scores of a long history: each chunk is computed again in the backward pass.
    """
    batch, queries, heads, _ = query.shape
    chunk = max(1, DROPOUT_SCORES // (batch * heads * key.shape[1]))
    if dropout is None or chunk >= queries:
        return _attend_xla(query, key, value, scale, causal, window, key_length, dropout)

    def some(shared: Any, fixed: Any, item: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (key, value), (key_length, dropout), (query, number) = shared, fixed, item
        return _attend_xla(query, key, value, scale, causal, window, key_length, dropout, number * chunk)

    padded = jnp.pad(query, ((0, 0), (0, -queries % chunk), (0, 0), (0, 0)))
    found = map_rows(some, chunk, (key, value), padded, (key_length, dropout), padded.shape[1] // chunk)
    output, lse = (array[:, :queries] for array in found)
    return output, lse


def _attend_cudnn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    scale: float,
    causal: bool,
    window: int | None,
    key_length: jax.Array | None,
    return_lse: bool,
    never_empty: bool,
) -> Any:
    """cuDNN's fused kernel; heads are padded to a multiple of 8 features, which changes no score."""
    queries, keys, width = query.shape[1], key.shape[1], query.shape[-1]
    # JAX refuses to differentiate the kernel at odd lengths; with the log-sum-exp it is not differentiated.
    odd_queries, odd_keys = (0, 0) if return_lse else (queries % 2, keys % 2)
    if odd_keys and key_length is None and not (causal and queries <= keys):
        key_length, never_empty = jnp.full(query.shape[:1], keys, jnp.int32), True
    query, key, value = (
        jnp.pad(x, [(0, 0), (0, odd), (0, 0), (0, -width % 8)])
        for x, odd in ((query, odd_queries), (key, odd_keys), (value, odd_keys))
    )
    options: dict[str, Any] = {"return_residual": return_lse}
    if key_length is not None:
        options["query_seq_lengths"] = jnp.full(query.shape[:1], query.shape[1], jnp.int32)
        options["key_value_seq_lengths"] = jnp.maximum(key_length, 1)
    result: Any = jax.nn.dot_product_attention(
        query,
        key,
        value,
        scale=scale,
        is_causal=causal,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
        **options,
    )
    output, lse = result if return_lse else (result, None)
    output = output[:, :queries, :, :width]
    if key_length is not None and not never_empty:
        empty = (key_length == 0)[:, None, None]
        output = jnp.where(empty[..., None], 0, output)
        lse = None if lse is None else jnp.where(empty, -jnp.inf, lse)
    return (output, lse) if return_lse else output
