"""Attention with dropout by the GPU kernels, interpreted on the CPU, against plain products with the same mask."""

import functools

import jax
import jax.extend.random
import jax.numpy as jnp
import numpy as np
import pytest

from tlinformer_jax.kernels import common
from tlinformer_jax.kernels import dropout as dropout_kernel
from tlinformer_jax.kernels.common import Scores, threefry
from tlinformer_jax.kernels.dropout import Tile, Tiles, attend_with_dropout
from tlinformer_jax.models import attention
from tlinformer_jax.models.attention import attend, attend_with_lse, merge_parts
from tlinformer_jax.models.layers import Dropout, dropout_mask

# Tiles that no length below is a multiple of, other ones for each kernel.
TILES = Tiles(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2))
WORDS = jnp.array([5, 4_000_000_000, 0], jnp.uint32)
HEADS, WIDTH, SCALE = 3, 36, 1 / 6
# queries, keys, causal, window, key lengths
CASES = {
    "lengths, a row without keys": (37, 53, False, None, (0, 40)),
    "causal": (41, 41, True, None, None),
    "window": (50, 40, True, 9, (40, 17)),
    "all": (32, 64, False, None, None),
    "causal, lengths": (20, 64, True, None, (3, 64)),
}


def masked_attention(query, key, value, causal, window, lengths, rate):
    """What the kernels are to give: every weight by the formula, no mask of `attention.visible`; and log-sum-exps."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * SCALE
    q, k = np.arange(query.shape[1])[:, None], np.arange(key.shape[1])[None, :]
    seen = np.ones((query.shape[0], 1, q.size, k.size), bool)
    if causal:
        seen &= k <= q
    if window is not None:
        seen &= k > q - window
    if lengths is not None:
        seen &= k < np.asarray(lengths)[:, None, None, None]
    powers = jnp.where(seen, jnp.exp(scores), 0.0)
    total = powers.sum(-1, keepdims=True)
    weights = powers / jnp.where(total > 0, total, 1.0)
    keep = dropout_mask(WORDS, query.shape[0], HEADS, q.size, k.size, rate)
    lse = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)[..., 0]
    output = jnp.einsum("bhqk,bkhd->bqhd", jnp.where(keep, weights / (1 - rate), 0.0), value)
    return output, jnp.swapaxes(lse, 1, 2)


def outcome(function, queries: int, keys: int, batch: int = 2):
    """What the function returns, and three gradients of a sum in which each of its numbers has a weight.

    `batch` sequences of queries, two of keys.
    """
    rng = np.random.default_rng(0)

    def drawn(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    arrays = [drawn(size, n, HEADS, WIDTH) for size, n in ((batch, queries), (2, keys), (2, keys))]

    def with_gradients(*arrays):
        found, pull = jax.vjp(function, *arrays)
        return (*jax.tree.leaves(found), *pull(jax.tree.map(lambda array: drawn(*array.shape), found)))

    return jax.jit(with_gradients)(*arrays)


def check_equal(ours, truth) -> None:
    for value, expected in zip(ours, truth, strict=True):
        largest = np.abs(expected, where=np.isfinite(expected), out=np.zeros(expected.shape)).max()
        np.testing.assert_allclose(value, expected, atol=2e-5 * largest)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if place > 2 else ()) for place, case in enumerate(CASES)],
)
def test_kernels_equal_plain_products_with_the_mask(case):
    """Output, log-sum-exp and the three gradients of both, float32."""
    queries, keys, causal, window, lengths = CASES[case]
    valid = None if lengths is None else jnp.array(lengths, jnp.int32)

    def by_kernel(query, key, value):
        return attend_with_dropout(query, key, value, Scores(SCALE, causal, window), valid, WORDS, 0.3, True, TILES)

    def plainly(query, key, value):
        return masked_attention(query, key, value, causal, window, lengths, 0.3)

    ours, truth = outcome(by_kernel, queries, keys), outcome(plainly, queries, keys)
    check_equal(ours, truth)
    if lengths is not None and 0 in lengths:
        output, lse, *gradients = (value[lengths.index(0)] for value in ours)
        assert np.isneginf(lse).all()
        assert not any(np.any(value) for value in (output, *gradients))


@pytest.mark.parametrize("lengths", [None, (0, 53, 48, 7, 16, 33)])
@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("causal", [False, True])
def test_sequences_that_share_keys_equal_copies_of_them(lengths, rate, causal):
    """Three sequences of queries share each of keys; each sees as many as its own length says."""

    def kernels(query, key, value):
        length = None if lengths is None else jnp.array(lengths)
        return attend_with_dropout(
            query, key, value, Scores(SCALE, causal), length, WORDS, rate, interpret=True, tiles=TILES
        )

    def truth(query, key, value):
        key, value = (jnp.repeat(array, 3, axis=0) for array in (key, value))
        return masked_attention(query, key, value, causal, None, lengths, rate)

    check_equal(outcome(kernels, 37, 53, batch=6), outcome(truth, 37, 53, batch=6))


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_attend_takes_keys_that_sequences_share(backend, monkeypatch):
    interpreted = functools.partial(attend_with_dropout, interpret=True, tiles=TILES)
    monkeypatch.setattr(dropout_kernel, "attend_with_dropout", interpreted)
    lengths = (0, 53, 48, 7, 16, 33)

    def ours(query, key, value):
        return attend_with_lse(query, key, value, Scores(SCALE), key_length=jnp.array(lengths), backend=backend)

    def truth(query, key, value):
        key, value = (jnp.repeat(array, 3, axis=0) for array in (key, value))
        return masked_attention(query, key, value, False, None, lengths, 0.0)

    check_equal(outcome(ours, 37, 53, batch=6), outcome(truth, 37, 53, batch=6))


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_keys_of_a_number_that_does_not_divide_the_queries_are_refused(backend):
    """The kernel would read past the keys."""
    queries, keys = jnp.zeros((6, 4, HEADS, WIDTH)), jnp.zeros((4, 4, HEADS, WIDTH))
    with pytest.raises(ValueError, match="6 sequences of queries cannot share keys of 4"):
        attend(queries, keys, keys, Scores(SCALE), backend=backend)


def test_threefry_is_that_of_jax():
    counters = jnp.arange(10, dtype=jnp.uint32) * jnp.uint32(2**31 - 5)
    ours = threefry(WORDS[0], WORDS[1], counters[:5], counters[5:])
    np.testing.assert_array_equal(jnp.concatenate(ours), jax.extend.random.threefry_2x32(WORDS[:2], counters))


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_mask_has_the_rate_and_no_pattern(rate):
    """Sums that are standard normal if weights are dropped independently: of the mask, of products of neighbours in
    every direction, of patterns along the keys. All have to be below 4.5."""
    shape = (2, 3, 256, 1024)
    other = dropout_mask(WORDS + jnp.array([1, 0, 0], jnp.uint32), *shape, rate)
    keep, other = np.asarray(dropout_mask(WORDS, *shape, rate)), np.asarray(other)
    spread = np.sqrt(rate * (1 - rate))
    values, others = ((rate - ~mask) / spread for mask in (keep, other))
    found = {"rate": values.sum() / np.sqrt(values.size), "other key": (values * others).sum() / np.sqrt(values.size)}
    for axis, name in enumerate(("batch", "head", "query", "key")):
        for step in (1,) if axis < 2 else (1, 2, 3, 16, 64, 128):
            product = values * np.roll(values, step, axis)
            found[f"{name} {step}"] = product.sum() / np.sqrt(product.size)
    for steps in ((1, 1), (1, -1), (2, 1)):
        product = values * np.roll(values, steps, (2, 3))
        found[f"query and key {steps}"] = product.sum() / np.sqrt(product.size)
    square = values * np.roll(values, 1, 2) * np.roll(values, 1, 3) * np.roll(values, (1, 1), (2, 3))
    found["square"] = square.sum() / np.sqrt(square.size)
    dropped = (~keep).reshape(-1, 4) @ np.array([1, 2, 4, 8])
    ones = np.array([pattern.bit_count() for pattern in range(16)])
    expected = dropped.size * rate**ones * (1 - rate) ** (4 - ones)
    chi_square = ((np.bincount(dropped, minlength=16) - expected) ** 2 / expected).sum()
    found["four keys"] = (chi_square - 15) / np.sqrt(30)
    assert max(abs(value) for value in found.values()) < 4.5, found


def test_nothing_is_dropped_at_rate_0():
    assert dropout_mask(WORDS, 2, 3, 64, 64, 0.0).all()


def test_auto_takes_the_kernel_where_it_can(monkeypatch):
    """On one NVIDIA GPU in half precision, with dropout or the log-sum-exp."""
    half, dropout = jnp.zeros((1, 2, 1, 40), jnp.bfloat16), Dropout.by_key(jax.random.key(0), 0.1)
    assert attention.choose_backend(half, dropout, False) == "xla"
    monkeypatch.setattr(common, "available", lambda name: True)
    assert attention.choose_backend(half, dropout, False) == "triton"
    assert attention.choose_backend(half, dropout, True) == attention.choose_backend(half, None, True) == "triton"
    assert attention.choose_backend(half, None, False) == "xla"
    assert attention.choose_backend(half.astype(jnp.float32), dropout, False) == "xla"
    assert attention.choose_backend(jnp.zeros((1, 2, 1, 136), jnp.bfloat16), dropout, False) == "xla"
    with jax.set_mesh(jax.make_mesh((2,), ("data",))):
        assert attention.choose_backend(half, dropout, False) == "xla"


def test_attend_draws_the_mask_by_dropouts_key(monkeypatch):
    interpreted = functools.partial(attend_with_dropout, interpret=True, tiles=TILES)
    monkeypatch.setattr(dropout_kernel, "attend_with_dropout", interpreted)
    ones = jnp.ones((1, 16, 2, 8))

    def rows(number):
        dropout = Dropout.by_key(jax.random.key(number), 0.5)
        output = attend(ones, ones, ones, Scores(1.0), dropout=dropout, backend="triton")
        return np.asarray(output[0, :, :, 0])  # kept weights of a query, over half their number

    first = rows(0)
    np.testing.assert_allclose(first * 8, np.round(first * 8), atol=1e-5)
    assert len(set(np.round(first.ravel(), 3))) > 2
    np.testing.assert_array_equal(first, rows(0))
    assert not np.allclose(first, rows(1))


def test_a_key_of_any_kind_gives_its_words():
    kinds = (jax.random.key, jax.random.PRNGKey, functools.partial(jax.random.key, impl="rbg"))
    for kind in kinds:
        words = [Dropout.by_key(kind(number), 0.5).words for number in (0, 1)]
        assert [(array.shape, array.dtype) for array in words] == [((3,), jnp.uint32)] * 2
        assert not np.array_equal(*words)


def test_parts_draw_masks_of_their_own():
    """Parts and parts of parts: no key twice among 80,000, neighbours' masks uncorrelated."""
    dropout = Dropout(WORDS, 0.5)
    first = jax.vmap(lambda n: dropout.fold_in(n).words)(jnp.arange(40_000))
    second = jax.vmap(lambda n: dropout.fold_in(n // 200).fold_in(n % 200).words)(jnp.arange(40_000))
    words = np.concatenate([first, second]).astype(np.uint64)
    assert len(np.unique(words[:, 0] << np.uint64(32) | words[:, 1])) == 80_000
    x = jnp.ones((1, 64, 512))
    masks = jax.vmap(lambda key: Dropout(key, 0.5)(x).ravel())(jnp.concatenate([first[:20], second[:20]]))
    correlations = np.corrcoef(masks) - np.eye(40)
    assert np.abs(correlations).max() < 4.5 / np.sqrt(64 * 512)


def test_dropout_of_rows_and_of_weights_is_one_law():
    """What the XLA backend drops of weights [batch, heads, queries, keys] is what the kernel drops."""
    kept = Dropout(WORDS, 0.3)(jnp.ones((2, 3, 5, 7)))
    np.testing.assert_allclose(kept, np.asarray(dropout_mask(WORDS, 2, 3, 5, 7, 0.3)) / 0.7, rtol=1e-6)


@pytest.mark.parametrize("case", ["lengths, a row without keys", "causal", "window"])
def test_without_dropout_the_kernels_are_exact_attention(case, monkeypatch):
    """As in deterministic runs: output and gradients, float32."""
    interpreted = functools.partial(attend_with_dropout, interpret=True, tiles=TILES)
    monkeypatch.setattr(dropout_kernel, "attend_with_dropout", interpreted)
    queries, keys, causal, window, lengths = CASES[case]
    valid = None if lengths is None else jnp.array(lengths, jnp.int32)

    def by_kernel(*arrays):
        return attend(*arrays, Scores(SCALE, causal, window), key_length=valid, backend="triton")

    def plainly(query, key, value):
        return masked_attention(query, key, value, causal, window, lengths, 0.0)[0]

    check_equal(outcome(by_kernel, queries, keys), outcome(plainly, queries, keys))


def test_two_calls_of_the_kernel_are_one_softmax(monkeypatch):
    """Over keys up to a query's own, and over the first 0 or 13 of the same keys: output and gradients, float32."""
    interpreted = functools.partial(attend_with_dropout, interpret=True, tiles=TILES)
    monkeypatch.setattr(dropout_kernel, "attend_with_dropout", interpreted)
    rows, valid = 20, jnp.array([0, 13])

    def by_kernel(*arrays):
        own = attend_with_lse(*arrays, Scores(SCALE, causal=True), backend="triton")
        others = attend_with_lse(*arrays, Scores(SCALE), key_length=valid, backend="triton")
        return merge_parts(own, others)[0]

    def plainly(query, key, value):
        scores = jnp.tile(jnp.einsum("bqhd,bkhd->bhqk", query, key) * SCALE, 2)
        q, k = np.arange(rows)[:, None], np.arange(rows)[None, :]
        own, others = (
            np.broadcast_to(k <= q, (2, rows, rows)),
            np.broadcast_to(k, (2, rows, rows)) < valid[:, None, None],
        )
        seen = jnp.concatenate([own, others], axis=-1)[:, None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, jnp.concatenate([value, value], axis=1))

    check_equal(outcome(by_kernel, rows, rows), outcome(plainly, rows, rows))
