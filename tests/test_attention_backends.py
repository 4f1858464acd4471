"""The attention backends give the same: forward, backward, log-sum-exp; those that a CPU can run."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import attention as bench
from tests.support.commands import check_refusal, in_fork
from tlinformer_jax.kernels.common import Scores
from tlinformer_jax.kernels.splash import attend_splash
from tlinformer_jax.models import attention
from tlinformer_jax.models.attention import attend, attend_with_lse
from tlinformer_jax.models.layers import Dropout
from tlinformer_jax.parallel.sharding import batch_sharding, build_mesh

SCORES = Scores(12**-0.5)
CASES = {
    "all": (130, 260, SCORES, None),
    "causal": (200, 200, SCORES._replace(causal=True), None),
    "window": (300, 300, SCORES._replace(causal=True, window=7), None),
    "lengths": (5, 140, SCORES, (0, 131)),
}


def inputs(queries: int, keys: int, batch: int = 2):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((batch, n, 2, 12)), jnp.float32) for n in (queries, keys, keys))


@pytest.mark.parametrize(
    "case", ["window", "lengths", *(pytest.param(case, marks=pytest.mark.slow) for case in ("all", "causal"))]
)
def test_splash_equals_xla(case):
    """Float32 in interpret mode: outputs to 1e-5, gradients to 1e-4."""
    queries, keys, scores, lengths = CASES[case]
    key_length = None if lengths is None else jnp.array(lengths)
    arrays = inputs(queries, keys)
    mixing = jnp.asarray(np.random.default_rng(1).standard_normal(arrays[0].shape), jnp.float32)

    def outcome(backend):
        def total(query, key, value):
            output = attend(query, key, value, scores, key_length=key_length, backend=backend)
            return (output * mixing).sum(), output

        gradients, output = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
        return output, *gradients

    ours, truth = outcome("splash"), outcome("xla")
    for value, expected, tolerance in zip(ours, truth, (1e-5, 1e-4, 1e-4, 1e-4), strict=True):
        np.testing.assert_allclose(value, expected, atol=tolerance, rtol=tolerance)


def test_splash_runs_on_every_device_of_a_mesh_on_its_share_of_the_batch():
    arrays = inputs(6, 9, batch=8)
    lengths = jnp.array([9, 0, 3, 4, 5, 6, 7, 8])
    truth = attend(*arrays, SCORES, key_length=lengths, backend="xla")
    mesh = build_mesh({})
    with jax.set_mesh(mesh):
        placed = jax.device_put(arrays, batch_sharding(mesh))
        output = jax.jit(lambda *a: attend(*a, SCORES, key_length=lengths, backend="splash"))(*placed)
    np.testing.assert_allclose(output, truth, atol=1e-5)
    assert len({shard.device for shard in output.addressable_shards}) == 8
    assert output.addressable_shards[0].data.shape[0] == 1


def test_splash_lowers_for_a_tpu():
    """Forward and backward at the paper's width of a head, from a machine without one."""
    shape = jax.ShapeDtypeStruct((2, 256, 12, 36), jnp.bfloat16)

    def gradients(query, key, value, lengths):
        def total(query, key, value):
            return attend_splash(query, key, value, Scores(1 / 6), lengths).astype(jnp.float32).sum()

        return jax.grad(total, argnums=(0, 1, 2))(query, key, value)

    lengths = jax.ShapeDtypeStruct((2,), jnp.int32)
    exported = jax.export.export(jax.jit(gradients), platforms=["tpu"])(shape, shape, shape, lengths)
    assert "tpu_custom_call" in exported.mlir_module()


