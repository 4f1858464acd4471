"""Optimiser, train step and the loop, on one and on eight simulated devices."""

import dataclasses
import functools
import json
import math
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support import golden
from tests.support.commands import TEXT_FILE
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.model import ARCHITECTURES, RECURRENT
from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.tokenizers import ByteTokenizer
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.interop import params_from_reference
from tlinformer_jax.models import ModelConfig, build_model
from tlinformer_jax.parallel.mesh import axes_of
from tlinformer_jax.parallel.sharding import (
    UNSPLIT,
    batch_sharding,
    build_mesh,
    parameter_spec,
    put_batch,
    tree_shardings,
)
from tlinformer_jax.training.callbacks import Trace
from tlinformer_jax.training.check import check_run
from tlinformer_jax.training.checkpoint import restore_params
from tlinformer_jax.training.loop import train_and_evaluate
from tlinformer_jax.training.metrics import Throughput
from tlinformer_jax.training.optimizer import Horizon, decay_mask, learning_rate_schedule
from tlinformer_jax.training.setup import build_run
from tlinformer_jax.training.step import TrainState, batch_gradient, init_state, jit_train_step, train_step

MODEL = ModelConfig(
    vocab_size=257,
    d_model=16,
    num_heads=2,
    num_blocks=2,
    hidden_depth=0,
    d_ff=32,
    history_window=4,
    generation_window=4,
    dtype="float32",
)
TRAIN = TrainConfig(
    steps=4, batch_size=8, learning_rate=1e-2, warmup_steps=1, log_every=1, eval_every=2, checkpoint_every=2
)

HORIZON = Horizon(steps=4, decay_end=4)


def golden_state(config: TrainConfig = TRAIN) -> TrainState:
    """A state whose weights are of golden scale."""
    state = init_state(jax.random.key(0), build_model(MODEL), config, HORIZON)
    return state.replace(params=params_from_reference(golden.random_weights(MODEL), MODEL)["params"])


