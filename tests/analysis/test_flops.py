"""Model FLOPs against pairs counted one by one, and the peaks of accelerators."""

import dataclasses

import numpy as np
import pytest

from tests.benchmarks.test_flops import WIDE
from tests.support import golden, reference
from tlinformer_jax.analysis.flops import peak_flops, training_flops
from tlinformer_jax.config.model import ARCHITECTURES
from tlinformer_jax.models import ModelConfig


@pytest.mark.parametrize(
    ("architecture", "overlap", "causal"),
    [
        *((name, 0, False) for name in ARCHITECTURES),
        ("tlinformer", 3, False),
        ("tconstformer", 1, False),
        ("tlinformer", 0, True),
    ],
)
def test_model_flops_hold_the_pairs_that_the_reference_attends(architecture, overlap, causal, monkeypatch):
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
        window_overlap=overlap,
        causal_history=causal,
        dtype="float32",
    )
    length, pairs, rows, mixed = 14, [0], [0, 0], [0]
    attend, layer, mix = reference._attend, reference._Layer, reference.delta_rule

    def counting_attend(q, k, v, causal=False, window=None, ids=None):
        before = len(k) - len(q)  # the queries are of the last rows of the keys
        seen = [min(before + i + 1, window or len(k)) if causal else len(k) for i in range(len(q))]
        pairs[0] += sum(seen)
        return attend(q, k, v, causal, window)

    def counting_mix(q, k, v, g, beta):
        mixed[0] += len(q)
        return mix(q, k, v, g, beta)

    class CountingLayer(layer):
        def project(self, u, positions):
            rows[0] += len(u)
            return super().project(u, positions)

        def update(self, u, attended):
            rows[1] += len(u)
            return super().update(u, attended)

    monkeypatch.setattr(reference, "_attend", counting_attend)
    monkeypatch.setattr(reference, "_Layer", CountingLayer)
    monkeypatch.setattr(reference, "delta_rule", counting_mix)
    reference.logits(golden.random_weights(config), config, np.arange(length)[None] % 11)
    project, update = (2 * rows * 8 * width for rows, width in zip(rows, (3 * 8, 8 + 3 * 8), strict=True))
    expected = project + update + 4 * pairs[0] * 8 + 2 * length * 8 * 11
    # A row under a layer of Gated DeltaNet: four projections instead of three, the decay and the write strength of two
    # heads, a narrower feed-forward; and of two states, of 4 by 4, what a key and a query read and what is written.
    expected += mixed[0] * (2 * 8 * (4 * 8 + 2 * 2 + 8 + 3 * config.delta.feed_forward) + 3 * 2 * 2 * 4 * 4)
    expected -= mixed[0] * 2 * 8 * (8 + 3 * 8)
    if config.windowed:  # what the reference computes and a fast implementation need not
        for start in range(0, length, 4):
            history = max(0, start - overlap)
            observed = min(history, 5)
            if causal:  # z of the last block is not restored: its queries, what they read, and its update
                expected -= 2 * observed * 8 * 8 + 4 * 8 * observed * (observed + 1) / 2
                expected -= 2 * observed * 8 * (8 + 3 * 8)
                history -= observed  # rows that the last block does not restore by attention
            else:
                expected -= 2 * 2 * observed * 8 * 8  # z's queries under `restore`, in both blocks
            # Block 0's `compress` projections were counted with each window that reads them, not once a token.
            expected -= 2 * start * 8 * 3 * 8
            # The last block: no restored history, and queries for the observation window only.
            unread = history if causal else history - observed
            expected -= 2 * unread * 8 * 8 + 4 * history * observed * 8
            expected -= 2 * history * 8 * (8 + 3 * 8)
    assert training_flops(config, length) == 3 * expected


def test_a_causal_history_in_z_costs_what_a_transformer_costs():
    """Over the sequence so far, but for block 0's `compress` projections, which count once for all windows, and in the
    last layer z's queries, what they read and their update."""
    config = dataclasses.replace(WIDE, causal_history=True, history_window=448, generation_window=64, num_blocks=2)
    layers = dataclasses.replace(config, causal_history=False, architecture="transformer")
    size, width, expected = 64, 256, 0.0
    for stop in range(size, 513, size):
        n = stop - size
        expected += training_flops(layers, stop, read=0) - 3 * 2 * stop * width * 3 * width
        expected -= 3 * (2 * n * width * (width + width + 3 * config.feed_forward_dim) + 4 * width * n * (n + 1) / 2)
    expected += 3 * 2 * 512 * width * 3 * width
    assert training_flops(config, 512, read=0) == pytest.approx(expected, rel=1e-12)


def test_sampled_windows_cost_their_share_of_the_windows_but_all_of_block_0s_projections():
    whole, sampled = (training_flops(WIDE, 512, sampled_windows=k) for k in (0, 2))
    projections = 3 * 2 * 512 * 256 * 3 * 256
    assert sampled == pytest.approx((whole - projections) / 4 + projections)


def test_the_41m_shape_at_512():
    """0.26 GFLOP a token and more, as the shared notes have it for the baseline."""
    per_token = training_flops(ModelConfig(architecture="transformer", dtype="bfloat16"), 512) / 512
    assert per_token == pytest.approx(0.256e9, rel=0.02)


def test_peaks_by_device_kind():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA GH200 480GB", "bfloat16") == 989e12
    assert [peak_flops(f"NVIDIA {name}", "bfloat16") for name in ("L4", "L40", "L40S")] == [121e12, 181e12, 362e12]
    assert peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert peak_flops("TPU v5p", "bfloat16") == 459e12
    assert peak_flops("cpu", "bfloat16") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None
