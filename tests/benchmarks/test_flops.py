"""Hardware FLOPs against XLA's own count, and model FLOPs utilisation."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks import flops
from benchmarks.flops import hardware_flops, utilisation
from tlinformer_jax.analysis.flops import training_flops
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.models import ModelConfig, build_model, causal_history
from tlinformer_jax.models.history import History
from tlinformer_jax.models.model import prepare_params
from tlinformer_jax.models.rope import rope_table
from tlinformer_jax.training.loss import summed_losses_and_hits

PLAN = ExecutionPlan(segments=8, scan_layers=False)  # a segment for each window: nothing is masked
AGAIN = dataclasses.replace(PLAN, checkpointing=True)
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
    memory=PLAN,
)


@pytest.mark.parametrize(
    ("architecture", "length", "first", "fields"),
    [
        ("tlinformer", 128, 0, {}),
        ("tlinformer", 160, 0, {"history_window": 80, "hidden_depth": 0}),
        ("tlinformer", 192, 0, {"causal_history": True}),
        ("tlinformer", 150, 0, {"causal_history": True, "history_window": 80, "num_blocks": 3, "hidden_depth": 0}),
        ("tlinformer", 192, 130, {}),  # its first two windows are not run
        ("tconstformer", 128, 0, {"num_blocks": 1}),
        ("tlinformer", 64, 0, {}),  # one window
        ("transformer", 192, 0, {}),
        ("transformer", 192, 0, {"memory": AGAIN}),
        ("sliding_window", 192, 0, {}),
        ("gated_deltanet", 64, 0, {}),  # one chunk: of a loop XLA counts one round
        ("gated_deltanet_hybrid", 32, 0, {"memory": AGAIN}),
    ],
)
def test_hardware_flops_are_what_xla_counts(architecture, length, first, fields):
    """Within 1.5% of the cost analysis of an unrolled forward and backward pass, which counts what is elementwise: of
    Gated DeltaNet, with convolutions and decays, up to 2%."""
    config = dataclasses.replace(WIDE, architecture=architecture, **{"num_blocks": 2} | fields)
    model = build_model(config)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)

    def loss(params, tokens):
        hidden = model.apply({"params": params}, tokens, start=first, method=model.hidden_states)
        labels = tokens[:, first:]
        return summed_losses_and_hits(hidden, params["embedding"], labels, jnp.ones(labels.shape), 2 * length)[0]

    counted = jax.jit(jax.grad(loss)).lower(params, tokens).cost_analysis()["flops"]
    expected = hardware_flops(config, length, batch=2, read=length - first, first=first)
    assert expected == pytest.approx(counted, rel=0.02 if config.recurrent else 0.015)


@pytest.mark.parametrize(
    ("blocks", "history_window", "windows", "together"), [(2, 80, 3, 32), (4, 8, 3, 32), (3, 80, 7, 2), (3, 8, 8, 2)]
)
def test_later_histories_are_what_xla_counts(blocks, history_window, windows, together, monkeypatch):
    """With `causal_history`, to 1.5%. With two windows together the last six run in a loop of three groups, unrolled
    here since XLA counts one round; of 8 windows the second runs before the loop."""
    for module in (causal_history, flops):
        monkeypatch.setattr(module, "WINDOWS_TOGETHER", together)

    def unrolled(start, stop, body, state):
        for number in range(3):
            state = body(number, state)
        return state

    monkeypatch.setattr(jax.lax, "fori_loop", unrolled)
    config = dataclasses.replace(WIDE, causal_history=True, num_blocks=blocks, history_window=history_window)
    model, rows = build_model(config), windows * 64
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    heads = jax.ShapeDtypeStruct((2, rows, 2, 128), jnp.float32)

    def summed(params, arrays):
        blocks = prepare_params(model.apply({"params": params}, method=model.parameters), config).blocks
        C = causal_history.with_later(blocks, config, History(*arrays), rope_table(jnp.arange(rows), 128))
        return sum(jnp.sum(array**2) for each in C.later for array in (each.K, each.V))

    arrays = jax.ShapeDtypeStruct((2, rows, 256), jnp.float32), heads, heads, heads
    counted = jax.jit(jax.grad(summed, (0, 1))).lower(params, arrays).cost_analysis()["flops"]
    once, again = flops.executed_histories(config, rows, 256, False)
    assert 2 * (3 * once.total + again.total) == pytest.approx(counted, rel=0.015)
    assert (again.total > 0) == (together == 2)


def test_histories_of_later_blocks_are_executed_for_all_windows(monkeypatch):
    """Also if some of eight are sampled, and in a loop for the backward pass, too."""
    monkeypatch.setattr(flops, "WINDOWS_TOGETHER", 2)
    config = dataclasses.replace(WIDE, causal_history=True)
    whole, two, four = (hardware_flops(config, 512, sampled_windows=k) for k in (0, 2, 4))
    once, again = flops.executed_histories(config, 512, 256, False)
    outside = 3 * 2 * 512 * 256 * 3 * 256 + 3 * once.total + again.total
    assert two - (four - two) == pytest.approx(outside)
    in_chunks = dataclasses.replace(config, memory=dataclasses.replace(PLAN, chunk=64))
    assert hardware_flops(in_chunks, 512) == whole, "no history is restored"
    # A fused kernel computes the pairs that are read: z has 64 rows in the second window, then 80.
    fused = flops.executed_histories(dataclasses.replace(config, history_window=80), 448, 256, True).once
    assert fused.attention == 2 * 4 * (64 * (64 + 5 * 80) + 7 * 64 * 65 / 2) * 256


def test_masked_history_padding_and_checkpointing_are_hardware_flops_only():
    whole, one_segment = (
        hardware_flops(WIDE, 512),
        dataclasses.replace(WIDE, memory=dataclasses.replace(PLAN, segments=1)),
    )
    assert training_flops(one_segment, 512) == training_flops(WIDE, 512)
    assert hardware_flops(one_segment, 512) > 1.2 * whole
    assert hardware_flops(dataclasses.replace(WIDE, memory=AGAIN), 512) == whole, "nothing is computed twice"
    in_chunks = dataclasses.replace(WIDE, memory=dataclasses.replace(PLAN, chunk=64))
    chunked = hardware_flops(in_chunks, 512)
    assert training_flops(in_chunks, 512) == training_flops(WIDE, 512)
    assert 1.1 * whole < chunked < 1.34 * whole
    grouped = hardware_flops(
        dataclasses.replace(WIDE, memory=dataclasses.replace(PLAN, segments=1, together=7, chunk=64)), 512
    )
    assert grouped > 1.1 * chunked, "a group restores its longest history"
    paired = hardware_flops(dataclasses.replace(WIDE, memory=dataclasses.replace(AGAIN, paired=True)), 512)
    assert whole < paired < hardware_flops(dataclasses.replace(WIDE, memory=dataclasses.replace(PLAN, segments=2)), 512)
    baseline = dataclasses.replace(WIDE, architecture="transformer")
    again = hardware_flops(dataclasses.replace(baseline, memory=AGAIN), 512)
    assert 1.2 < again / hardware_flops(baseline, 512) < 1.34
    padded = dataclasses.replace(WIDE, attention="cudnn", dtype="bfloat16", num_heads=64)  # of 4 features, padded to 8
    assert hardware_flops(padded, 512) > 1.2 * hardware_flops(dataclasses.replace(padded, num_heads=32), 512)
    assert hardware_flops(WIDE, 509) > training_flops(WIDE, 509)


def test_the_dropout_kernel_computes_two_products_more_than_cudnn(monkeypatch):
    """Scores and the weights' gradients once more: as much as a forward pass over the causal pairs."""
    config = ModelConfig(architecture="transformer", dtype="bfloat16")
    monkeypatch.setattr(flops, "fused_kernel", lambda dtype: True)
    monkeypatch.setattr(flops.dropout_kernel, "use_kernel", lambda dtype, width: True)
    without, dropped = (hardware_flops(dataclasses.replace(config, dropout=rate), 512) for rate in (0.0, 0.1))
    assert dropped - without == pytest.approx(config.num_layers * 4 * (512 * 513 / 2) * config.d_model)
    assert hardware_flops(dataclasses.replace(config, attention="deterministic"), 512) == dropped


def test_utilisation_is_a_share_of_the_peaks_of_all_devices():
    assert utilisation(2 * 989e12, 8, "NVIDIA H200", "bfloat16") == 0.25
