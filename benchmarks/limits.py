"""Computes how fast generation could be: its unavoidable work, divided by the measured speed of the device.

A limit is the larger of two times: bytes that must move over the measured bandwidth (of a sum or of a copy, whichever
moves more bytes), and floating-point operations over the measured speed of matrix products. Only products with weights
and attended pairs are counted.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import Timing, time_calls
from tlinformer_jax.analysis.flops import causal_pairs, delta_layers, own_window_pairs
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import history_of
from tlinformer_jax.decoding.memory import paper_row_bytes, row_bytes, tree_bytes
from tlinformer_jax.decoding.params import DecoderParams

# Operations dispatched back to back in one timed call, so that the device does not wait for the host.
REPEATED = 10


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The measured speeds of the device.

    Attributes:
      copy_bytes_per_second: of a large elementwise operation, bytes read plus bytes written.
      read_bytes_per_second: of a large sum.
      matmul_flops_per_second: of a square matrix product in the compute dtype.
      matmul_size: rows of that product.
    """

    copy_bytes_per_second: float
    read_bytes_per_second: float
    matmul_flops_per_second: float
    matmul_size: int


@dataclasses.dataclass(frozen=True)
class Work:
    """Work that cannot be avoided.

    Attributes:
      bytes: read from or written to the device's memory.
      dense: floating-point operations of products with weights.
      pairs: attended (query, key) pairs, summed over layers, each of 4 * d_model operations.
      width: d_model.
      states: operations that read and write the states of Gated DeltaNet layers.
    """

    bytes: float
    dense: float
    pairs: float
    width: int
    states: float = 0.0

    @property
    def flops(self) -> float:
        """Returns the floating-point operations."""
        return self.dense + 4 * self.width * self.pairs + self.states

    def seconds(self, ceilings: Ceilings) -> tuple[float, str]:
        """Returns the limit in seconds, and which of 'bytes' and 'flops' sets it."""
        by_bytes = self.bytes / max(ceilings.read_bytes_per_second, ceilings.copy_bytes_per_second)
        by_flops = self.flops / ceilings.matmul_flops_per_second
        return (by_bytes, "bytes") if by_bytes >= by_flops else (by_flops, "flops")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Bytes of the weights that one pass reads.

    Attributes:
      layers: all layers.
      table: the embedding, which is also the head, the last LayerNorm, and the token shift.
    """

    layers: int
    table: int


def weights_of(params: DecoderParams) -> Weights:
    """Returns the bytes of a decoder's parameters that one token reads."""
    return Weights(
        tree_bytes(params.layers), tree_bytes((params.embedding, params.norm_scale, params.norm_bias, params.shift))
    )


def against(timing: Timing, work: Work, ceilings: Ceilings) -> dict[str, Any]:
    """Returns the figures of a timing with its limit; `multiple` is the median over the limit."""
    limit, by = work.seconds(ceilings)
    return timing.figures() | {
        "limit_seconds": limit,
        "limited_by": by,
        "limit_bytes": work.bytes,
        "limit_flops": work.flops,
        "multiple": timing.median / limit,
    }


def cached_rows(config: ModelConfig, history: float, window: float, devices: int = 1) -> float:
    """Returns the cached (key, value) row pairs that a sequence's next token reads on a device, summed over layers.

    Args:
      history: n, the rows before the generation window; for a baseline, the tokens so far.
      window: rows in the generation window, 0 for a baseline; a mean may be a fraction.
      devices: number of devices that the history's rows are split over.
    """
    if not config.windowed and config.architecture != "sliding_window":
        return config.attention_layers * (history + window)
    if config.architecture == "sliding_window":
        return config.num_layers * min(history + window, int(config.history_window) + config.generation_window - 1)
    layers = config.num_layers if config.causal_history else config.num_blocks * (config.hidden_depth + 1)
    observed = layers * config.observed_rows(int(history))
    return _growing_rows(config, history, window, devices) + observed + config.num_layers * window


def _growing_rows(config: ModelConfig, history: float, window: float, devices: int) -> float:
    """Returns the part of `cached_rows` that grows with the sequence and has the dtype `cache_dtype`."""
    if config.windowed:
        return config.num_blocks * _read_rows(config, history) / devices
    return config.attention_layers * (history + window) if config.grows else 0


def _read_rows(config: ModelConfig, history: float) -> float:
    """Returns the rows of the history that the window reads in `compress`: with `causal_history` those before z."""
    if config.architecture != "tlinformer":
        return 0
    return history - config.observed_rows(int(history)) * config.causal_history


def cached_bytes(
    config: ModelConfig, history: float, window: float, devices: int = 1, cache_dtype: str = "auto"
) -> float:
    """Returns the bytes of `cached_rows`; for `cache_dtype` see `sampling.GenerationConfig`."""
    growing = _growing_rows(config, history, window, devices)
    others = cached_rows(config, history, window, devices) - growing
    return growing * row_bytes(config, cache_dtype) + others * row_bytes(config)


