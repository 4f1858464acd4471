"""The ablation replaces the kernel that it names, and no other."""

import importlib
import inspect
import subprocess
import sys

import jax.numpy as jnp
import pytest

from benchmarks.ablation import GATES, SHARED, without
from tests.support.commands import ROOT
from tlinformer_jax.kernels import common
from tlinformer_jax.kernels import dropout as dropout_kernel
from tlinformer_jax.models import ModelConfig, cached_attention, layers
from tlinformer_jax.training import loss

X = jnp.zeros((2, 16), jnp.bfloat16)


def used() -> dict[str, bool]:
    """Which kernels would be used for shapes that all of them take."""
    return {
        "loss": loss.usable("loss", X.dtype),
        "norm": layers.usable("norm", X.dtype),
        "dropout": dropout_kernel.use_kernel(X.dtype, 36),
        "token": cached_attention.use_token_kernels(ModelConfig()),
        "dense": cached_attention.MAX_FUSED_ROWS > 0,
        **{kernel: getattr(cached_attention, name)() for kernel, name in SHARED.items()},
    }


@pytest.mark.parametrize("kernel", [*GATES, *SHARED])
def test_one_kernel_is_left_out(kernel, monkeypatch):
    for module in (common, cached_attention):
        monkeypatch.setattr(module, "available", lambda name: True)
    monkeypatch.setattr(cached_attention, "use_kernels", lambda *_: True)
    for name in SHARED.values():
        monkeypatch.setattr(cached_attention, name, lambda: cached_attention.use_kernels())
    everything = used()
    assert all(everything.values())
    with without(kernel):
        assert used() == everything | {kernel: False}
    assert used() == everything


@pytest.mark.parametrize("kernel", SHARED)
def test_the_shared_gate_is_asked_by_the_functions_named(kernel):
    function = getattr(importlib.import_module("tlinformer_jax.models.cached_attention"), SHARED[kernel])
    assert "use_kernels" in inspect.unwrap(function).__code__.co_names  # below what checks its shapes


def test_an_unknown_kernel_is_refused():
    line = [sys.executable, "-m", "benchmarks.ablation", "soup", "benchmarks.training"]
    result = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "KERNEL must be one of none, loss, norm, dropout, token, dense, store, compress, restore" in result.stderr
