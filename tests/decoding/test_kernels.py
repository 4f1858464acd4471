"""The GPU kernels of generation, interpreted on the CPU, against plain products in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlinformer_jax import ModelConfig
from tlinformer_jax.kernels import decode as decode_kernel
from tlinformer_jax.kernels import history as history_kernel
from tlinformer_jax.kernels import projection as projection_kernel
from tlinformer_jax.kernels.common import feature_pieces
from tlinformer_jax.kernels.key_value import KeyValue, quantised
from tlinformer_jax.kernels.projection import PairWeights
from tlinformer_jax.models import cached_attention
from tlinformer_jax.models.cached_attention import TokenLayerParams, token_layer
from tlinformer_jax.models.cached_rows import CachedRows
from tlinformer_jax.models.layers import LayerParams, prepare_layers
from tlinformer_jax.models.rope import rope_columns, rope_table, rotate

# Whole programs: one by one, operations around a kernel take longer to compile.
attend_history = jax.jit(functools.partial(history_kernel.attend, interpret=True), static_argnums=4)
attend_few = jax.jit(functools.partial(history_kernel.attend_few, interpret=True), static_argnums=4)
store = jax.jit(functools.partial(history_kernel.store, interpret=True))
project = jax.jit(functools.partial(projection_kernel.project, interpret=True))


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def in_int8(cache: KeyValue) -> KeyValue:
    (key, key_scale), (value, value_scale) = quantised(cache.key), quantised(cache.value)
    return KeyValue(key, value, key_scale, value_scale)


def log_sum_exp(query, key, scale):
    """float64 [queries, heads] of [queries, heads, d] over [heads, d, rows]."""
    scores = np.einsum("qhd,hdk->qhk", np.asarray(query, np.float64), np.asarray(key, np.float64)) * scale
    return np.log(np.exp(scores).sum(-1))


def softmax_attention(query, key, value, scale):
    """float64 [queries, heads, d] of [queries, heads, d] over [heads, d, rows]."""
    query, key, value = (np.asarray(array, np.float64) for array in (query, key, value))
    scores = np.einsum("qhd,hdk->hqk", query, key) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,hdk->qhd", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize(("queries", "width", "length"), [(130, 12, 300), (8, 36, 256), (3, 8, 1), (5, 20, 63)])
def test_attend_history(queries, width, length):
    key, value = normal(0, 2, 2, width, 768), normal(1, 2, 2, width, 768)
    query = normal(2, queries, 2, width + 4)  # its padding must not count
    read, lse = attend_history(query, KeyValue(key, value), jnp.int32(1), jnp.int32(length), 0.3)
    truth = softmax_attention(query[..., :width], key[1, ..., :length], value[1, ..., :length], 0.3)
    np.testing.assert_allclose(read, truth, atol=2e-5)
    np.testing.assert_allclose(lse, log_sum_exp(query[..., :width], key[1, ..., :length], 0.3), atol=2e-5)


def test_attend_history_without_rows_is_zero():
    key, value = normal(0, 1, 2, 8, 256), normal(1, 1, 2, 8, 256)
    read, lse = attend_history(normal(2, 4, 2, 8), KeyValue(key, value), jnp.int32(0), jnp.int32(0), 0.3)
    assert (np.asarray(read) == 0).all()
    assert (np.asarray(lse) == -np.inf).all()


@pytest.mark.parametrize(("queries", "width", "length"), [(130, 12, 100), (64, 36, 192), (3, 8, 0)])
def test_attend_few_rows(queries, width, length):
    key, value, query = normal(0, 2, width, 192), normal(1, 2, width, 192), normal(2, queries, 2, width + 4)
    read = np.asarray(attend_few(query, key, value, jnp.int32(length), 0.3))
    assert (read[..., width:] == 0).all()
    if length:
        truth = softmax_attention(query[..., :width], key[..., :length], value[..., :length], 0.3)
        np.testing.assert_allclose(read[..., :width], truth, atol=2e-5)
    else:
        assert (read == 0).all()


@pytest.mark.parametrize("rows", [64, 192, 256, 320])
@pytest.mark.parametrize("width", [16, 36, 64])
def test_attend_few_takes_any_number_of_rows_and_queries(rows, width, monkeypatch):
    """Up to 256 narrow rows are loaded once for several tiles; padding adds up the weights if there is any."""
    monkeypatch.setattr(history_kernel, "LEAST_PROGRAMS", 4)  # 5 tiles a program of 10, as in longer texts
    padded = -(-width // 8) * 8
    key, value, query = normal(0, 2, width, rows), normal(1, 2, width, rows), normal(2, 600, 2, padded)
    for length in (rows, rows - 7):
        read = history_kernel.attend_few(query, key, value, jnp.int32(length), 0.3, interpret=True)
        truth = softmax_attention(query[..., :width], key[..., :length], value[..., :length], 0.3)
        np.testing.assert_allclose(read[..., :width], truth, atol=2e-5)
        assert (np.asarray(read[..., width:]) == 0).all()


@pytest.mark.parametrize("width", [12, 36])
def test_store_adds_the_bias_rotates_keys_and_touches_nothing_else(width):
    key, value = normal(0, 2, 3, width, 512), normal(1, 2, 3, width, 512)
    projected = normal(2, 128, 2, 3, width + 4)
    rope = rope_table(1_000_000 + jnp.arange(128), width)
    bias = normal(3, 2, 3, width + 4)
    place = jnp.int32(1), jnp.int32(200)
    new = store(KeyValue(key, value), projected, bias, (rope.cos, rope.sin), *place)
    biased = projected[..., :width] + bias[..., :width]
    true_key = rotate(biased[None, :, 0], rope)[0]
    for found, old, rows in ((new.key, key, true_key), (new.value, value, biased[:, 1])):
        expected = np.array(old)
        expected[1, :, :, 200:328] = np.moveaxis(np.asarray(rows), 0, -1)
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_store_looks_rows_up():
    key, value, products, bias = (
        normal(0, 2, 3, 12, 512),
        normal(1, 2, 3, 12, 512),
        normal(2, 9, 2, 3, 16),
        normal(3, 2, 3, 16),
    )
    rope = rope_table(jnp.arange(128), 12)
    tables, tokens = (rope.cos, rope.sin), jnp.asarray(np.random.default_rng(4).integers(0, 9, 128), jnp.int32)
    place = jnp.int32(1), jnp.int32(64)
    found = store(KeyValue(key, value), products, bias, tables, *place, tokens)
    expected = store(KeyValue(key, value), products[tokens], bias, tables, *place)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("heads", "width", "inner"), [(3, 6, 24), (2, 12, 64), (12, 36, 70)])
@pytest.mark.parametrize("looked_up", [False, True])
def test_a_chunk_is_projected_rotated_and_written_by_a_kernel(heads, width, inner, looked_up):
    """Against products in float64: keys and values in one tile or in several; nothing else of the cache changes."""
    count, sources = 256, 9 if looked_up else 256
    cache = KeyValue(normal(0, 2, heads, width, 768), normal(1, 2, heads, width, 768))
    source, kernel, bias = (
        normal(2, sources, inner),
        normal(3, inner, 2, heads, width + 2),
        normal(4, 2, heads, width + 2),
    )
    tokens = jnp.asarray(np.random.default_rng(5).integers(-2, 12, count), jnp.int32) if looked_up else None
    positions = 1_000_000 + jnp.arange(count)
    weights, columns = PairWeights.of(kernel, bias, width), rope_columns(positions, width)
    new = project(cache, source, weights, columns, jnp.int32(1), jnp.int32(256), tokens)
    rows = np.asarray(source, np.float64)[slice(None) if tokens is None else np.clip(tokens, 0, sources - 1)]
    products = np.einsum("nd,dphk->nphk", rows, np.asarray(kernel)[..., :width]) + np.asarray(bias)[..., :width]
    keys = rotate(jnp.asarray(products[None, :, 0], jnp.float32), rope_table(positions, width))[0]
    for found, old, true in ((new.key, cache.key, keys), (new.value, cache.value, products[:, 1])):
        expected = np.array(old)
        expected[1, :, :, 256:512] = np.moveaxis(np.asarray(true), 0, -1)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("shifted", [False, True])
def test_rows_are_projected_rotated_and_written(shifted):
    """Against products in float64; heads are padded, and keys may have an input of their own."""
    width, heads, inner, count = 6, 3, 24, 64
    shapes = {"norm1_scale": (inner,), "norm1_bias": (inner,), "qkv_kernel": (inner, 3, heads, 8)}
    others = ("out_kernel", "out_bias", "norm2_scale", "norm2_bias", "gate_up_kernel", "down_kernel")
    fields = {name: normal(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    layer = LayerParams(**fields, qkv_bias=normal(3, 3, heads, 8), **dict.fromkeys(others, jnp.zeros(())))
    cache = KeyValue(normal(4, 2, heads, width, 512), normal(5, 2, heads, width, 512))
    rows, key_rows = normal(6, 1, count, inner), normal(7, 1, count, inner) if shifted else None
    rope = rope_table(1_000_000 + jnp.arange(count), width)
    new = cached_attention.write_rows(cache, jnp.int32(1), jnp.int32(200), layer, rows, rope, "xla", key_rows)

    def projected(part, source):
        wide = np.asarray(source[0], np.float64)
        wide = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
        wide = wide * np.asarray(fields["norm1_scale"]) + np.asarray(fields["norm1_bias"])
        kernel = np.asarray(layer.qkv_kernel[:, part, :, :width], np.float64)
        return np.einsum("nd,dhk->nhk", wide, kernel) + np.asarray(layer.qkv_bias[part, :, :width])

    keys = jnp.asarray(projected(1, rows if key_rows is None else key_rows), jnp.float32)
    for found, old, true in (
        (new.key, cache.key, rotate(keys[None], rope)[0]),
        (new.value, cache.value, projected(2, rows)),
    ):
        expected = np.array(old)
        expected[1, :, :, 200 : 200 + count] = np.moveaxis(np.asarray(true), 0, -1)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("least", [1, 16])
def test_feature_pieces_cover_the_width_once(least):
    for width in range(2, 260, 2):
        pieces = feature_pieces(width, least)
        assert [start for start, _ in pieces] == list(np.cumsum([0] + [size for _, size in pieces])[:-1])
        total = sum(size for _, size in pieces)
        assert width <= total <= max(least, 1 << (width - 1).bit_length())
        assert all(size >= least and size & (size - 1) == 0 for _, size in pieces)
        assert least > 1 or total == width


@pytest.mark.parametrize(
    ("batch", "with_context", "int8", "most_features"),
    [
        (1, True, False, 48),
        (2, True, True, 48),
        (2, True, True, 8),  # int8 in wider heads than one warp reads
        pytest.param(5, True, False, 48, marks=pytest.mark.slow),
        pytest.param(3, False, True, 48, marks=pytest.mark.slow),
    ],
)
def test_token_layer_by_kernels_equals_plain_products(batch, with_context, int8, most_features, monkeypatch):
    monkeypatch.setattr(decode_kernel, "MOST_FEATURES", most_features)
    config = ModelConfig(d_model=24, num_heads=2, d_ff=40, dtype="float32", attention="xla")
    shapes = {
        "norm1_scale": (24,),
        "norm1_bias": (24,),
        "qkv_kernel": (24, 3, 2, 12),
        "qkv_bias": (3, 2, 12),
        "out_kernel": (2, 12, 24),
        "out_bias": (24,),
        "norm2_scale": (24,),
        "norm2_bias": (24,),
        "gate_up_kernel": (24, 2, 40),
        "down_kernel": (40, 24),
    }
    params = LayerParams(**{name: normal(seed, *shape) * 0.3 for seed, (name, shape) in enumerate(shapes.items())})
    params = TokenLayerParams.of(prepare_layers(params, jnp.float32))
    # Room for several parts of the long source; every sequence has a length of its own, one of them none.
    past = KeyValue(normal(20, 2, batch, 2, 12, 128), normal(21, 2, batch, 2, 12, 128))
    history = KeyValue(normal(22, batch, 2, 12, 1536), normal(23, batch, 2, 12, 1536))
    if int8:  # the window's rows where there is no history, as in a Transformer
        past, history = past if with_context else in_int8(past), in_int8(history)
    lengths = jnp.asarray([0, 127, 128, 5, 90][:batch], jnp.int32)
    long = jnp.asarray([1300, 0, 129, 1536, 1][:batch], jnp.int32)
    context = CachedRows(history, long) if with_context else None
    x, rope = normal(24, batch, 24), rope_table(jnp.arange(batch) * 1000 + 7, 12)
    given = (params, x, rope, CachedRows(past, lengths, 1), context)
    results = [
        jax.jit(lambda params, *rest, backend=backend: token_layer(params, config, *rest, backend))(*given)
        for backend in ("plain", "triton_interpreted")
    ]
    for plain, kernel in zip(*(jax.tree.leaves(result) for result in results)):
        np.testing.assert_allclose(kernel, plain, atol=2e-5)
