"""Gated DeltaNet by the kernels of jax-linear-attention: when they run, and what is said."""

import dataclasses
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tlinformer_jax import ModelConfig, build_model
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.kernels import delta as delta_kernel
from tlinformer_jax.models import delta
from tlinformer_jax.parallel.mesh import target


@pytest.fixture
def jla(monkeypatch):
    """A stand-in for jax-linear-attention with its signature and layouts, in plain JAX; counts its calls."""
    calls = []

    def linear_attention(kind, q, k, v, *, impl, g, beta, initial_state, output_final_state):
        assert (kind, impl, output_final_state) == ("gated_deltanet", "mosaic_gpu", True)
        assert q.shape == k.shape == v.shape == (*g.shape, q.shape[-1])
        assert g.dtype == beta.dtype == initial_state.dtype == jnp.float32
        calls.append(q.shape)
        return delta.delta_chunked(q, k, v, g, beta, initial_state)

    module = types.ModuleType("jla")
    module.ops = types.SimpleNamespace(linear_attention=linear_attention)
    monkeypatch.setitem(sys.modules, "jla", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: module if name == "jla" else None)
    return calls


def test_the_kernels_serve_what_they_can(jla, own_traces):
    shape = {"vocab_size": 97, "d_model": 128, "num_heads": 4, "num_blocks": 1, "hidden_depth": 0}
    config = ModelConfig(architecture="gated_deltanet", dtype="bfloat16", memory=ExecutionPlan(), **shape)
    tokens = np.random.default_rng(0).integers(0, 97, (1, 20))
    variables = jax.jit(build_model(config).init)(jax.random.key(0), tokens)
    plain = build_model(config).apply(variables, tokens)
    assert jla == []
    jax.clear_caches()
    with target("gpu", "NVIDIA H100 80GB HBM3"):
        np.testing.assert_array_equal(build_model(config).apply(variables, tokens), plain)
        assert jla == [(1, 20, 2, 64)]  # of the scanned layer
        build_model(dataclasses.replace(config, dtype="float32")).apply(variables, tokens)
        assert len(jla) == 1


def test_layers_share_their_kernels(jla, own_traces):
    """A gradient's program has as many loops for three layers as for two; otherwise each layer compiles its own."""
    rows = jnp.zeros((1, 20, 2, 64))
    gates, state = jnp.zeros((1, 20, 2)), jnp.zeros((1, 2, 64, 64))

    def loops(layers: int) -> int:
        def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            for _ in range(layers):
                value, _ = delta_kernel.delta_rows(query, key, value, gates, gates, state)
            return value.sum()

        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(rows, rows, rows).as_text().count("stablehlo.while")

    assert loops(3) == loops(2) > 0
    assert len(jla) == 1


@pytest.mark.parametrize(
    ("kind", "dtype", "width", "partitioned", "says"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 128, False, "delta rule: kernels of jax-linear-attention"),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 128, False, "Hopper"),
        ("NVIDIA H200", "float32", 128, False, "half precision, not float32"),
        ("NVIDIA H200", "bfloat16", 36, False, "64 or 128 features, not 36"),
        ("NVIDIA H200", "bfloat16", 64, True, "partitioned"),
    ],
)
def test_which_one_runs_is_said(kind, dtype, width, partitioned, says, jla):
    with target("gpu", kind):
        assert says in delta_kernel.serving(jnp.dtype(dtype), width, partitioned)


def test_that_the_package_is_absent_is_said():
    if importlib.util.find_spec("jla") is None:
        with target("gpu", "NVIDIA H100"):
            assert "pip install 'tlinformer-jax[linear-attention]'" in delta_kernel.serving(jnp.bfloat16, 64, False)
    assert "Hopper" in delta_kernel.serving(jnp.bfloat16, 64, False)
