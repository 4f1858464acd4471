"""Exact softmax attention: the one entry point, `attend`, and the back ends behind it.

What a query may see is stated by structure (causal, local window, number of valid keys, documents) and never by a mask
tensor: kernels can skip what is not seen.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from tlinformer_jax.kernels import dropout as dropout_kernel
from tlinformer_jax.kernels.common import Scores, is_half, merge_softmaxes
from tlinformer_jax.kernels.splash import attend_splash
from tlinformer_jax.models.layers import Dropout
from tlinformer_jax.models.recompute import map_rows
from tlinformer_jax.parallel.mesh import is_nvidia_gpu, platform

# Keys of one part where attention to many keys is split; a power of two.
KEYS_PER_PART = 1024
# Scores that attention with dropout or documents holds at a time, in float32.
DROPOUT_SCORES = 1 << 27

Queries = Float[Array, "batch queries heads d_h"]
Keys = Float[Array, "batch keys heads d_h"]
# The documents of queries and of keys; a query sees keys of its own document.
Documents = tuple[Int[Array, "batch rows"], Int[Array, "batch keys"]]
# An output, and the log-sum-exp of its scaled scores; softmaxes over disjoint keys are merged by these.
OutputAndLse = tuple[Queries, Float[Array, "batch queries heads"]]


def attend(
    query: Queries,
    key: Keys,
    value: Keys,
    *,
    causal: bool = False,
    window: int | None = None,
    key_length: Array | int | None = None,
    dropout: Dropout | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    scale: float | None = None,
    never_empty: bool = False,
    documents: Documents | None = None,
) -> Any:
    """Exact softmax attention.

    Args:
      causal: query i sees keys 0 .. i only (queries and keys start at the same position).
      window: with `causal`, query i sees the last `window` of those keys.
      key_length: only so many keys are valid, the first ones; a scalar or int32 [batch]. Where it is 0 the result is
        0, never NaN.
      dropout: on the attention weights; the mask is drawn per softmax.
      backend: 'auto', 'xla', 'cudnn' (NVIDIA, half precision), 'splash' (TPU, elsewhere interpreted) or 'triton'
        (NVIDIA, half precision, for dropout only). Only XLA's log-sum-exp is differentiable.
      return_lse: also return the log-sum-exp of the scaled scores, -inf where there is no valid key.
      scale: of the scores; None is 1 / sqrt(d_h). Padded heads need that of their true width.
      never_empty: `key_length` is never 0; knowing it saves a pass over the output.
      documents: a query sees only the keys of its own document; where it has none, result and gradients are 0.
        'cudnn' and 'triton' do not have it; 'auto' then takes another.

    Returns:
      as the query; with `return_lse`, `OutputAndLse`.

    Raises:
      ValueError: for a window without `causal`, and what the back end does not have.
    """
    if window is not None and not causal:
        raise ValueError("attend: window needs causal=True")
    if key_length is not None:
        key_length = jnp.broadcast_to(jnp.asarray(key_length, jnp.int32), query.shape[:1])
    scores = Scores(1.0 / math.sqrt(query.shape[-1]) if scale is None else scale, causal, window)
    apart = documents is not None
    chosen = choose_backend(query, dropout, return_lse, apart) if backend == "auto" else backend
    output, lse = None, None
    if query.shape[1] == 0 or key.shape[1] == 0:  # no window yet, or no history
        output, lse = jnp.zeros_like(query), no_parts(query)[1]
    elif chosen == "xla":
        output, lse = _attend_in_chunks(query, key, value, scores, key_length, dropout, documents)
    elif chosen == "triton" and dropout is not None and not return_lse and not apart:
        given = dropout.words, dropout.rate
        output = dropout_kernel.attend_with_dropout(query, key, value, scores, key_length, *given)
    elif chosen == "splash" and dropout is None and not return_lse:
        output = attend_splash(query, key, value, scores, key_length, documents, interpret=platform() != "tpu")
    elif chosen == "cudnn" and dropout is None and not apart:
        output, lse = _attend_cudnn(query, key, value, scores, key_length, return_lse, never_empty)
    else:
        raise ValueError(_refusal(chosen, dropout, apart))
    return (output, lse) if return_lse else output


def _refusal(backend: str, dropout: Dropout | None, apart: bool) -> str:
    if apart and backend in ("cudnn", "triton"):
        return f"attend: backend {backend!r} does not keep documents apart"
    if backend == "triton":
        return "attend: backend 'triton' is for dropout, and returns no log-sum-exp"
    if backend in ("cudnn", "splash"):
        return f"attend: backend {backend!r} has no {'dropout on the attention weights' if dropout else 'log-sum-exp'}"
    return f"attend: unknown backend {backend!r}"


def head_multiple(dtype: Any, backend: str) -> int:
    """Features that heads are padded to a multiple of, see `layers.prepare_layers`: 8 for cuDNN, else 1."""
    return 8 if backend == "cudnn" or (backend == "auto" and fused_kernel(dtype)) else 1


def choose_backend(query: Queries, dropout: Dropout | None, return_lse: bool, documents: bool = False) -> str:
    """The backend that 'auto' stands for: in half precision cuDNN on NVIDIA GPUs, with dropout on one of them our own
    kernel, 'triton'; splash on TPUs; else XLA. Both kernels for GPUs have no `documents`."""
    # The other fused kernels offer neither weight dropout nor a differentiable log-sum-exp through JAX.
    if dropout is not None and not return_lse:
        return "triton" if not documents and dropout_kernel.use_kernel(query.dtype, query.shape[-1]) else "xla"
    if return_lse or (documents and is_nvidia_gpu()):
        return "xla"
    if fused_kernel(query.dtype):
        return "cudnn"
    return "splash" if query.dtype == jnp.bfloat16 and platform() == "tpu" else "xla"


def fused_kernel(dtype: Any) -> bool:
    """Whether cuDNN's kernel can take queries of this dtype here: half precision, on an NVIDIA GPU."""
    return is_half(dtype) and is_nvidia_gpu()


