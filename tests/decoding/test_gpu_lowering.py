"""The GPU kernels of generation and training become Triton programs at the 41M shape: lowered for an H100, on the CPU.

It catches what interpretation cannot, such as an operation that a new JAX no longer lowers; it runs nothing.
"""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from tlinformer_jax import ModelConfig
from tlinformer_jax.kernels import dropout as dropout_kernel
from tlinformer_jax.kernels import history as history_kernel
from tlinformer_jax.kernels import loss as loss_kernel
from tlinformer_jax.kernels import norm as norm_kernel
from tlinformer_jax.kernels import storing as storing_kernel
from tlinformer_jax.kernels.common import Scores, addressable
from tlinformer_jax.kernels.key_value import KeyValue
from tlinformer_jax.models import cached_attention
from tlinformer_jax.models.cached_attention import TokenLayerParams, token_layer
from tlinformer_jax.models.cached_rows import CachedRows
from tlinformer_jax.models.layers import Layer, prepare_layers
from tlinformer_jax.models.rope import Rotations, rope_table

pytest.importorskip("jax.experimental.pallas.triton")

ROWS, QUERIES = 2048, 300
CONFIG = ModelConfig(dtype="bfloat16")
HEADS, WIDTH = CONFIG.num_heads, CONFIG.head_dim


