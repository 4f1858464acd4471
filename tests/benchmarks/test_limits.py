"""The limits' formulas: against the specification's figures, the products that the decoder makes, and its arrays."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import limits
from benchmarks.limits import Weights
from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.config.model import ARCHITECTURES
from tlinformer_jax.decoding import layered, windowed
from tlinformer_jax.decoding.cache import init_cache
from tlinformer_jax.decoding.causal import extend_histories
from tlinformer_jax.decoding.decoder import step
from tlinformer_jax.decoding.memory import row_bytes, tree_bytes
from tlinformer_jax.decoding.params import decoder_params

PAPER = ModelConfig(dtype="bfloat16")
ROWS = 1024  # one chunk of history, all of it valid: what a loop's body is traced for is what runs
SMALL = ModelConfig(
    vocab_size=50,
    d_model=24,
    num_heads=2,
    num_blocks=3,
    hidden_depth=2,
    d_ff=40,
    history_window=8,
    generation_window=16,
    dtype="float32",
    attention="xla",
)
NONE = Weights(0, 0)


def test_operations_per_history_token_are_the_specifications():
    """The specification projects every row of block 0: its queries at a slide, keys and values too at a prefill."""
    history = 1_000_001 - 1_000_001 % 256
    slide, prefill = (
        work(PAPER, NONE, history + extra).flops for work, extra in ((limits.slide_work, 0), (limits.prefill_work, 1))
    )
    looked_up = 2 * PAPER.d_model**2 * (history - PAPER.vocab_size)
    assert (slide + looked_up) / 1e6 == pytest.approx(6.1e6, rel=0.01)
    assert (prefill + 3 * looked_up) / 1e6 == pytest.approx(6.9e6, rel=0.01)


def test_bytes_of_a_hit_are_the_specifications():
    baseline = dataclasses.replace(PAPER, architecture="transformer")
    million = 10**6
    assert limits.hit_work(PAPER, NONE, 1, million, 0).bytes == pytest.approx(3.46e9, rel=0.002)
    assert limits.hit_work(baseline, NONE, 1, million, 0).bytes == pytest.approx(13.8e9, rel=0.002)
    assert limits.equation_7(PAPER, 2, million) == 2 * 2 * million * 432 * 2 * 8 // 4
    # The anchors' limit at 1,025 tokens is 0.03 ms at 3.02 TB/s: the weights.
    weights = limits.weights_of(jax.eval_shape(lambda: params_of(PAPER)))
    assert limits.hit_work(PAPER, weights, 1, 1024, 1).bytes / 3.02e12 == pytest.approx(0.03e-3, rel=0.1)


def test_two_devices_halve_what_grows_with_the_history():
    history = 1 << 22
    for work, extra in ((limits.slide_work, 0), (limits.prefill_work, 1)):
        one, two = (work(PAPER, NONE, history + extra, devices) for devices in (1, 2))
        # All but the words, which each device projects.
        assert two.flops == pytest.approx(one.flops / 2, rel=0.02)
        assert two.bytes == pytest.approx(one.bytes / 2, rel=0.001)
    one, two = (limits.hit_work(PAPER, NONE, 3, history, 0, devices) for devices in (1, 2))
    fixed = limits.hit_work(PAPER, NONE, 3, history, 0, devices=1 << 60)
    assert two.bytes - fixed.bytes == pytest.approx((one.bytes - fixed.bytes) / 2)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_rows_are_the_caches_arrays(architecture):
    config = dataclasses.replace(SMALL, architecture=architecture)
    room = 8 + 16 - 1 if architecture == "sliding_window" else ROWS
    cache = init_cache(config, 1, room)
    if config.recurrent:
        assert limits.state_bytes(config) == tree_bytes(cache.state.state) > 0
        cache = dataclasses.replace(cache, state=None)
    arrays = [array for array in jax.tree.leaves(cache) if array.dtype == jnp.float32]
    window = 16 if config.windowed else 0
    assert limits.cached_rows(config, room, window) * row_bytes(config) == tree_bytes(arrays)
    assert limits.cached_bytes(config, room, window) == tree_bytes(arrays)


@pytest.mark.parametrize("architecture", ["tlinformer", "transformer", "gated_deltanet_hybrid"])
def test_cached_bytes_in_int8_are_the_caches_arrays(architecture):
    """A million rows at the paper's shape: 0.528 of bfloat16's bytes."""
    config = dataclasses.replace(PAPER, architecture=architecture)
    cache = jax.eval_shape(lambda: init_cache(config, 1, 1 << 20, cache_dtype="int8"))
    arrays = (cache.history, cache.context, cache.window) if config.windowed else cache.layers
    window = 256 if config.windowed else 0
    found = limits.cached_bytes(config, 1 << 20, window, cache_dtype="int8")
    assert found == tree_bytes(arrays)
    assert found / limits.cached_bytes(config, 1 << 20, window) == pytest.approx(76 / 144, abs=0.001)


@pytest.mark.parametrize(("architecture", "overlap"), [("tlinformer", 0), ("tconstformer", 0), ("tlinformer", 12)])
def test_operations_of_prefill_and_slide_are_those_of_the_decoder(architecture, overlap):
    config = dataclasses.replace(SMALL, architecture=architecture, window_overlap=overlap)
    params, cache = abstract(config, 1)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    prompt = jax.ShapeDtypeStruct(cache.tokens.shape[1:], jnp.int32)
    filling = jax.make_jaxpr(windowed.prefill, static_argnums=1)(params, config, cache, number, prompt, number, number)
    sliding = jax.make_jaxpr(windowed.slide, static_argnums=1)(params, config, cache, number, number)

    # The decoder restores the 8 observed rows once more (2% of the work at most), and of causal attention on the CPU
    # it computes the square.
    def squared(work: limits.Work, rows: int) -> limits.Work:
        return dataclasses.replace(work, pairs=work.pairs + config.num_layers * rows * (rows - 1) // 2)

    compare(filling, squared(limits.prefill_work(config, NONE, ROWS + 16), overlap + 16), rel=0.02)
    compare(sliding, squared(limits.slide_work(config, NONE, ROWS), overlap), rel=0.02)


CAUSAL = dataclasses.replace(SMALL, causal_history=True, token_shift=True)


def test_operations_with_a_causal_history_are_those_of_the_decoder(monkeypatch):
    """Of a slide, and of a prompt whose 64 windows of history are computed at once; z has 8 rows.

    The decoder computes squares of causal attention, masks the rows of z in the history, and computes queries and
    attention of z in the last layer, too. With a token shift it looks up no projections.
    """
    monkeypatch.setattr(windowed, "fill_histories", lambda at, found: extend_histories(at, found, jnp.int32(0), 64))
    params, cache = abstract(CAUSAL, 1)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    prompt = jax.ShapeDtypeStruct(cache.tokens.shape[1:], jnp.int32)
    filling = jax.make_jaxpr(windowed.prefill, static_argnums=1)(params, CAUSAL, cache, number, prompt, number, number)
    sliding = jax.make_jaxpr(windowed.slide, static_argnums=1)(params, CAUSAL, cache, number, number)
    square = 24**2
    for traced, work, windows, rows, looked_up in (
        (sliding, limits.slide_work(CAUSAL, NONE, ROWS), 1, 0, 0),
        (filling, limits.prefill_work(CAUSAL, NONE, ROWS + 16), 64, 16, ROWS - CAUSAL.vocab_size),
    ):
        masked = 2 * windows * 16 * 15 // 2 + 3 * (8 + rows) * 8
        masked += CAUSAL.num_layers * (8 * 7 + rows * (rows - 1)) // 2
        masked += (2 * 16 * 8 if rows else 0) + 8 * 9 // 2  # the first window has no z; the last layer
        projected = 2 * square * (8 + 2 * looked_up)
        more = dataclasses.replace(work, pairs=work.pairs + masked, dense=work.dense + projected)
        compare(traced, more, rel=1e-9)


def test_a_token_reads_a_causal_history_up_to_z():
    """The rows of z are not int8. A token of the decoder reads all rows that the cache has room for, here before z."""
    params, cache = abstract(CAUSAL, 1)
    token, active = (jax.ShapeDtypeStruct((1,), dtype) for dtype in (jnp.int32, jnp.bool_))
    traced = jax.make_jaxpr(step, static_argnums=1)(params, CAUSAL, cache, token, active)
    work = limits.hit_work(CAUSAL, NONE, 1, ROWS + 8, 16)
    compare(traced, dataclasses.replace(work, pairs=work.pairs - CAUSAL.num_layers), rel=1e-9)
    for cache_dtype in ("auto", "int8"):
        cache = jax.eval_shape(lambda cache_dtype=cache_dtype: init_cache(CAUSAL, 1, ROWS, cache_dtype=cache_dtype))
        found = limits.cached_bytes(CAUSAL, ROWS + 8, 16, cache_dtype=cache_dtype)
        assert found == tree_bytes((cache.history, cache.window))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_operations_of_a_hit_are_those_of_the_decoder(architecture):
    config, batch = dataclasses.replace(SMALL, architecture=architecture), 3
    params, cache = abstract(config, batch)
    tokens, active = (jax.ShapeDtypeStruct((batch,), dtype) for dtype in (jnp.int32, jnp.bool_))
    traced = jax.make_jaxpr(step, static_argnums=1)(params, config, cache, tokens, active)
    work = limits.hit_work(config, NONE, batch, cache.capacity, 16 if config.windowed else 0)
    # A token's product with its own key is no matrix product, and so not found.
    compare(traced, dataclasses.replace(work, pairs=work.pairs - batch * config.attention_layers), rel=1e-9)


@pytest.mark.parametrize("architecture", ["transformer", "sliding_window"])
def test_operations_of_a_baselines_prefill(architecture):
    config, length = dataclasses.replace(SMALL, architecture=architecture), 40
    reach = {"transformer": length, "sliding_window": 8 + 16}[architecture]
    seen = [sum(0 <= query - key < reach for key in range(length)) for query in range(length)]
    work = limits.prefill_work(config, NONE, length)
    assert work.pairs == (config.num_layers - 1) * sum(seen) + seen[-1]
    params, cache = abstract(config, 1)
    number, prompt = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((length,), jnp.int32)
    traced = jax.make_jaxpr(layered.prefill, static_argnums=1)(params, config, cache, number, prompt, number)
    # The decoder runs the last layer on all rows; of all but the last only keys and values are needed.
    spared = (length - 1) * (4 * 24**2 + 6 * 24 * 40)
    assert dot_flops(traced.jaxpr)[0] == work.dense + spared


def test_the_limit_is_the_larger_of_bytes_and_operations():
    for copy, read in ((1e12, 2e12), (2e12, 1e12)):
        ceilings = limits.Ceilings(copy, read, 1e14, 8)
        assert limits.Work(4e12, 1e14, 0, 4).seconds(ceilings) == (2.0, "bytes")
        assert limits.Work(1e12, 3e14, 1e14 / 16, 4).seconds(ceilings) == (4.0, "flops")


def test_measured_ceilings_are_possible(monkeypatch):
    monkeypatch.setattr(limits, "REPEATED", 1)
    found = limits.measure_ceilings(0.01)
    for rate in (found.copy_bytes_per_second, found.read_bytes_per_second):
        assert 1e8 < rate < 1e13
    assert 1e8 < found.matmul_flops_per_second < 1e16


def params_of(config: ModelConfig) -> Any:
    model = build_model(config)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    return decoder_params(model.apply(variables, method=model.parameters), config)


def abstract(config: ModelConfig, batch: int) -> tuple[Any, Any]:
    """Shapes of the decoder's parameters and of a cache of ROWS rows."""
    room = 8 + 16 - 1 if config.architecture == "sliding_window" else ROWS
    return jax.eval_shape(lambda: (params_of(config), init_cache(config, batch, room)))


def compare(traced: Any, work: limits.Work, rel: float) -> None:
    dense, attention = dot_flops(traced.jaxpr)
    assert dense == pytest.approx(work.dense, rel=rel)
    assert attention == pytest.approx(4 * work.width * work.pairs, rel=rel)


def dot_flops(jaxpr: Any) -> tuple[int, int]:
    """Operations of all matrix products of a jaxpr, loop bodies once: (with weights, of attention).

    Attention's products have batch dimensions, the heads; products with weights have none.
    """
    dense = attention = 0
    for equation in equations(jaxpr):
        if equation.primitive.name != "dot_general":
            continue
        (contracted, _), (batched, _) = equation.params["dimension_numbers"]
        inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        flops = 2 * inner * math.prod(equation.outvars[0].aval.shape)
        if batched:
            attention += flops
        else:
            dense += flops
    return dense, attention


def equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)