def random_batch(length: int = 14, rows: int = 8) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(5).integers(0, 257, (rows, length + 1)).astype(np.int32)
    weights = np.ones((rows, length), np.float32)
    weights[1, 3:] = 0
    return {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": weights}


@pytest.mark.parametrize(
    ("architecture", "checkpointing"),
    [
        ("transformer", False),
        pytest.param("tlinformer", True, marks=pytest.mark.slow),
    ],
)
def test_a_step_with_z_loss_has_the_gradient_of_the_models_logits(architecture, checkpointing):
    """By the whole sequence and window after window; the loss of the step stays the cross-entropy."""
    shape = dataclasses.replace(MODEL, architecture=architecture, memory=ExecutionPlan(checkpointing=checkpointing))
    model, batch = build_model(shape), random_batch()
    params = model.init(jax.random.key(0), batch["inputs"])["params"]
    params = {**params, "embedding": 30 * params["embedding"]}
    divisor = batch["weights"].sum()

    def plain(params, z_loss):
        logits = model.apply({"params": params}, batch["inputs"])
        norm = jax.nn.logsumexp(logits, axis=-1)
        losses = norm - jnp.take_along_axis(logits, batch["labels"][..., None], -1)[..., 0]
        return ((losses + z_loss * norm**2) * batch["weights"]).sum() / divisor

    config = dataclasses.replace(TRAIN, z_loss=0.1)
    ours = jax.jit(functools.partial(batch_gradient, model=model, config=config, split=UNSPLIT))
    loss, _, grads = ours(batch, params, divisor, jnp.int32(0))
    assert float(loss) == pytest.approx(float(jax.jit(plain)(params, 0.0)), rel=1e-5)
    true_grads = jax.jit(jax.grad(plain))(params, 0.1)
    for value, truth in zip(jax.tree.leaves(grads), jax.tree.leaves(true_grads), strict=True):
        np.testing.assert_allclose(value, truth, atol=1e-5 * max(1.0, float(jnp.abs(truth).max())), rtol=1e-4)


@pytest.mark.slow
def test_accumulation_changes_nothing():
    model, batch = build_model(MODEL), random_batch()
    whole = dataclasses.replace(TRAIN, warmup_steps=0)
    one, figures = jax.jit(lambda s, b: train_step(s, b, model=model, config=whole, horizon=HORIZON))(
        golden_state(whole), batch
    )
    config = dataclasses.replace(whole, accumulation=4)
    many, again = jax.jit(lambda s, b: train_step(s, b, model=model, config=config, horizon=HORIZON))(
        golden_state(), batch
    )
    for value, truth in zip(jax.tree.leaves(many.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(value, truth, atol=2e-4)
    assert abs(float(figures["loss"] - again["loss"])) < 1e-5
    np.testing.assert_allclose(figures["grad_norm"], again["grad_norm"], rtol=1e-4)
    assert float(jnp.abs(one.params["embedding"] - golden_state().params["embedding"]).max()) > 1e-3


def after_one_update(mesh, optimizer="adamw") -> tuple[TrainState, dict[str, jax.Array], TrainState]:
    """The package's own step over a mesh: the new state, the metrics, and the old state as it was handed over."""
    config = dataclasses.replace(TRAIN, warmup_steps=0, optimizer=optimizer)
    state = golden_state(config)
    shardings = tree_shardings(state, mesh)
    step = jit_train_step(shardings, batch_sharding(mesh), model=build_model(MODEL), config=config, horizon=HORIZON)
    with jax.set_mesh(mesh):
        state = jax.device_put(state, shardings)
        new, metrics = step(state, put_batch(random_batch(), mesh))
    return new, metrics, state


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "optimizer"), [({}, "adamw"), ({"fsdp": 2, "tensor": 2}, "muon")])
def test_eight_devices_equal_one(sizes, optimizer):
    """Loss within 1e-5, gradients (by the first moments) within 1e-4; every device holds its part of each array."""
    many, metrics, old = after_one_update(build_mesh(sizes), optimizer)
    one, true_metrics, _ = after_one_update(build_mesh({}, jax.devices()[:1]), optimizer)
    assert int(many.step) == int(one.step) == 1
    assert float(metrics["tokens"]) == float(true_metrics["tokens"]) == 8 * 14 - 11
    assert abs(float(metrics["loss"]) - float(true_metrics["loss"])) < 1e-5
    assert float(metrics["grad_norm"]) == pytest.approx(float(true_metrics["grad_norm"]), rel=1e-5)
    for value, truth in zip(jax.tree.leaves(many.opt_state), jax.tree.leaves(one.opt_state), strict=True):
        value, truth = np.asarray(value), np.asarray(truth)
        assert np.linalg.norm(value - truth) <= 1e-4 * np.linalg.norm(truth)
    for value, truth in zip(jax.tree.leaves(many.params), jax.tree.leaves(one.params), strict=True):
        np.testing.assert_allclose(value, truth, atol=2e-4)
    kernels = [many.params["blocks_0"]["compress"]["down_kernel"]]
    kernels += [leaf for leaf in jax.tree.leaves(many.opt_state) if leaf.shape == kernels[0].shape]
    assert len(kernels) > 1
    for kernel in kernels:
        assert kernel.addressable_shards[0].data.size == kernel.size // math.prod(sizes.values())
    assert float(jnp.abs(many.params["embedding"] - golden_state().params["embedding"]).max()) > 1e-3
    assert old.params["embedding"].is_deleted()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_has_a_sharding_rule(architecture):
    """Matrices are split over both axes, the embedding over its width, vectors over 'tensor' or not at all."""
    mesh = build_mesh({"fsdp": 2, "tensor": 2})
    shift = architecture not in RECURRENT
    model = build_model(dataclasses.replace(MODEL, architecture=architecture, hidden_depth=1, token_shift=shift))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"]
    shardings = jax.tree.leaves(tree_shardings(params, mesh))
    places = jax.tree_util.tree_leaves_with_path(params)
    delta = {"gated_deltanet": 6, "gated_deltanet_hybrid": 5}.get(architecture, 0)
    assert len(places) == 3 + shift + 6 * 10 + 4 * delta  # the embedding, its shift, the last norm, six layers
    for (path, leaf), sharding in zip(places, shardings, strict=True):
        name = path[-1].key
        known = {"embedding": 2, "qkv_bias": 2, "conv_kernel": 2, "A_log": 2, "dt_bias": 2}
        parts = known.get(name, 4 if name.endswith("kernel") else 1)
        shard = sharding.shard_shape(leaf.shape)
        assert math.prod(leaf.shape) == parts * math.prod(shard), f"{path}: {leaf.shape} on a device {shard}"


def test_what_cannot_be_sharded_is_named():
    mesh = build_mesh({"fsdp": 8})
    with pytest.raises(ValueError, match="no rule matches"):
        parameter_spec("a/unheard_of", (8, 8), mesh)
    for sizes, mesh, product in (
        ({"fsdp": 3}, "fsdp=3", 3),
        ({"fsdp": 16}, "fsdp=16", 16),
        ({"tensor": 4, "context": 4}, "tensor=4,context=4", 16),
    ):
        with pytest.raises(ValueError, match=r"^train\.mesh") as caught:
            build_mesh(sizes)
        assert str(caught.value) == (
            f"train.mesh = {mesh!r}: the product of its sizes must divide the number of devices; "
            f"it is {product}, and there are 8 devices (cpu)"
        )


@pytest.mark.parametrize(
    ("mesh", "changes", "says"),
    [
        ("fsdp=8", {"d_model": 12}, "fsdp must divide model.d_model = 12"),
        ("tensor=4", {}, "tensor must divide model.num_heads = 2"),
        ("tensor=2", {"d_ff": 27}, "tensor must divide 27, the features of a feed-forward, which model.d_ff sets"),
        ("expert=2", {"num_experts": 3}, "expert must divide model.num_experts = 3"),
        (
            "tensor=2",
            {"architecture": "gated_deltanet", "d_model": 192, "d_ff": 512},
            "tensor must divide 3, the heads of a Gated DeltaNet layer, which model.d_model sets",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_model_is_told_with_the_field(mesh, changes, says):
    model = build_model(dataclasses.replace(MODEL, **changes))
    shapes = jax.eval_shape(lambda key: init_state(key, model, TRAIN, HORIZON), jax.random.key(0))
    with pytest.raises(ConfigError) as caught:
        tree_shardings(shapes, build_mesh(axes_of(mesh)))
    assert str(caught.value) == f"train.mesh = {mesh!r}: {says}"


def test_schedule_warms_up_and_ends_where_it_should():
    schedule = learning_rate_schedule(
        dataclasses.replace(TRAIN, warmup_steps=10, schedule="cosine:0.1"), Horizon(110, 110)
    )
    # Updates 1, 5, 10, 60 and 110, the last.
    rates = [float(schedule(step - 1)) for step in (1, 5, 10, 60, 110)]
    np.testing.assert_allclose(rates, [1e-3, 5e-3, 1e-2, 5.5e-3, 1e-3], rtol=1e-5)


@pytest.mark.parametrize("warmup", [10, 0, 95])
def test_a_wsd_schedule_is_constant_until_its_last_share(warmup):
    """1 - sqrt over the last 20 of 100 updates, or over those that the warm-up leaves."""
    schedule = learning_rate_schedule(
        dataclasses.replace(TRAIN, warmup_steps=warmup, schedule="wsd:0.2"), Horizon(100, 100)
    )
    updates = np.arange(1, 101)
    decay = min(20, 100 - warmup)
    falling = 1 - np.sqrt(np.maximum(updates - (100 - decay), 0) / decay)
    expected = 1e-2 * np.minimum(updates / max(warmup, 1), falling)
    np.testing.assert_allclose([float(schedule(update - 1)) for update in updates], expected, atol=1e-8)


def test_a_warm_up_longer_than_the_run_is_said(tmp_path):
    config = run_config(train={"warmup_steps": 16})
    assert "16 is more than the run's 4 updates: the learning rate rises to 25% of" in check_run(config)
    assert "warmup_steps" not in check_run(run_config(train={"warmup_steps": 4}))


def test_decay_spares_vectors_but_for_the_papers_schedule():
    params = golden_state().params
    everything = decay_mask(dataclasses.replace(TRAIN, schedule="paper", steps="1epoch"), params)
    matrices = decay_mask(TRAIN, params)
    assert all(jax.tree.leaves(everything))
    layer = matrices["blocks_0"]["restore"]
    assert layer["qkv_kernel"]
    assert matrices["embedding"]
    assert not layer["qkv_bias"]
    assert not layer["norm1_scale"]


def run_config(**changes) -> RunConfig:
    return RunConfig(
        model=dataclasses.replace(MODEL, **changes.pop("model", {})),
        train=dataclasses.replace(TRAIN, **changes.pop("train", {})),
        data=DataConfig(
            dataset="text",
            tokenizer="bytes",
            sequence_length=16,
            train_files=str(TEXT_FILE),
            validation_files=str(TEXT_FILE),
        ),
    )


def test_a_run_leaves_a_complete_workdir_and_continues_exactly(tmp_path, capsys):
    """Stopping after two steps and going on, with checkpoints by the clock, gives the same parameters."""
    config = run_config(model={"num_blocks": 1, "dropout": 0.1})
    whole = train_and_evaluate(config, tmp_path / "whole")
    assert 0 < whole["loss"] < 10
    assert math.isclose(whole["perplexity"], math.exp(whole["loss"]), rel_tol=1e-6)

    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "eval/loss" in line] == [2, 4]
    rates = [line["train/learning_rate"] for line in lines if "train/loss" in line]
    assert (rates[0], rates[-1]) == pytest.approx((1e-2, 1e-3))
    assert {"train/grad_norm", "train/learning_rate", "train/tokens_per_second", "train/tflops"} <= set(lines[-2])
    assert list((tmp_path / "whole" / "tensorboard").iterdir())
    written = json.loads((tmp_path / "whole" / "config.json").read_text())
    # The mesh as asked for: a run may go on with other devices.
    assert written["train"]["mesh"] == ""

    # The same files that the run left after step 2.
    part = tmp_path / "part"
    (part / "checkpoints").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (part / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    (tmp_path / "whole" / "checkpoints" / "2").rename(part / "checkpoints" / "2")
    capsys.readouterr()
    train_and_evaluate(dataclasses.replace(config, train=dataclasses.replace(TRAIN, checkpoint_every="0.001s")), part)
    assert "checkpoints: every 0.001s, at the end\n" in capsys.readouterr().err
    assert {path.name for path in (part / "checkpoints").iterdir()} == {"3", "4"}
    run = build_run(config, ByteTokenizer())
    step, params = restore_params(tmp_path / "whole", run.abstract_state.params)
    again_step, again = restore_params(part, run.abstract_state.params)
    assert step == again_step == 4
    jax.tree.map(np.testing.assert_array_equal, params, again)


def test_vocabulary_and_batch_are_checked_against_tokenizer_and_devices(tmp_path):
    with pytest.raises(ValueError, match=r"model\.vocab_size = 200: must be at least 257"):
        train_and_evaluate(run_config(model={"vocab_size": 200}), tmp_path / "a")
    with pytest.raises(ValueError, match=r"must be divisible by 8"):
        train_and_evaluate(run_config(train={"batch_size": 12}), tmp_path / "b")
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_throughput_reports_model_flops_and_their_share_of_the_peak():
    throughput = Throughput(total_steps=10, flops_per_token=3e9, peak_flops=1e15)
    throughput.count(1000)
    figures = throughput.report(step=1)
    assert figures["tflops"] == pytest.approx(figures["tokens_per_second"] * 3e-3)
    assert figures["mfu"] == pytest.approx(figures["tflops"] / 1e3)
    assert figures["save_wait"] == 0
    with throughput.spent_on("save"):
        time.sleep(0.02)
    assert 0.5 < throughput.report(step=2)["save_wait"] <= 1
    assert "mfu" not in Throughput(10, 3e9, None).report(step=1)


@pytest.mark.parametrize(
    ("first", "last", "traced"),
    [(0, 100, [12, 13, 14]), (50, 100, [62, 63, 64]), (0, 4, [2, 3, 4]), (0, 2, [2]), (0, 1, [])],
)
def test_the_traced_steps_are_never_the_first_and_always_within_the_run(first, last, traced, monkeypatch, tmp_path):
    events = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: events.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: events.append("stop"))
    throughput = Throughput(last)
    trace = Trace(tmp_path, first, last, throughput)
    for step in range(first + 1, last + 1):
        events.append(step)
        if trace.is_due(step):
            trace(SimpleNamespace(step=step, outputs=()))
            assert events[-1] in ("start", "stop")
    inside = events[events.index("start") + 1 : events.index("stop")] if "start" in events else []
    assert inside == traced
    assert events.count("start") == events.count("stop")