def half(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def cache_of(kept: str, batch: int = 2, rows: int = ROWS) -> KeyValue:
    """A cache of `rows` rows."""
    shape = (batch, HEADS, WIDTH, rows)
    if kept == "bfloat16":
        return KeyValue(half(*shape), half(*shape))
    integers, scales = jax.ShapeDtypeStruct(shape, jnp.int8), half(batch, HEADS, rows)
    return KeyValue(integers, integers, scales, scales)


def number() -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((), jnp.int32)


def lowered(function, *arguments) -> str:
    """StableHLO of `function` for one H100."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
def test_attention_to_history(kept):
    text = lowered(
        lambda *arguments: history_kernel.attend(*arguments, 0.1),
        half(QUERIES, HEADS, 40), cache_of(kept), number(), number(),
    )  # fmt: skip
    assert "attend_history" in text
    assert "triton" in text


@pytest.mark.parametrize("programs", [1, 10**6], ids=["several tiles", "one tile"])
def test_attention_to_the_compressed_context(monkeypatch, programs):
    monkeypatch.setattr(history_kernel, "LEAST_PROGRAMS", programs)
    rows = half(HEADS, WIDTH, 256)
    text = lowered(
        lambda *arguments: history_kernel.attend_few(*arguments, 0.1), half(QUERIES, HEADS, 40), rows, rows, number()
    )
    assert "attend_context" in text


@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
@pytest.mark.parametrize("looked_up", [False, True])
def test_storing(kept, looked_up):
    def store(cache, projected, bias, positions, tokens, row, start):
        rope = rope_table(positions, WIDTH)
        tables = rope.cos, rope.sin
        return storing_kernel.store(cache, projected, bias, tables, row, start, tokens if looked_up else None)

    rows = jax.ShapeDtypeStruct((128,), jnp.int32)
    projected, bias = half(500 if looked_up else 128, 2, HEADS, 40), half(2, HEADS, 40)
    text = lowered(store, cache_of(kept), projected, bias, rows, rows, number(), number())
    assert "store_history" in text


def test_storing_products_and_tokens():
    def store(cache, products, bias, positions, row, start):
        return storing_kernel.store_products(cache, products, bias, Rotations(positions, WIDTH).columns(), row, start)

    rows = jax.ShapeDtypeStruct((1024,), jnp.int32)
    products, bias = half(2, HEADS, WIDTH, 1024), half(2, HEADS, WIDTH)
    text = lowered(store, cache_of("bfloat16"), products, bias, rows, number(), number())
    assert "store_products" in text

    def look_up(cache, projected, bias, positions, tokens, row, start):
        table = storing_kernel.pair_table(projected, bias, WIDTH)
        return storing_kernel.store_tokens(cache, table, Rotations(positions, WIDTH).columns(), row, start, tokens)

    projected = half(500, 2, HEADS, 40)
    text = lowered(look_up, cache_of("bfloat16"), projected, half(2, HEADS, 40), rows, rows, number(), number())
    assert "store_tokens" in text


def test_loss_and_slope():
    rows, wide = 16, jax.ShapeDtypeStruct((16, 50304), jnp.float32)
    targets, weights = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.float32)
    text = lowered(
        lambda *arguments: loss_kernel.loss_and_slope(*arguments, CONFIG.vocab_size, jnp.bfloat16),
        wide, targets, weights,
    )  # fmt: skip
    assert "loss_and_slope" in text


@pytest.mark.parametrize("skip", [None, half(64, CONFIG.d_model)])
def test_layer_norm_backward(skip):
    rows, scale = half(64, CONFIG.d_model), jax.ShapeDtypeStruct((CONFIG.d_model,), jnp.float32)
    text = lowered(
        lambda x, gradient, skip, scale: norm_kernel.layer_norm_backward(x, gradient, skip, scale, 1e-5),
        rows, rows, skip, scale,
    )  # fmt: skip
    assert "layer_norm_backward" in text


def test_calls_of_equal_shapes_share_a_kernel():
    """XLA compiles a kernel for each call that differs in a byte, and a kernel holds the lines that called it."""
    rows, scale = half(64, CONFIG.d_model), jax.ShapeDtypeStruct((CONFIG.d_model,), jnp.float32)

    def two(x, gradient, scale):
        one = norm_kernel.layer_norm_backward(x, gradient, None, scale, 1e-5)[0]
        return norm_kernel.layer_norm_backward(one, gradient, None, scale, 1e-5)

    text = lowered(two, rows, rows, scale)
    calls = [re.sub(r"%\w+", "", line) for line in text.splitlines() if "stablehlo.custom_call" in line]
    assert calls
    assert len(set(calls)) == 1


@pytest.mark.parametrize(
    ("causal", "window", "lengths", "shared"), [(False, None, True, 2), (True, 256, False, 2), (False, None, True, 1)]
)
def test_attention_with_dropout(causal, window, lengths, shared):
    """Two sequences of queries; with one of keys they share it."""
    queries, keys = half(2, QUERIES, HEADS, 40), half(shared, QUERIES, HEADS, 40)
    words, key_length = jax.ShapeDtypeStruct((3,), jnp.uint32), jax.ShapeDtypeStruct((2,), jnp.int32)
    key_length = key_length if lengths else None

    def gradients(query, key, value, key_length, words):
        def total(query, key, value):
            output, lse = dropout_kernel.attend_with_dropout(
                query, key, value, Scores(1 / 6, causal, window), key_length, words, 0.1
            )
            return output.astype(jnp.float32).sum() + lse.sum()

        return jax.grad(total, argnums=(0, 1, 2))(query, key, value)

    text = lowered(gradients, queries, keys, keys, key_length, words)
    for name in ("dropout_attention", "dropout_attention_query_gradient", "dropout_attention_key_gradient"):
        assert f'"{name}"' in text


@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
def test_a_tokens_layer(kept):
    params = jax.eval_shape(lambda: Layer(CONFIG).init_with_output(jax.random.key(0))[0])
    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)

    def layer(params, x, window, history, lengths):
        token = TokenLayerParams.of(prepare_layers(params, jnp.bfloat16))
        past = CachedRows(window, lengths)
        context = CachedRows(history, lengths)
        return token_layer(token, CONFIG, x, rope_table(lengths, WIDTH), past, context, "triton")

    text = lowered(layer, params, half(1, CONFIG.d_model), cache_of("bfloat16", 1), cache_of(kept, 1), lengths)
    assert text.count("attend_cached") >= 1
    assert ("prmt.b32" in text) == (kept == "int8")
    assert "dense" in text


MILLION = 2**20


@pytest.mark.parametrize(
    ("kept", "rows", "reached"),
    [
        ("int8", 4 * MILLION, True),
        ("int8", 5 * MILLION, False),
        ("int8", 9 * MILLION, False),
        ("int8", 10 * MILLION, True),
        ("bfloat16", 5 * MILLION, True),
    ],
)
def test_offsets_of_long_caches(kept, rows, reached, monkeypatch, capsys):
    """An array of more than 2^31 elements needs offsets of 64 bits; where JAX does not take them, no kernel is used."""
    cache = cache_of(kept, 1, rows)
    assert addressable(cache) == reached
    monkeypatch.setattr(cached_attention, "use_kernels", lambda *_: True)
    with monkeypatch.context() as patched:
        patched.setattr(history_kernel.pl, "pallas_call", functools.partial(history_kernel.pl.pallas_call, debug=True))
        text = lowered(
            lambda *arguments: cached_attention.attend_history(*arguments, 0.1, MILLION, "auto"),
            half(1, QUERIES, HEADS, 40), cache, number(), number(),
        )  # fmt: skip
    assert ("attend_history" in text) == reached
    element = {"int8": "i8", "bfloat16": "bf16"}[kept]
    offsets = set(re.findall(rf"addptr .*x!tt.ptr<{element}>>, tensor<16x64xi(\d+)>", capsys.readouterr().out))
    assert offsets == ({"64" if cache.key.size > 2**31 else "32"} if reached else set())


def test_what_reads_an_int8_cache_is_said_with_the_arrays_that_kernels_do_not_reach(monkeypatch):
    monkeypatch.setattr(cached_attention, "use_kernels", lambda *_: True)
    monkeypatch.setattr(cached_attention, "use_token_kernels", lambda _: True)
    line = "int8 cache: read by a kernel for a token, by a kernel for prefill and slide"
    assert cached_attention.int8_readers(CONFIG) == f"{line}; arrays of 2^31 to 2^32 numbers by plain JAX"


@pytest.mark.parametrize("rows", [5 * MILLION, 10 * MILLION])
def test_long_int8_caches_are_written_and_read_by_what_reaches_them(rows, monkeypatch, capsys):
    cache, reached = cache_of("int8", 1, rows), rows == 10 * MILLION
    monkeypatch.setattr(cached_attention, "use_kernels", lambda *_: True)
    monkeypatch.setattr(cached_attention, "use_token_kernels", lambda _: True)

    params = jax.eval_shape(lambda: Layer(CONFIG).init_with_output(jax.random.key(0))[0])

    def write(cache, params, rows, positions, row, start):
        layer, rotations = prepare_layers(params, jnp.bfloat16, 8), Rotations(positions, WIDTH)
        return cached_attention.write_rows(cache, row, start, layer, rows, rotations, "auto")

    positions = jax.ShapeDtypeStruct((128,), jnp.int32)
    text = lowered(write, cache, params, half(1, 128, CONFIG.d_model), positions, number(), number())
    assert ("store_history" in text) == reached

    lengths = jax.ShapeDtypeStruct((1,), jnp.int32)

    def layer(params, x, window, history, lengths):
        token = TokenLayerParams.of(prepare_layers(params, jnp.bfloat16))
        context = CachedRows(history, lengths)
        return token_layer(token, CONFIG, x, rope_table(lengths, WIDTH), CachedRows(window, lengths), context)

    with monkeypatch.context() as patched:
        patched.setattr(history_kernel.pl, "pallas_call", functools.partial(history_kernel.pl.pallas_call, debug=True))
        text = lowered(layer, params, half(1, CONFIG.d_model), cache_of("bfloat16", 1), cache, lengths)
    assert ("attend_cached" in text) == reached
    offsets = set(re.findall(r"addptr .*x!tt.ptr<i8>>, tensor<[0-9x]+xi(\d+)>", capsys.readouterr().out))
    assert offsets == ({"64"} if reached else set())
