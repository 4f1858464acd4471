"""Gated DeltaNet (arXiv 2412.06464): instead of attending, rows read and write a state of constant size.

Each row has a query q, key k and value v, a decay g <= 0 and a write strength beta. A row changes the state S of each
head and reads its output o:

    S <- exp(g) S;   S <- S + beta k (v - S^T k)^T;   o = S^T q / sqrt(d_k)

`delta_step` computes one row, for decoding; `delta_chunked` computes many rows, chunk by chunk. In both, the state, the
decay and the write strength are float32.
"""

import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tlinformer_jax.config.delta import CONVOLUTION
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.kernels import delta as delta_kernel
from tlinformer_jax.models.feed_forward import flat_rows
from tlinformer_jax.models.layers import (
    INIT_STD,
    LAYER_NORM_EPSILON,
    ResidualParams,
    layer_norm,
    norm_params,
    params_after_mixer,
)
from tlinformer_jax.models.windows import in_chunks, joined, pad_rows
from tlinformer_jax.parallel.sharding import open_axes

CHUNK = 64
# Triangular matrices up to this size are inverted level by level with masks, larger ones by halves.
SMALL = 16
UNIT_EPSILON = 1e-6
# Initial ranges of the decay's parameters: exp(A_log) is uniform, softplus(dt_bias) is log-uniform.
RATES, STEPS = (1.0, 16.0), (1e-3, 1e-1)

Rows = Float[Array, "batch length heads d"]
Gates = Float[Array, "batch length heads"]
State = Float[Array, "batch heads d d"]


@flax.struct.dataclass
class DeltaParams(ResidualParams):
    """Parameters of one Gated DeltaNet layer: h heads of d features (`config.delta`)."""

    qkvg_kernel: Array  # [D, 4, h, d]. Queries, keys, values and the gate of the output
    conv_kernel: Array  # [4, 3, h, d]. Weights of rows t - 3 .. t, for each feature of queries, keys and values
    rates_kernel: Array  # [D, 2, h]. w_a (decay) and w_b (write strength)
    A_log: Array  # [h]
    dt_bias: Array  # [h]
    head_norm_scale: Array  # [d]. RMSNorm of each head's output


