"""FLOPs against XLA's own count, against pairs counted one by one, and the peaks of accelerators."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import golden, reference
from tlinformer_jax.analysis import flops
from tlinformer_jax.analysis.flops import training_flops
from tlinformer_jax.analysis.peaks import peak_flops, utilisation
from tlinformer_jax.config.model import ARCHITECTURES, REMAT_NAMES
from tlinformer_jax.models import ModelConfig, build_model
from tlinformer_jax.training.loss import summed_cross_entropy

# Wide enough that elementwise operations, which XLA counts and we do not, are a small part.
WIDE = ModelConfig(
    vocab_size=512,
    d_model=256,
    num_heads=2,
    num_blocks=3,
    hidden_depth=1,
    d_ff=512,
    history_window=48,
    generation_window=64,
    dtype="float32",
    attention="xla",
    history_segments=8,  # one for each window: nothing is masked
    scan_layers=False,
    remat="none",
)


@pytest.mark.parametrize(
    ("architecture", "length", "first", "fields"),
    [
        ("tlinformer", 128, 0, {}),
        ("tlinformer", 160, 0, {"history_window": 80, "num_blocks": 2, "hidden_depth": 0}),
        ("tlinformer", 192, 130, {"num_blocks": 2}),  # its first two windows are not run
        ("tconstformer", 128, 0, {"num_blocks": 1}),
        ("tlinformer", 64, 0, {}),  # one window
        ("transformer", 192, 0, {}),
        ("transformer", 192, 0, {"remat": "window"}),
        *(("transformer", 192, 0, {"remat": "window", "remat_save": name}) for name in REMAT_NAMES),
        ("sliding_window", 192, 0, {}),
    ],
)
def test_hardware_flops_are_what_xla_counts(architecture, length, first, fields):
    """Within 1.5% of the cost analysis of an unrolled forward and backward pass, which counts what is elementwise."""
    config = dataclasses.replace(WIDE, architecture=architecture, **fields)
    model = build_model(config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def loss(params, tokens):
        hidden = model.apply({"params": params}, tokens, start=first, method=model.hidden_states)
        labels = tokens[:, first:]
        return summed_cross_entropy(hidden, params["embedding"], labels, jnp.ones(labels.shape), 2 * length)

    counted = jax.jit(jax.grad(loss)).lower(params, tokens).cost_analysis()["flops"]
    expected = training_flops(config, length, batch=2, read=length - first, first=first).hardware
    assert expected == pytest.approx(counted, rel=0.015)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_model_flops_hold_the_pairs_that_the_reference_attends(architecture, monkeypatch):
    """Attended pairs one by one: what a width of the attention heads adds beyond its projections."""
    config = ModelConfig(
        architecture=architecture,
        vocab_size=11,
        d_model=8,
        num_heads=2,
        num_blocks=2,
        hidden_depth=1,
        d_ff=8,
        history_window=5,
        generation_window=4,
        dtype="float32",
    )
    length, pairs, rows = 14, [0], [0, 0]
    attend, layer = reference._attend, reference._Layer

    def counting_attend(q, k, v, causal=False, window=None):
        seen = [min(i + 1, window or len(k)) if causal else len(k) for i in range(len(q))]
        pairs[0] += sum(seen)
        return attend(q, k, v, causal, window)

    class CountingLayer(layer):
        def project(self, u, positions):
            rows[0] += len(u)
            return super().project(u, positions)

        def update(self, u, attended):
            rows[1] += len(u)
            return super().update(u, attended)

    monkeypatch.setattr(reference, "_attend", counting_attend)
    monkeypatch.setattr(reference, "_Layer", CountingLayer)
    reference.logits(golden.random_weights(config), config, np.arange(length)[None] % 11)
    project, update = (2 * rows * 8 * width for rows, width in zip(rows, (3 * 8, 8 + 3 * 8), strict=True))
    expected = project + update + 4 * pairs[0] * 8 + 2 * length * 8 * 11
    if config.windowed:  # what the reference computes and a fast implementation need not
        for start in range(0, length, 4):
            observed = min(start, 5)
            unread = 2 * observed * 8 * 8  # z's queries under `restore`, in both blocks
            expected -= 2 * unread
            # Block 0's `compress` projections were counted with each window that reads them, not once a token.
            expected -= 2 * start * 8 * 3 * 8
            # The last block: no restored history, and queries for the observation window only.
            expected -= 2 * (start - observed) * 8 * 8 + 4 * start * observed * 8 + 2 * start * 8 * (8 + 3 * 8)
    assert training_flops(config, length).model == 3 * expected


def test_masked_history_padding_and_rematerialisation_are_hardware_flops_only():
    whole = training_flops(WIDE, 512)
    assert training_flops(dataclasses.replace(WIDE, history_segments=1), 512).model == whole.model
    assert training_flops(dataclasses.replace(WIDE, history_segments=1), 512).hardware > 1.2 * whole.hardware
    assert training_flops(dataclasses.replace(WIDE, remat="window"), 512) == whole, "nothing is computed twice"
    chunked = training_flops(dataclasses.replace(WIDE, history_chunk=64), 512)
    assert chunked.model == whole.model
    assert 1.1 * whole.hardware < chunked.hardware < 1.34 * whole.hardware
    grouped = training_flops(dataclasses.replace(WIDE, history_chunk=64, history_segments=1, windows_together=7), 512)
    assert grouped.hardware > 1.1 * chunked.hardware, "a group restores its longest history"
    baseline = dataclasses.replace(WIDE, architecture="transformer")
    again = training_flops(dataclasses.replace(baseline, remat="window"), 512).hardware
    assert 1.2 < again / training_flops(baseline, 512).hardware < 1.34
    padded = dataclasses.replace(WIDE, attention="cudnn", dtype="bfloat16", num_heads=8, head_padding=64)
    assert (
        training_flops(padded, 512).hardware
        > 1.3 * training_flops(dataclasses.replace(padded, head_padding=32), 512).hardware
    )
    assert training_flops(WIDE, 509).hardware > training_flops(WIDE, 509).model


def test_the_dropout_kernel_computes_two_products_more_than_cudnn(monkeypatch):
    """Scores and the weights' gradients once more: as much as a forward pass over the causal pairs."""
    config = ModelConfig(architecture="transformer", dtype="bfloat16")
    monkeypatch.setattr(flops, "fused_kernel", lambda dtype: True)
    monkeypatch.setattr(flops.dropout_kernel, "use_kernel", lambda dtype, width: True)
    without, dropped = (training_flops(dataclasses.replace(config, dropout=rate), 512).hardware for rate in (0.0, 0.1))
    assert dropped - without == pytest.approx(config.num_layers * 4 * (512 * 513 / 2) * config.d_model)


def test_sampled_windows_cost_their_share_of_the_windows_but_all_of_block_0s_projections():
    whole, sampled = (training_flops(WIDE, 512, sampled_windows=k).model for k in (0, 2))
    projections = 3 * 2 * 512 * 256 * 3 * 256
    assert sampled == pytest.approx((whole - projections) / 4 + projections)


def test_the_41m_shape_at_512():
    """0.26 GFLOP a token and more, as the shared notes have it for the baseline."""
    per_token = training_flops(ModelConfig(architecture="transformer", dtype="bfloat16"), 512).model / 512
    assert per_token == pytest.approx(0.256e9, rel=0.02)


def test_peaks_by_device_kind():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert peak_flops("TPU v5p", "bfloat16") == 459e12
    assert peak_flops("cpu", "bfloat16") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
    assert utilisation(2 * 989e12, 8, "NVIDIA H200", "bfloat16") == 0.25