@pytest.mark.parametrize(
    "options", [{"scores": SCORES._replace(causal=True, window=5)}, {"scores": SCORES, "key_length": jnp.array([3, 0])}]
)
def test_dropout_in_chunks_of_queries_is_the_same_law(options, monkeypatch):
    """Rate 0 equals no dropout, gradients included; the mean over many masks equals it, too; chunks are independent."""
    arrays = inputs(11, 11)

    def outcome(dropout):
        def total(query, key, value):
            return (attend(query, key, value, dropout=dropout, backend="xla", **options) ** 2).sum()

        def attended(*arrays):
            return attend_with_lse(*arrays, dropout=dropout, backend="xla", **options)

        return (*jax.jit(attended)(*arrays), *jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*arrays))

    truth = outcome(None)
    monkeypatch.setattr(attention, "CHUNK_SCORES", 2 * 2 * 11 * 3)  # three queries at a time
    for value, expected in zip(outcome(Dropout.by_key(jax.random.key(0), 0.0)), truth, strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)

    def dropped(key):
        return attend(*arrays, dropout=Dropout.by_key(key, 0.25), backend="xla", **options)

    many = jax.jit(jax.vmap(dropped))(jax.random.split(jax.random.key(1), 4000))
    np.testing.assert_allclose(many.mean(0), truth[0], atol=0.1)
    equal = attend(*(jnp.ones_like(array) for array in arrays), SCORES, dropout=Dropout.by_key(jax.random.key(2), 0.5))
    rows = np.asarray(equal[0, :, 0, 0])
    assert len(set(np.round(rows[:3], 4))) + len(set(np.round(rows[3:6], 4))) > 2
    assert not np.allclose(rows[:3], rows[3:6])


def test_dropout_over_a_long_history_holds_few_scores(monkeypatch):
    shape = jax.ShapeDtypeStruct((1, 256, 2, 8), jnp.float32)

    def total(query, key, value):
        dropout = Dropout.by_key(jax.random.key(0), 0.1)
        return attend(query, key, value, SCORES, dropout=dropout, backend="xla").sum()

    def memory():
        gradient = jax.jit(lambda *arrays: jax.grad(total, argnums=(0, 1, 2))(*arrays))
        return gradient.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    whole = memory()
    monkeypatch.setattr(attention, "CHUNK_SCORES", 2 * 256 * 16)
    assert memory() < 0.3 * whole


@pytest.mark.parametrize(
    ("queries", "keys", "scores", "lengths"),
    [
        (7, 9, SCORES, None),
        (9, 7, SCORES._replace(causal=True), None),
        (7, 9, SCORES._replace(causal=True, window=3), None),
        (5, 3, SCORES, (3, 1)),
        (1, 4, SCORES, None),
    ],
)
def test_cudnn_gets_even_lengths_and_no_row_more_is_seen(queries, keys, scores, lengths, monkeypatch):
    """JAX refuses to differentiate cuDNN's kernel at odd lengths; XLA's stands in for it here."""
    real = jax.nn.dot_product_attention

    def stand_in(query, key, value, *, implementation, return_residual, **rest):
        assert implementation == "cudnn"
        assert query.shape[1] % 2 == key.shape[1] % 2 == query.shape[-1] % 8 == 0
        return real(query, key, value, implementation="xla", **rest)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, n, 3, 6)), jnp.float32) for n in (queries, keys, keys)]
    given = partial(attend, scores=scores, key_length=None if lengths is None else jnp.array(lengths))
    found, truth = (jax.jit(partial(given, backend=backend))(*arrays) for backend in ("cudnn", "xla"))
    np.testing.assert_allclose(found, truth, atol=1e-5)


def test_the_check_command_passes_here_and_sees_a_fault(monkeypatch, request):
    request.addfinalizer(jax.clear_caches)  # no trace with the fault is left to later tests
    assert ("xla", "float32") in bench.backends()
    pairs = [("xla", "bfloat16")]
    monkeypatch.setattr(bench, "CHECKS", {name: bench.CHECKS[name] for name in ("causal, odd length", "one query")})
    assert all(good for _, good in bench.checked(pairs))
    real = attention._attend_xla

    def faulty(query, key, value, scores, *rest):
        scale = scores.scale if query.dtype == jnp.float32 else scores.scale * 1.1
        return real(query, key, value, scores._replace(scale=scale), *rest)

    monkeypatch.setattr(attention, "_attend_xla", faulty)
    assert not any(good for _, good in bench.checked(pairs))


@pytest.mark.parametrize("chosen", ["--backends=soup", "--shapes=soup"])
def test_a_check_of_nothing_does_not_pass(chosen):
    check_refusal(in_fork("benchmarks.attention", "--check", chosen), "no backend of this machine has such a shape")