class DeltaLayer(nn.Module):
    """Declares one layer's parameters."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> DeltaParams:
        config, shape = self.config, self.config.delta
        width, heads, features, dtype = config.d_model, shape.heads, shape.width, jnp.float32
        normal = nn.initializers.normal(INIT_STD)
        return DeltaParams(
            **norm_params(self, "norm1", width),
            qkvg_kernel=self.param("qkvg_kernel", normal, (width, 4, heads, features), dtype),
            conv_kernel=self.param("conv_kernel", _init_convolution, (CONVOLUTION, 3, heads, features), dtype),
            rates_kernel=self.param("rates_kernel", normal, (width, 2, heads), dtype),
            A_log=self.param("A_log", _init_rates, (heads,), dtype),
            dt_bias=self.param("dt_bias", _init_steps, (heads,), dtype),
            head_norm_scale=self.param("head_norm_scale", nn.initializers.ones, (features,), dtype),
            **params_after_mixer(self, config, heads, features, shape.feed_forward),
        )


def _init_convolution(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _init_rates(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, *RATES)).astype(dtype)


def _init_steps(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    steps = jnp.exp(jax.random.uniform(key, shape, jnp.float32, *map(math.log, STEPS)))
    return jnp.log(jnp.expm1(steps)).astype(dtype)  # softplus of it is the step


@flax.struct.dataclass
class DeltaState:
    """A layer's state after the rows so far.

    Attributes:
      state: S of every head, float32 [batch, heads, d (keys), d (values)].
      inputs: the convolution's last three inputs, [batch, 3, 3 (queries, keys, values), heads, d], compute dtype.
    """

    state: Array
    inputs: Array

    @classmethod
    def zeros(cls, config: ModelConfig, *leading: int) -> "DeltaState":
        """Returns the state before the first row; the `leading` axes end with the batch."""
        heads, width = config.delta.heads, config.delta.width
        inputs = jnp.zeros((*leading, CONVOLUTION - 1, 3, heads, width), config.compute_dtype)
        return cls(jnp.zeros((*leading, heads, width, width), _wide(inputs)), inputs)


def delta_mixer(
    params: DeltaParams,
    x: Float[Array, "batch length D"],
    before: DeltaState,
    length: Int[Array, ""] | int | None = None,
) -> tuple[Float[Array, "batch length heads d"], DeltaState]:
    """Runs a layer's mixer; returns its output before the output projection, and the state for later rows.

    Args:
      params: from `prepare_layers`.
      x: rows of the residual stream.
      before: state after earlier rows; `DeltaState.zeros` at the beginning of a sequence.
      length: number of real rows, which come first; the others do not change the state. None if all are real.
    """
    batch, rows, _ = x.shape
    normed = layer_norm(x, params.norm1_scale, params.norm1_bias)
    projected = jnp.einsum("nd,dphk->nphk", flat_rows(normed), params.qkvg_kernel)
    projected = projected.reshape(batch, rows, *projected.shape[1:])
    inputs = jnp.concatenate([before.inputs.astype(x.dtype), projected[:, :, :3]], axis=1)
    mixed = _convolved(inputs, params.conv_kernel)
    query, key, value = mixed[:, :, 0], mixed[:, :, 1], mixed[:, :, 2]
    decay, write = _gates(params, normed)
    if length is not None:
        real = (jnp.arange(rows) < length)[:, None]
        decay, write = jnp.where(real, decay, 0), jnp.where(real, write, 0)
    if rows == 1:
        singles = (part[:, 0] for part in (query, key, value, decay, write))
        state, output = delta_step(before.state, *singles)
        output = output[:, None]
    else:
        output, state = delta_rows(query, key, value, decay, write, before.state)
    last = jax.lax.dynamic_slice_in_dim(inputs, rows if length is None else length, CONVOLUTION - 1, axis=1)
    return _gated_norm(output, projected[:, :, 3], params.head_norm_scale), DeltaState(state, last)


def _wide(array: Array) -> Any:
    """Returns the dtype of states: float32, or float64 for float64."""
    return jnp.promote_types(array.dtype, jnp.float32)


def _gates(params: DeltaParams, normed: Float[Array, "batch length D"]) -> tuple[Gates, Gates]:
    """Returns g = -exp(A_log) * softplus(w_a x + dt_bias) and beta = sigmoid(w_b x), at least in float32."""
    wide = _wide(normed)
    rates = jnp.einsum("nd,dph->nph", flat_rows(normed), params.rates_kernel, preferred_element_type=wide)
    rates = rates.reshape(*normed.shape[:2], *rates.shape[1:])
    steps = jax.nn.softplus(rates[:, :, 0] + params.dt_bias.astype(wide))
    return -jnp.exp(params.A_log.astype(wide)) * steps, jax.nn.sigmoid(rates[:, :, 1])


@jax.checkpoint
def _convolved(
    inputs: Float[Array, "batch padded 3 heads d"], kernel: Float[Array, "taps 3 heads d"]
) -> Float[Array, "batch length 3 heads d"]:
    """Applies a causal convolution and SiLU to the rows after the first three; scales q and k to unit length."""
    wide = _wide(inputs)
    rows = inputs.shape[1] - CONVOLUTION + 1
    taps = (inputs[:, tap : tap + rows].astype(wide) * kernel[tap].astype(wide) for tap in range(CONVOLUTION))
    mixed = jax.nn.silu(sum(taps, start=jnp.zeros((), wide)))
    turned = mixed[:, :, :2]
    unit = turned * jax.lax.rsqrt(jnp.sum(jnp.square(turned), axis=-1, keepdims=True) + UNIT_EPSILON)
    return jnp.concatenate([unit, mixed[:, :, 2:]], axis=2).astype(inputs.dtype)


@jax.checkpoint
def _gated_norm(output: Rows, gate: Rows, scale: Float[Array, " d"]) -> Rows:
    """Returns RMSNorm(o) * SiLU(gate), with a separate norm for each head."""
    wide = _wide(output)
    rows = output.astype(wide)
    normed = rows * jax.lax.rsqrt(jnp.mean(jnp.square(rows), axis=-1, keepdims=True) + LAYER_NORM_EPSILON)
    return (normed * scale.astype(wide) * jax.nn.silu(gate.astype(wide))).astype(gate.dtype)


# ---- The delta rule


def delta_rows(query: Rows, key: Rows, value: Rows, decay: Gates, write: Gates, state: State) -> tuple[Rows, State]:
    """Computes `delta_chunked`, by the kernels of jax-linear-attention if they can run."""
    plain = delta_kernel.why_plain(query.dtype, query.shape[-1], bool(open_axes())) is not None
    return (delta_chunked if plain else delta_kernel.delta_rows)(query, key, value, decay, write, state)


def delta_step(
    state: State,
    query: Float[Array, "batch heads d"],
    key: Float[Array, "batch heads d"],
    value: Float[Array, "batch heads d"],
    decay: Float[Array, "batch heads"],
    write: Float[Array, "batch heads"],
) -> tuple[State, Float[Array, "batch heads d"]]:
    """Computes one row; returns the next state, and the output in the query's dtype. See `delta_chunked`."""
    wide = state.dtype
    q, k, v = (part.astype(wide) for part in (query, key, value))
    state = jnp.exp(decay)[..., None, None] * state
    error = v - jnp.sum(state * k[..., None], axis=-2)
    state = state + k[..., None] * (write[..., None] * error)[..., None, :]
    output = jnp.sum(state * q[..., None], axis=-2) / math.sqrt(q.shape[-1])
    return state, output.astype(query.dtype)