def state_bytes(config: ModelConfig) -> int:
    """Returns the bytes of one sequence's states in all Gated DeltaNet layers, float32."""
    return 4 * (config.num_layers - config.attention_layers) * config.delta.state_size


def equation_7(config: ModelConfig, batch: int, length: int, cache_dtype: str = "auto") -> int:
    """Returns the bytes of the cache by the paper's equation 7, without windows and int8's scales.

    For a baseline these are the bytes of all attention layers.
    """
    layers = config.num_blocks if config.windowed else config.attention_layers
    return batch * length * paper_row_bytes(config, cache_dtype) * layers


def hit_work(
    config: ModelConfig,
    weights: Weights,
    batch: int,
    history: float,
    window: float,
    devices: int = 1,
    cache_dtype: str = "auto",
) -> Work:
    """Returns the work of one device for one token of every sequence in a batch; for the arguments see `cached_bytes`.

    The weights are read once, the cache of each sequence is read, and its states are read and written.
    """
    rows, recurrent = batch * cached_rows(config, history, window, devices), delta_layers(config, 1)
    layers = config.attention_layers * _layer_flops(config) + recurrent.matrix
    cached = cached_bytes(config, history, window, devices, cache_dtype) + 2 * state_bytes(config)
    return Work(
        bytes=weights.layers + weights.table + batch * cached,
        dense=batch * (layers + _head_flops(config)),
        pairs=rows + batch * config.attention_layers,  # each token also reads its own key
        width=config.d_model,
        states=batch * recurrent.attention,
    )


def slide_work(
    config: ModelConfig, weights: Weights, history: int, devices: int = 1, cache_dtype: str = "auto"
) -> Work:
    """Returns the work of one device for a slide of one sequence to `history` rows.

    Block 0 reads its rows, other blocks compute and write theirs, and rows that overlap the window run again. With
    `causal_history` other blocks compute only the rows of the window.
    """
    known = max(history - config.generation_window, 0) if config.architecture == "tlinformer" else 0
    dense, pairs = _history_work(config, history, known, devices)
    overlap = config.window_overlap
    bytes_moved = weights.layers + cached_bytes(config, history, overlap, devices, cache_dtype)
    return Work(
        bytes=bytes_moved,
        dense=dense + overlap * config.num_layers * _layer_flops(config),
        pairs=pairs + _window_pairs(config, overlap, history, devices),
        width=config.d_model,
    )


def prefill_work(
    config: ModelConfig, weights: Weights, length: int, devices: int = 1, cache_dtype: str = "auto"
) -> Work:
    """Returns the work of one device for a prompt of `length` tokens: keys, values, and logits after the last one."""
    if not config.windowed:
        return _baseline_prefill_work(config, weights, length, cache_dtype)
    history = history_of(config, length)
    window = length - history
    dense, pairs = _history_work(config, history, 0, devices)
    return Work(
        bytes=weights.layers + weights.table + cached_bytes(config, history, window, devices, cache_dtype),
        dense=dense + window * config.num_layers * _layer_flops(config) + _head_flops(config),
        pairs=pairs + _window_pairs(config, window, history, devices),
        width=config.d_model,
    )


def _window_pairs(config: ModelConfig, rows: int, history: int, devices: int) -> float:
    """Returns the pairs of the first `rows` rows of a window on one device."""
    layers = config.hidden_depth + 1 + config.causal_history
    context = layers * config.observed_rows(history) + _read_rows(config, history) / devices
    return config.num_layers * rows * (rows + 1) // 2 + config.num_blocks * rows * context


def _history_work(config: ModelConfig, history: int, known: int, devices: int) -> tuple[float, float]:
    """Returns (dense operations, pairs) of the history side of all blocks on one device.

    Args:
      history: n.
      known: rows whose keys and values block 0 already has in the cache.
      devices: number of devices that the rows are split over.
    """
    if config.causal_history:
        return _causal_history_work(config, history, known, devices)
    square, observed = 2 * config.d_model**2, config.observed_rows(history)
    each, rows, known_rows = _layer_flops(config), history / devices, known / devices
    # Per block: keys and values of all rows; the observed rows through compress, hidden layers and restore's keys.
    dense = config.num_blocks * (2 * square * rows + observed * (each - 2 * square))
    dense += config.num_blocks * observed * (config.hidden_depth * each + 2 * square) - 2 * square * known_rows
    pairs = config.num_blocks * observed * (rows + config.hidden_depth * observed)
    # Between blocks every row is restored: its query projection, and the layer after attention.
    dense += (config.num_blocks - 1) * rows * (each - 2 * square)
    pairs += (config.num_blocks - 1) * rows * observed
    # Block 0 projects each token of the vocabulary at most once (`decoding.history`).
    if config.num_blocks > 1:
        dense -= square * max(rows - config.vocab_size, 0)
    if config.architecture == "tlinformer":
        dense -= 2 * square * max(rows - known_rows - config.vocab_size, 0)
    return dense, pairs


