"""Exact softmax attention: the entry points `attend` and `attend_with_lse`, and their back ends.

Callers say which keys a query sees by structure (causal, local window, number of valid keys, documents), never by a
mask tensor, so that kernels can skip the other keys.
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
from tlinformer_jax.models.recompute import map_steps
from tlinformer_jax.models.windows import in_chunks, joined, pad_rows, repeat_for_windows
from tlinformer_jax.parallel.mesh import is_nvidia_gpu, platform

# Values of model.attention for which the back end depends on the device and the call.
CHOOSING = ("auto", "deterministic")
# The back ends themselves.
BACKENDS = ("xla", "cudnn", "splash", "triton")
# Keys per part when attention to many keys is split; a power of two.
KEYS_PER_PART = 1024
# Most float32 scores that plain attention holds at a time, or those of one row of queries if they are more.
CHUNK_SCORES = 1 << 27

Queries = Float[Array, "batch queries heads d_h"]
Keys = Float[Array, "shared keys heads d_h"]
# The documents of queries and of keys; a query sees only keys of its own document.
Documents = tuple[Int[Array, "batch rows"], Int[Array, "batch keys"]]
# The output and the log-sum-exp of the scaled scores, by which softmaxes over disjoint keys are merged.
OutputAndLse = tuple[Queries, Float[Array, "batch queries heads"]]


def attend(
    query: Queries,
    key: Keys,
    value: Keys,
    scores: Scores,
    *,
    key_length: Array | int | None = None,
    never_empty: bool = False,
    dropout: Dropout | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> Queries:
    """Computes exact softmax attention.

    Args:
      key, value: of as many sequences as the queries, or of a divisor of their number; then consecutive sequences of
        queries share them.
      scores: scale of the scores, `config.attention_scale`, and whether queries see only keys up to their own position,
        or the last `window` of these; then queries and keys start at the same position.
      key_length: number of valid keys, which come first; a scalar or int32 [batch]. If 0, the result is 0, never NaN.
      never_empty: `key_length` is never 0; this saves a pass over the output.
      dropout: dropout of the attention weights, with a separate mask for each softmax.
      documents: a query sees only keys of its own document; if there are none, result and gradients are 0. 'cudnn' and
        'triton' do not support documents; 'auto' then chooses another back end.
      backend: 'auto', 'deterministic' (the same without cuDNN), 'xla', 'cudnn' (NVIDIA, half precision), 'splash' (TPU,
        interpreted elsewhere) or 'triton' (NVIDIA, half precision).

    Raises:
      ValueError: for a window without `causal`, keys of a number of sequences that does not divide the queries', an
        unknown back end, or an option that the back end does not support.
    """
    chosen = choose_backend(query, dropout, False, documents is not None, backend)
    return _attend(query, key, value, scores, key_length, dropout, documents, chosen, never_empty)[0]


def attend_with_lse(
    query: Queries,
    key: Keys,
    value: Keys,
    scores: Scores,
    *,
    key_length: Array | int | None = None,
    never_empty: bool = False,
    dropout: Dropout | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> OutputAndLse:
    """Computes `attend`, and the log-sum-exp of the scaled scores, -inf for a query that sees no key.

    The results of XLA and 'triton' are differentiable, those of 'cudnn' are not; 'splash' does not support this. 'auto'
    is 'triton' in half precision on NVIDIA GPUs, otherwise XLA.
    """
    chosen = choose_backend(query, dropout, True, documents is not None, backend)
    if chosen == "splash":
        raise _unsupported(chosen, "a log-sum-exp")
    output, lse = _attend(query, key, value, scores, key_length, dropout, documents, chosen, never_empty, with_lse=True)
    assert lse is not None
    return output, lse


def _attend(
    query: Queries,
    key: Keys,
    value: Keys,
    scores: Scores,
    key_length: Array | int | None,
    dropout: Dropout | None,
    documents: Documents | None,
    backend: str,
    never_empty: bool = False,
    with_lse: bool = False,
) -> tuple[Queries, Float[Array, "batch queries heads"] | None]:
    """Calls the back end, one of BACKENDS; the log-sum-exp may be None unless `with_lse`."""
    if scores.window is not None and not scores.causal:
        raise ValueError("attend: window needs causal=True")
    if query.shape[0] % key.shape[0]:
        raise ValueError(f"attend: {query.shape[0]} sequences of queries cannot share keys of {key.shape[0]}")
    if key_length is not None:
        key_length = jnp.broadcast_to(jnp.asarray(key_length, jnp.int32), query.shape[:1])
    if query.shape[1] == 0 or key.shape[1] == 0:  # no observation window, or no history
        return jnp.zeros_like(query), no_parts(query)[1]
    if backend != "triton":
        key, value = (repeat_for_windows(array, query.shape[0]) for array in (key, value))
    if backend == "xla":
        return _attend_in_chunks(query, key, value, scores, key_length, dropout, documents)
    if backend == "triton" and documents is None:
        words, rate = (jnp.zeros((3,), jnp.uint32), 0.0) if dropout is None else (dropout.words, dropout.rate)
        return dropout_kernel.attend_with_dropout(query, key, value, scores, key_length, words, rate)
    if backend == "splash" and dropout is None:
        return attend_splash(query, key, value, scores, key_length, documents, interpret=platform() != "tpu"), None
    if backend == "cudnn" and dropout is None and documents is None:
        return _attend_cudnn(query, key, value, scores, key_length, with_lse, never_empty)
    given = {"dropout": dropout, "documents": documents}
    raise _unsupported(backend, *(name for name, option in given.items() if option is not None))


def _unsupported(backend: str, *options: str) -> ValueError:
    """Returns the error for a call with options that a back end does not support."""
    return ValueError(f"attend: backend {backend!r} does not support {' with '.join(options)}; 'auto' and 'xla' do")


def head_multiple(dtype: Any, backend: str) -> int:
    """Returns the multiple to which `layers.prepare_layers` pads the features of a head: 8 for cuDNN, else 1."""
    return 8 if fused_kernel(dtype, backend) else 1


def choose_backend(
    query: Queries, dropout: Dropout | None, with_lse: bool, documents: bool = False, backend: str = "auto"
) -> str:
    """Returns the back end for 'auto' and 'deterministic'; every other `backend` is returned as it is.

    In half precision on NVIDIA GPUs 'auto' is cuDNN, or 'triton' with dropout or `with_lse`; in bfloat16 on TPUs
    splash, or XLA with one of these; otherwise XLA. 'deterministic' has 'triton' (or XLA where that cannot run) in
    place of cuDNN: see `training.step`.

    Raises:
      ValueError: for an unknown back end.
    """
    if backend not in (*CHOOSING, *BACKENDS):
        raise ValueError(f"attend: backend {backend!r} must be one of {', '.join((*CHOOSING, *BACKENDS))}")
    if backend not in CHOOSING:
        return backend
    triton = not documents and dropout_kernel.use_kernel(query.dtype, query.shape[-1])
    # cuDNN and splash have neither dropout nor a differentiable log-sum-exp in JAX; cuDNN and triton have no documents.
    if dropout is not None or with_lse:
        return "triton" if triton else "xla"
    if documents and is_nvidia_gpu():
        return "xla"
    if fused_kernel(query.dtype):
        return "cudnn" if backend == "auto" else "triton" if triton else "xla"
    return "splash" if query.dtype == jnp.bfloat16 and platform() == "tpu" else "xla"


def fused_kernel(dtype: Any, backend: str = "auto") -> bool:
    """Returns whether generation's attention is by cuDNN: if configured, or by choice in half precision on NVIDIA GPUs.

    Training uses cuDNN in the same cases, but not with dropout, documents or 'deterministic'. The last avoids cuDNN's
    backward pass; generation has none.
    """
    return backend == "cudnn" or (backend in CHOOSING and is_half(dtype) and is_nvidia_gpu())


def attend_parts(
    query: Float[Array, "1 queries heads d_h"],
    key: Float[Array, "1 keys heads d_h"],
    value: Float[Array, "1 keys heads d_h"],
    key_length: Array,
    scale: float,
    backend: str = "auto",
) -> OutputAndLse:
    """Computes attention of a few queries to many keys of one sequence; returns float32; not differentiable.

    A fused kernel assigns each block of queries to one multiprocessor. With few queries most multiprocessors would
    idle, so the keys are split into parts that run as a batch. `key_length` is clipped to 0 .. keys.
    """
    keys = key.shape[1]
    key_length = jnp.clip(key_length, 0, keys)
    if not fused_kernel(query.dtype, backend):
        output, lse = attend_with_lse(query, key, value, Scores(scale), key_length=key_length, backend="xla")
        return output.astype(jnp.float32), lse
    count = max(1, math.gcd(keys, 1 << 20) // KEYS_PER_PART)
    key, value = (part.reshape(count, keys // count, *part.shape[2:]) for part in (key, value))
    lengths = jnp.clip(key_length - jnp.arange(count) * (keys // count), 0, keys // count)
    query = jnp.broadcast_to(query, (count, *query.shape[1:]))
    output, lse = attend_with_lse(query, key, value, Scores(scale), key_length=lengths, backend="cudnn")
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
    """Computes causal attention of one chunk of queries to all rows up to their own; not differentiable.

    Args:
      query: queries of rows start .. start + queries - 1; `start` is a multiple of their number.
      key: keys of rows 0, 1, ..., at least up to the chunk's last row.
      window: rows that each query sees, including its own; None for all rows up to its own.
    """
    size = query.shape[1]
    fused = fused_kernel(query.dtype, backend)
    chosen = "cudnn" if fused else "xla"
    if window is not None:
        # Keep only keys that a window of the chunk reaches; zeros stand in for the queries before the chunk.
        reach = min(key.shape[1] - size, window - 1)
        first = jnp.maximum(start - reach, 0)
        key, value = (jax.lax.dynamic_slice_in_dim(part, first, size + reach, axis=1) for part in (key, value))
        query = jax.lax.dynamic_update_slice_in_dim(jnp.zeros_like(key), query, start - first, axis=1)
        output = attend(query, key, value, Scores(scale, causal=True, window=window), backend=chosen)
        return jax.lax.dynamic_slice_in_dim(output, start - first, size, axis=1)

    def rows(number: Array) -> tuple[Array, Array]:
        keys, values = (jax.lax.dynamic_slice_in_dim(part, number * size, size, axis=1) for part in (key, value))
        return keys, values

    own = attend_with_lse(query, *rows(start // size), Scores(scale, causal=True), backend=chosen)
    if key.shape[1] == size:
        return own[0]
    if fused:
        before = attend_with_lse(query, key, value, Scores(scale), key_length=start, backend=chosen)
        return merge_parts(own, before)[0].astype(query.dtype)

    def block(number: Array, parts: OutputAndLse) -> OutputAndLse:
        keys, values = rows(number)
        return merge_parts(parts, attend_parts(query, keys, values, jnp.int32(size), scale, chosen))

    # One chunk of keys at a time, so that the memory for scores does not grow with the sequence.
    parts = own[0].astype(jnp.float32), own[1]
    return jax.lax.fori_loop(0, start // size, block, parts)[0].astype(query.dtype)


def no_parts(query: Queries) -> OutputAndLse:
    """Returns the output and log-sum-exp of attention to no keys, as the initial value for `merge_parts`."""
    return jnp.zeros(query.shape, jnp.float32), jnp.full(query.shape[:3], -jnp.inf, jnp.float32)


def merge_parts(first: OutputAndLse, second: OutputAndLse) -> OutputAndLse:
    """Merges two softmaxes over disjoint keys; returns float32."""
    output, lse = jax.tree.map(lambda *arrays: jnp.stack(arrays).astype(jnp.float32), first, second)
    return merge_softmaxes(output, lse, axis=0)


def visible(
    queries: int,
    keys: int,
    scores: Scores,
    key_length: Array | None,
    start: Array | int = 0,
    documents: Documents | None = None,
) -> Array | None:
    """Returns which keys each query sees, bool [batch or 1, 1, queries, keys]; None if all.

    Query i is at position start + i, key j at position j; `documents[0]` begins at position 0, not at `start`.
    """
    mask: Array | None = None
    if scores.causal:
        distance = start + np.arange(queries)[:, None] - np.arange(keys)[None, :]
        seen = distance >= 0 if scores.window is None else (distance >= 0) & (distance < scores.window)
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
    """Computes attention by plain matrix products; scores and softmax are float32; query i is at start + i."""
    scaled = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * scores.scale
    mask = visible(query.shape[1], key.shape[1], scores, key_length, start, documents)
    if mask is not None:
        scaled = jnp.where(mask, scaled, -jnp.inf)
    top = jnp.max(scaled, axis=-1, keepdims=True, initial=-jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0.0))  # finite even for rows that see no key
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
    """Runs `_attend_xla` in chunks of queries with at most CHUNK_SCORES scores, or of one row of queries.

    Neither pass ever holds all scores of a long history: the backward pass computes each chunk again.
    """
    batch, queries, heads, _ = query.shape
    chunk = max(1, CHUNK_SCORES // (batch * heads * key.shape[1]))
    if chunk >= queries:
        return _attend_xla(query, key, value, scores, key_length, dropout, documents)

    def some(keys: tuple[Array, Array], constants: Any, item: tuple[Array, Array]) -> OutputAndLse:
        (key, value), (key_length, dropout, documents), (query, number) = keys, constants, item
        return _attend_xla(query, key, value, scores, key_length, dropout, documents, number * chunk)

    missing = -queries % chunk
    padded = pad_rows(query, missing)
    if documents is not None:
        documents = pad_rows(documents[0], missing), documents[1]
    constants = key_length, dropout, documents
    found = map_steps(some, (key, value), in_chunks(padded, chunk), constants, padded.shape[1] // chunk)
    output, lse = (joined(array)[:, :queries] for array in found)
    return output, lse


def _attend_cudnn(
    query: Queries,
    key: Keys,
    value: Keys,
    scores: Scores,
    key_length: Array | None,
    with_lse: bool,
    never_empty: bool,
) -> tuple[Queries, Array | None]:
    """Calls cuDNN's fused kernel; heads are padded to a multiple of 8 features, which does not change the scores."""
    queries, keys, width = query.shape[1], key.shape[1], query.shape[-1]
    # JAX refuses to differentiate the kernel at odd lengths. With `with_lse` it is never differentiated.
    odd_queries, odd_keys = (0, 0) if with_lse else (queries % 2, keys % 2)
    if odd_keys and key_length is None and not (scores.causal and queries <= keys):
        key_length, never_empty = jnp.full(query.shape[:1], keys, jnp.int32), True
    query, key, value = (
        jnp.pad(x, [(0, 0), (0, odd), (0, 0), (0, -width % 8)])
        for x, odd in ((query, odd_queries), (key, odd_keys), (value, odd_keys))
    )
    options: dict[str, Any] = {"return_residual": with_lse}
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
    output, lse = result if with_lse else (result, None)
    output = output[:, :queries, :, :width]
    if key_length is not None and not never_empty:
        empty = (key_length == 0)[:, None, None]
        output = jnp.where(empty[..., None], 0, output)
        lse = None if lse is None else jnp.where(empty, -jnp.inf, lse)
    return output, lse