def delta_chunked(
    query: Rows, key: Rows, value: Rows, decay: Gates, write: Gates, state: State, chunk: int = CHUNK
) -> tuple[Rows, State]:
    """Computes many rows; returns their outputs in the query's dtype, and the state after them.

    For a chunk with rows i and j, let G = cumsum(g) within the chunk and L_ij = exp(G_i - G_j) for i >= j, else 0:

        A = (I + tril(beta K K^T * L, -1))^-1;   U = A (beta V);   W = A (beta K * exp(G));   V' = U - W S
        O = ((Q * exp(G)) S + (Q K^T * L) V') / sqrt(d_k);   S <- exp(G_C) S + (K * exp(G_C - G))^T V'

    Only V' and S are computed chunk after chunk. No exponent is positive. Products take operands of the query's dtype
    and sum in float32; the inverse is float32. The backward pass computes all of this again.

    Args:
      query, key: scaled to unit length.
      decay: g <= 0. A row with write = 0 and decay = 0 does not change the state.
      write: beta, in [0, 1].
      state: state before the first row, [batch, heads, keys, values].
      chunk: rows per chunk: 16, 32, 64, ...; reduced for shorter sequences.
    """
    rows = query.shape[1]
    while chunk > SMALL and chunk // 2 >= rows:
        chunk //= 2
    padding = -rows % chunk

    def chunks(array: Array) -> Array:
        """Reshapes [batch, length, heads, ...] to [chunks, batch, heads, chunk, ...]."""
        return jnp.moveaxis(in_chunks(pad_rows(array, padding), chunk), 3, 2)

    outputs, state = _chunked(*map(chunks, (query, key, value, decay, write)), state)
    return joined(jnp.moveaxis(outputs, 2, 3))[:, :rows], state