def _causal_history_work(config: ModelConfig, history: int, known: int, devices: int) -> tuple[float, float]:
    """Returns what `_history_work` does with `causal_history`, where all caches have the `known` rows.

    Each device computes all new rows and z; only the rows before z that z reads are split.
    """
    each, square, observed = _layer_flops(config), 2 * config.d_model**2, config.observed_rows(history)
    between, new, computed = config.num_blocks - 1, history - known, config.num_layers - 1
    # A new row goes through one layer for each later block. Block 0 projects a token of the vocabulary at most once.
    dense = between * new * each + 2 * square * min(new, config.vocab_size)
    pairs = between * (own_window_pairs(config, history) - own_window_pairs(config, known))
    # z goes through all layers; in the last one it has keys and values only.
    dense += observed * (computed * each + 2 * square)
    pairs += computed * causal_pairs(observed) + config.num_blocks * observed * (history - observed) / devices
    return dense, pairs


def _baseline_prefill_work(config: ModelConfig, weights: Weights, length: int, cache_dtype: str) -> Work:
    if config.recurrent:
        return _recurrent_prefill_work(config, weights, length, cache_dtype)
    full = config.num_layers - 1  # the last layer needs only keys and values, and its last row
    reach = length
    if config.architecture == "sliding_window":
        reach = min(length, int(config.history_window) + config.generation_window)
    pairs = reach * (reach + 1) // 2 + (length - reach) * reach
    each, square = _layer_flops(config), 2 * config.d_model**2
    return Work(
        bytes=weights.layers + weights.table + cached_bytes(config, length, 0, 1, cache_dtype),
        dense=length * (full * each + 2 * square) + each - 2 * square + _head_flops(config),
        pairs=full * pairs + reach,
        width=config.d_model,
    )


def _recurrent_prefill_work(config: ModelConfig, weights: Weights, length: int, cache_dtype: str) -> Work:
    """Returns the work of a prefill that runs the last layer on all rows, as its state needs them."""
    recurrent = delta_layers(config, 1)
    layers = config.attention_layers * _layer_flops(config) + recurrent.matrix
    return Work(
        bytes=weights.layers + weights.table + cached_bytes(config, length, 0, 1, cache_dtype) + state_bytes(config),
        dense=length * layers + _head_flops(config),
        pairs=config.attention_layers * length * (length + 1) // 2,
        width=config.d_model,
        states=length * recurrent.attention,
    )


def _layer_flops(config: ModelConfig) -> int:
    """Returns the FLOPs of one row's products with a layer's four matrices; a D x D matrix takes 2 * D**2."""
    return 8 * config.d_model**2 + 6 * config.d_model * config.feed_forward_dim * config.active_experts


def _head_flops(config: ModelConfig) -> int:
    return 2 * config.d_model * config.vocab_size


def measure_ceilings(budget: float) -> Ceilings:
    """Measures the speed of the device, with at most `budget` seconds for each of three figures.

    The buffers are small compared with a long cache, so that they do not determine the peak memory of the process.
    """
    accelerator = jax.default_backend() != "cpu"
    count, size = (1 << 28, 8192) if accelerator else (1 << 24, 512)
    dtype = jnp.bfloat16 if accelerator else jnp.float32
    rows = jnp.arange(count // 1024, dtype=jnp.float32)
    array = jax.jit(lambda rows: (rows[:, None] % 61 + jnp.arange(1024) % 7).astype(dtype))(rows)
    copying = _time_copies(array, budget)
    summing = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
    reading = time_calls(lambda: [summing(array) for _ in range(REPEATED)], budget).per(REPEATED).best
    left, right = (jax.random.normal(jax.random.key(seed), (size, size), dtype) for seed in range(2))
    product = jax.jit(lambda left, right: left @ right)
    multiplying = time_calls(lambda: [product(left, right) for _ in range(REPEATED)][-1], budget).per(REPEATED).best
    return Ceilings(2 * array.nbytes / copying, array.nbytes / reading, 2 * size**3 / multiplying, size)


def _time_copies(array: jax.Array, budget: float) -> float:
    """Returns the seconds of one pass that reads and writes as many bytes as `array` has."""
    negate = jax.jit(lambda x: -x, donate_argnums=0)
    state = jnp.copy(array)

    def call() -> jax.Array:
        nonlocal state
        for _ in range(REPEATED):
            state = negate(state)
        return state

    return time_calls(call, budget).per(REPEATED).best
