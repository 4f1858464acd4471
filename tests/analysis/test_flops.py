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
    ("architecture", "overlap"), [*((name, 0) for name in ARCHITECTURES), ("tlinformer", 3), ("tconstformer", 1)]
)
def test_model_flops_hold_the_pairs_that_the_reference_attends(architecture, overlap, monkeypatch):
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
            expected -= 2 * 2 * observed * 8 * 8  # z's queries under `restore`, in both blocks
            # Block 0's `compress` projections were counted with each window that reads them, not once a token.
            expected -= 2 * start * 8 * 3 * 8
            # The last block: no restored history, and queries for the observation window only.
            expected -= 2 * (history - observed) * 8 * 8 + 4 * history * observed * 8
            expected -= 2 * history * 8 * (8 + 3 * 8)
    assert training_flops(config, length) == 3 * expected


@pytest.mark.parametrize(
    ("blocks", "hidden", "observed", "generation"), [(1, 0, 3, 4), (2, 1, 5, 4), (4, 0, 2, 4), (3, 1, "auto", 1)]
)
def test_model_flops_with_a_causal_history_are_those_of_its_rows_one_by_one(blocks, hidden, observed, generation):
    config = ModelConfig(
        vocab_size=11,
        d_model=8,
        num_heads=2,
        num_blocks=blocks,
        hidden_depth=hidden,
        d_ff=16,
        history_window=observed,
        generation_window=generation,
        causal_history=True,
        dtype="float32",
    )
    length, pairs, projected, updated = 14, 0, 3 * 14, 0  # block 0's `compress` projections, once a token
    for n in range(0, length, generation):
        h, stop = n - config.observed_rows(n), min(n + generation, length)
        for layer in range(config.num_layers):
            in_compress, last = not layer % (hidden + 2), layer == config.num_layers - 1
            for row in range(h, stop):
                # Not of z in the last layer, which needs only keys and values, nor in the first: z was x before.
                computed = row >= n or not (last or layer == 0)
                if layer:
                    projected += 3 if computed else 2
                if computed:
                    pairs += row + 1 if in_compress else row + 1 - h
                    updated += 1
        for block in range(1, blocks):  # the history that the block reads
            for row in range(n, stop):
                pairs += row + 1 - h
                updated += 1
                projected += 3 if block < blocks - 1 else 2
    expected = 2 * projected * 8 * 8 + 2 * updated * 8 * (8 + 3 * 16) + 4 * pairs * 8 + 2 * length * 8 * 11
    assert training_flops(config, length) == 3 * expected


def test_a_causal_history_in_z_costs_what_a_transformer_costs():
    """Over the sequence so far, but for block 0's `compress`, which counts once for all windows, and in the last layer
    z's queries, what they read and their update. Block 1's history is one layer more without queries."""
    config = dataclasses.replace(WIDE, causal_history=True, history_window=448, generation_window=64, num_blocks=2)
    layers = dataclasses.replace(config, causal_history=False, architecture="transformer")
    size, width, expected = 64, 256, 0.0
    for stop in range(size, 513, size):
        n = stop - size
        expected += training_flops(layers, stop, read=0) * (1 - 1 / layers.num_layers)
        expected -= 3 * (2 * n * width * (width + width + 3 * config.feed_forward_dim) + 4 * width * n * (n + 1) / 2)
    expected += training_flops(layers, 512, read=0) * 2 / layers.num_layers - 3 * 2 * 512 * width * width
    assert training_flops(config, 512, read=0) == pytest.approx(expected, rel=1e-12)


def test_sampled_windows_cost_their_share_of_the_windows_but_all_of_block_0s_projections():
    whole, sampled = (training_flops(WIDE, 512, sampled_windows=k) for k in (0, 2))
    projections = 3 * 2 * 512 * 256 * 3 * 256
    assert sampled == pytest.approx((whole - projections) / 4 + projections)


def test_sampled_windows_cost_all_of_a_causal_history():
    """Of three blocks, the histories of the second and the third; rows of 7 windows read 48 rows of z. More windows add
    as much each, on average."""
    config = dataclasses.replace(WIDE, causal_history=True)
    two, four, six = (training_flops(config, 512, sampled_windows=k) for k in (2, 4, 6))
    projections = 3 * 2 * 512 * 256 * (3 + 3 + 2) * 256
    pairs = 7 * 64 * 48 + 8 * 64 * 65 / 2
    history = 3 * (2 * 512 * 256 * (256 + 3 * 512) + 4 * pairs * 256)
    assert two - (four - two) == pytest.approx(projections + 2 * history)
    assert six - four == pytest.approx(four - two)


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