@jax.checkpoint
def _chunked(
    query: Float[Array, "chunks batch heads rows d"],
    key: Float[Array, "chunks batch heads rows d"],
    value: Float[Array, "chunks batch heads rows d"],
    decay: Float[Array, "chunks batch heads rows"],
    write: Float[Array, "chunks batch heads rows"],
    state: State,
) -> tuple[Float[Array, "chunks batch heads rows d"], State]:
    wide, dtype, size = state.dtype, query.dtype, query.shape[-2]

    def product(spec: str, *operands: Array) -> Array:
        return jnp.einsum(spec, *(array.astype(dtype) for array in operands), preferred_element_type=wide)

    total = jnp.cumsum(decay.astype(wide), axis=-1)
    causal = jnp.tril(jnp.ones((size, size), bool))
    between = jnp.exp(jnp.where(causal, total[..., :, None] - total[..., None, :], -jnp.inf))
    so_far, to_end = jnp.exp(total)[..., None], jnp.exp(total[..., -1:] - total)[..., None]
    write = write.astype(wide)[..., None]
    overlap = write * product("...ik,...jk->...ij", key, key) * between
    inverse = unit_lower_inverse(jnp.where(jnp.tril(causal, -1), overlap, 0))
    own = product("...ij,...jv->...iv", inverse, write * value)
    reader = product("...ij,...jk->...ik", inverse, write * so_far * key).astype(dtype)
    writer = (to_end * key).astype(dtype)

    def one_chunk(state: Array, item: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        own, reader, writer, kept = item
        new = own - product("bhik,bhkv->bhiv", reader, state)
        after = kept[..., None, None] * state + product("bhik,bhiv->bhkv", writer, new)
        return after, (state.astype(dtype), new.astype(dtype))

    items = (own, reader, writer, jnp.exp(total[..., -1]))
    state, (states, new) = jax.lax.scan(one_chunk, state, items)
    scores = product("...ik,...jk->...ij", query, key) * between
    outputs = product("...ik,...kv->...iv", so_far * query, states) + product("...ij,...jv->...iv", scores, new)
    return (outputs / math.sqrt(query.shape[-1])).astype(dtype), state


@jax.custom_vjp
def unit_lower_inverse(lower: Float[Array, "*shape n n"]) -> Float[Array, "*shape n n"]:
    """Returns (I + lower)^-1 of strictly lower triangular matrices of size 1, 2, 4, ...

    The inverse of [[a, 0], [b, c]] is [[a', 0], [-c' b a', c']], which is as stable as substitution row by row. The
    series I - lower + lower^2 - ... would need fewer products, but for equal keys its terms reach 18 digits and cancel.
    """
    size = lower.shape[-1]
    if size > SMALL:
        half = size // 2
        upper_left, lower_left, lower_right = (
            lower[..., :half, :half],
            lower[..., half:, :half],
            lower[..., half:, half:],
        )
        first, second = unit_lower_inverse(jnp.stack([upper_left, lower_right]))
        below = -_exact(second, _exact(lower_left, first))
        top = jnp.concatenate([first, jnp.zeros_like(first)], axis=-1)
        return jnp.concatenate([top, jnp.concatenate([below, second], axis=-1)], axis=-2)
    index = jnp.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    block = 1
    while block < size:  # joins all pairs of neighbouring blocks at once
        number = index // block
        couples = (number[:, None] == number[None, :] + 1) & (number[:, None] % 2 == 1)
        inverse = inverse - _exact(inverse, _exact(jnp.where(couples, lower, 0), inverse))
        block *= 2
    return inverse


def _exact(left: Array, right: Array) -> Array:
    """Multiplies small matrices in the full precision of their dtype."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _inverse_forward(lower: Array) -> tuple[Array, Array]:
    inverse = unit_lower_inverse(lower)
    return inverse, inverse


def _inverse_backward(inverse: Array, slope: Array) -> tuple[Array]:
    across = jnp.swapaxes(inverse, -1, -2)
    return (-jnp.tril(_exact(across, _exact(slope, across)), -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)