def attend_parts(
    query: Float[Array, "1 queries heads d_h"],
    key: Float[Array, "1 keys heads d_h"],
    value: Float[Array, "1 keys heads d_h"],
    key_length: Array,
    scale: float,
    backend: str = "auto",
) -> OutputAndLse:
    """Attention of a few queries of one sequence to some of the many keys they read, float32; not differentiable.

    A fused kernel gives each block of queries to one multiprocessor; with few queries most would idle, so the keys
    are split into parts that run as a batch. `key_length` may be negative or too large.
    """
    keys = key.shape[1]
    key_length = jnp.clip(key_length, 0, keys)
    if _with_lse(query, backend) == "xla":
        output, lse = attend(query, key, value, key_length=key_length, backend="xla", return_lse=True, scale=scale)
        return output.astype(jnp.float32), lse
    count = max(1, math.gcd(keys, 1 << 20) // KEYS_PER_PART)
    key, value = (part.reshape(count, keys // count, *part.shape[2:]) for part in (key, value))
    lengths = jnp.clip(key_length - jnp.arange(count) * (keys // count), 0, keys // count)
    query = jnp.broadcast_to(query, (count, *query.shape[1:]))
    output, lse = attend(query, key, value, key_length=lengths, backend="cudnn", return_lse=True, scale=scale)
    output, lse = merge_softmaxes(output.astype(jnp.float32), lse, axis=0)
    return output[None], lse[None]


def attend_chunk(
    query: Float[Array, "1 queries heads d_h"],
    key: Float[Array, "1 keys heads d_h"],
    value: Float[Array, "1 keys heads d_h"],
    start: Array,
    window: int | None,
    scale: float,
    backend: str = "auto",
) -> Queries:
    """Causal attention of a chunk of a sequence's rows to all rows up to their own; not differentiable.

    Args:
      query: of rows start .. start + queries - 1; start is a multiple of their number.
      key: of rows 0, 1, ..., at least up to those.
      window: rows that each query sees, its own included; None for all before it.
    """
    size = query.shape[1]
    options: dict[str, Any] = {"backend": _with_lse(query, backend), "scale": scale}
    if window is not None:
        # The rows that the chunk's window reaches, with stand-ins for the queries before the chunk.
        reach = min(key.shape[1] - size, window - 1)
        first = jnp.maximum(start - reach, 0)
        key, value = (jax.lax.dynamic_slice_in_dim(part, first, size + reach, axis=1) for part in (key, value))
        query = jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(key), query, start - first, axis=1)
        output = attend(query, key, value, causal=True, window=window, **options)
        return jax.lax.dynamic_slice_in_dim(output, start - first, size, axis=1)

    def rows(number: Array) -> list[Array]:
        return [jax.lax.dynamic_slice_in_dim(part, number * size, size, axis=1) for part in (key, value)]

    own = attend(query, *rows(start // size), causal=True, return_lse=True, **options)
    if key.shape[1] == size:
        return own[0]
    parts = own[0].astype(jnp.float32), own[1]
    if options["backend"] == "cudnn":
        before, lse = attend(query, key, value, key_length=start, return_lse=True, **options)
        return merge_parts(parts, (before.astype(jnp.float32), lse))[0].astype(query.dtype)

    def block(number: Array, parts: OutputAndLse) -> OutputAndLse:
        keys, values = rows(number)
        return merge_parts(parts, attend_parts(query, keys, values, jnp.int32(size), **options))

    # As many rows at a time as there are queries, so that the scores in memory do not grow with the sequence.
    return jax.lax.fori_loop(0, start // size, block, parts)[0].astype(query.dtype)


def _with_lse(query: Array, backend: str) -> str:
    """The back end that a configured one stands for where the log-sum-exp is wanted, and no gradient."""
    return "cudnn" if backend == "cudnn" or (backend == "auto" and fused_kernel(query.dtype)) else "xla"


def no_parts(query: Queries) -> OutputAndLse:
    """What attention of `query` to no key at all gives, as `merge_parts` takes it."""
    return jnp.zeros(query.shape, jnp.float32), jnp.full(query.shape[:3], -jnp.inf, jnp.float32)


def merge_parts(first: OutputAndLse, second: OutputAndLse) -> OutputAndLse:
    """`merge_softmaxes` of two."""
    output, lse = jax.tree.map(lambda *arrays: jnp.stack(arrays), first, second)
    return merge_softmaxes(output, lse, axis=0)


def visible(
    queries: int,
    keys: int,
    causal: bool,
    window: int | None,
    key_length: Array | None,
    start: Array | int = 0,
    documents: Documents | None = None,
) -> Array | None:
    """Boolean [batch or 1, 1, queries, keys]: which keys a query sees; None if it sees all.

    Query i stands at position start + i, key j at j; `documents` has those of all queries from position 0 on.
    """
    mask: Array | None = None
    if causal:
        distance = start + np.arange(queries)[:, None] - np.arange(keys)[None, :]
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        mask = jnp.asarray(seen)[None, None]
    if key_length is not None:
        valid = jnp.arange(keys)[None, None, None, :] < key_length[:, None, None, None]
        mask = valid if mask is None else mask & valid
    if documents is not None:
        own = jax.lax.dynamic_slice_in_dim(documents[0], start, queries, axis=1)
        same = (own[:, :, None] == documents[1][:, None, :])[:, None]
        mask = same if mask is None else mask & same
    return mask


def _attend_xla(
    query: Queries,
    key: Keys,
    value: Keys,
    scores: Scores,
    key_length: Array | None,
    dropout: Dropout | None,
    documents: Documents | None = None,
    start: Array | int = 0,
) -> OutputAndLse:
    """Attention by plain matrix products; scores and softmax in float32. Query i stands at position start + i."""
    scaled = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * scores.scale
    mask = visible(query.shape[1], key.shape[1], scores.causal, scores.window, key_length, start, documents)
    if mask is not None:
        scaled = jnp.where(mask, scaled, -jnp.inf)
    top = jnp.max(scaled, axis=-1, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))  # rows that see nothing stay finite
    weights = jnp.exp(scaled - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    lse = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + top, -jnp.inf)
    weights = weights / jnp.where(total > 0, total, 1.0)
    if dropout is not None:
        weights = dropout(weights, start)
    output = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)
    return output, jnp.swapaxes(lse[..., 0], 1, 2)


def _attend_in_chunks(
    query: Queries,
    key: Keys,
    value: Keys,
    scores: Scores,
    key_length: Array | None,
    dropout: Dropout | None,
    documents: Documents | None,
) -> OutputAndLse:
    """`_attend_xla`; with dropout or documents, by as many queries at a time as keep the scores at DROPOUT_SCORES.

    Neither pass ever holds the scores of a long history: each chunk is computed again in the backward pass.
    """
    batch, queries, heads, _ = query.shape
    chunk = max(1, DROPOUT_SCORES // (batch * heads * key.shape[1]))
    if (dropout is None and documents is None) or chunk >= queries:
        return _attend_xla(query, key, value, scores, key_length, dropout, documents)

    def some(shared: Any, fixed: Any, item: tuple[Array, Array]) -> OutputAndLse:
        (key, value), (key_length, dropout, documents), (query, number) = shared, fixed, item
        return _attend_xla(query, key, value, scores, key_length, dropout, documents, number * chunk)

    padded = jnp.pad(query, ((0, 0), (0, -queries % chunk), (0, 0), (0, 0)))
    if documents is not None:
        documents = jnp.pad(documents[0], ((0, 0), (0, -queries % chunk))), documents[1]
    fixed = key_length, dropout, documents
    found = map_rows(some, chunk, (key, value), padded, fixed, padded.shape[1] // chunk)
    output, lse = (array[:, :queries] for array in found)
    return output, lse


def _attend_cudnn(
    query: Queries,
    key: Keys,
    value: Keys,
    scores: Scores,
    key_length: Array | None,
    return_lse: bool,
    never_empty: bool,
) -> tuple[Queries, Array | None]:
    """cuDNN's fused kernel; heads are padded to a multiple of 8 features, which changes no score."""
    queries, keys, width = query.shape[1], key.shape[1], query.shape[-1]
    # JAX refuses to differentiate the kernel at odd lengths; with the log-sum-exp it is not differentiated.
    odd_queries, odd_keys = (0, 0) if return_lse else (queries % 2, keys % 2)
    if odd_keys and key_length is None and not (scores.causal and queries <= keys):
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
        scale=scores.scale,
        is_causal=scores.causal,
        local_window_size=None if scores.window is None else (scores.window - 1, 0),
        implementation="cudnn",
        **options,
    )
    output, lse = result if return_lse else (result, None)
    output = output[:, :queries, :, :width]
    if key_length is not None and not never_empty:
        empty = (key_length == 0)[:, None, None]
        output = jnp.where(empty[..., None], 0, output)
        lse = None if lse is None else jnp.where(empty, -jnp.inf, lse)
    return output, lse
