"""The GPU kernels of generation, interpreted on the CPU, against plain products in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlinformer_jax import ModelConfig
from tlinformer_jax.kernels import decode as decode_kernel
from tlinformer_jax.kernels import history as history_kernel
from tlinformer_jax.kernels import storing as storing_kernel
from tlinformer_jax.kernels.common import feature_pieces
from tlinformer_jax.kernels.key_value import KeyValue, quantised
from tlinformer_jax.models import cached_attention
from tlinformer_jax.models.cached_attention import TokenLayerParams, token_layer
from tlinformer_jax.models.cached_rows import CachedRows
from tlinformer_jax.models.layers import LayerParams, prepare_layers
from tlinformer_jax.models.rope import Rotations, rope_table, rotate

# Whole programs: one by one, operations around a kernel take longer to compile.
attend_history = jax.jit(functools.partial(history_kernel.attend, interpret=True), static_argnums=4)
attend_few = jax.jit(functools.partial(history_kernel.attend_few, interpret=True), static_argnums=4)
store = jax.jit(functools.partial(storing_kernel.store, interpret=True))
store_products = jax.jit(functools.partial(storing_kernel.store_products, interpret=True))
store_tokens = jax.jit(functools.partial(storing_kernel.store_tokens, interpret=True))


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


def after_writing(cache: KeyValue, start: int, biased: jax.Array, positions: jax.Array) -> KeyValue:
    """The cache with rotated keys, and values, of [rows, 2, heads, d_h], in sequence 1 from row `start` on."""
    keys = rotate(biased[None, :, 0], rope_table(positions, biased.shape[-1]))[0]
    place = np.s_[1, :, :, start : start + len(biased)]
    return KeyValue(
        *(
            old.at[place].set(jnp.moveaxis(rows, 0, -1))
            for old, rows in zip((cache.key, cache.value), (keys, biased[:, 1]))
        )
    )


def check_equal(found: KeyValue, expected: KeyValue) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


# The pairs of all heads fill a part of one tile of `store_tokens`, or two.
@pytest.mark.parametrize(("heads", "width"), [(3, 12), (9, 36)])
def test_stores_add_the_bias_rotate_keys_and_touch_nothing_else(heads, width):
    """Products with rows first, products with rows last, and tokens; only the first may begin at any row."""
    rows, positions = 1024, 1_000_000 + jnp.arange(1024)
    cache = KeyValue(normal(0, 2, heads, width, 2304), normal(1, 2, heads, width, 2304))
    projected, bias = normal(2, rows, 2, heads, width + 4), normal(3, 2, heads, width + 4)
    rope, columns, biased = rope_table(positions, width), Rotations(positions, width).columns(), projected + bias
    first, aligned = (jnp.int32(1), jnp.int32(200)), (jnp.int32(1), jnp.int32(1024))
    expected = after_writing(cache, 200, biased[..., :width], positions)
    check_equal(store(cache, projected, bias, (rope.cos, rope.sin), *first), expected)
    expected = after_writing(cache, 1024, biased[..., :width], positions)
    last = jnp.moveaxis(projected[..., :width], 0, -1)
    check_equal(store_products(cache, last, bias[..., :width], columns, *aligned), expected)
    table, tokens = storing_kernel.pair_table(projected, bias, width), jnp.flip(jnp.arange(rows))
    expected = after_writing(cache, 1024, biased[::-1, ..., :width], positions)
    check_equal(store_tokens(cache, table, columns, *aligned, tokens), expected)


def test_ids_past_the_vocabulary_are_clipped():
    cache, bias = KeyValue(normal(0, 2, 3, 12, 512), normal(1, 2, 3, 12, 512)), normal(3, 2, 3, 16)
    products, positions, place = normal(2, 9, 2, 3, 16), jnp.arange(128), (jnp.int32(1), jnp.int32(64))
    rope, columns = rope_table(positions, 12), Rotations(positions, 12).columns()
    tokens = jnp.asarray(np.random.default_rng(4).integers(-3, 12, 128), jnp.int32)
    expected = after_writing(cache, 64, (products + bias)[jnp.clip(tokens, 0, 8), ..., :12], positions)
    check_equal(store(cache, products, bias, (rope.cos, rope.sin), *place, tokens), expected)
    check_equal(store_tokens(cache, storing_kernel.pair_table(products, bias, 12), columns, *place, tokens), expected)


@pytest.mark.parametrize(("start", "is_chunk", "rows"), [(1024, True, 1024), (1024, False, 1024), (1280, True, 1280)])
def test_rows_are_stored_by_the_kernel_only_as_whole_tiles(start, is_chunk, rows, monkeypatch):
    """A slide appends rows from any row on; some chunks are no multiple of a tile."""
    used = []
    monkeypatch.setattr(cached_attention, "use_kernels", lambda *_: True)
    monkeypatch.setattr(storing_kernel, "store_products", lambda cache, *_: (used.append(True), cache)[1])
    layer, cache = tiny_layer(), KeyValue(normal(4, 1, 3, 6, 4096), normal(5, 1, 3, 6, 4096))
    given = jnp.int32(0), jnp.int32(start), layer, normal(6, 1, rows, 24), Rotations(jnp.arange(rows), 6), "xla"
    cached_attention.write_rows(cache, *given, is_chunk=is_chunk)
    assert bool(used) == (is_chunk and rows == 1024)


def tiny_layer() -> LayerParams:
    """3 heads of 6 features, padded to 8; 24 inner features."""
    shapes = {"norm1_scale": (24,), "norm1_bias": (24,), "qkv_kernel": (24, 3, 3, 8)}
    others = ("out_kernel", "out_bias", "norm2_scale", "norm2_bias", "gate_up_kernel", "down_kernel")
    fields = {name: normal(seed, *shape) for seed, (name, shape) in enumerate(shapes.items())}
    return LayerParams(**fields, qkv_bias=normal(3, 3, 3, 8), **dict.fromkeys(others, jnp.zeros(())))


@pytest.mark.parametrize("shifted", [False, True])
def test_rows_are_projected_rotated_and_written(shifted):
    """Against products in float64; heads are padded, and keys may have an input of their own."""
    width, heads, inner, count, layer = 6, 3, 24, 64, tiny_layer()
    cache = KeyValue(normal(4, 2, heads, width, 512), normal(5, 2, heads, width, 512))
    rows, key_rows = normal(6, 1, count, inner), normal(7, 1, count, inner) if shifted else None
    rotations = Rotations(1_000_000 + jnp.arange(count), width)
    rope = rotations.rows()
    new = cached_attention.write_rows(cache, jnp.int32(1), jnp.int32(200), layer, rows, rotations, "xla", key_rows)

    def projected(part, source):
        wide = np.asarray(source[0], np.float64)
        wide = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
        wide = wide * np.asarray(layer.norm1_scale) + np.asarray(layer.norm1_bias)
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
@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_token_layer_by_kernels_equals_plain_products(batch, with_context, int8, most_features, causal, monkeypatch):
    monkeypatch.setattr(decode_kernel, "MOST_FEATURES", most_features)
    config = ModelConfig(d_model=24, num_heads=2, d_ff=40, causal_history=causal, dtype="float32", attention="xla")
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
