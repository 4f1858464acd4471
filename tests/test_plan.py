"""How a sequence is executed, resolved from `model.memory` before anything is compiled."""

import dataclasses
import json
import math

import jax
import pytest

from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.config.run import run_config
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.kernels.dropout import use_kernel
from tlinformer_jax.models.windows import PairedSegment, plan_segments, training_plan
from tlinformer_jax.parallel.mesh import target
from tlinformer_jax.parallel.sharding import build_mesh

GPU, TPU, CPU = ("gpu", "NVIDIA H100 80GB HBM3"), ("tpu", "TPU v5 lite"), ("cpu", "cpu")
LONG = ModelConfig(history_window=1024, generation_window=1024, memory="low")


@pytest.mark.parametrize(
    "field", [{"segments": 0}, {"together": 0}, {"chunk": -1}, {"together": 1.5}, {"paired": "yes"}, {"scan_layers": 1}]
)
def test_a_plan_that_cannot_run_is_refused(field):
    with pytest.raises(ConfigError, match=f"^model.memory.{next(iter(field))} = "):
        ExecutionPlan(**field)
    with pytest.raises(ConfigError, match=f"^model.memory.{next(iter(field))} = "):
        ModelConfig(memory=field)


def test_a_configuration_with_a_plan_survives_json():
    """As config.json and the jobs of a sweep hold it."""
    config = run_config({"model": {"memory": ExecutionPlan(2, together=3, checkpointing=True)}})
    assert run_config(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigError, match=r"^model.memory = {'chunks': 2}: must be one of auto, low, or hold fields"):
        ModelConfig(memory={"chunks": 2})


@pytest.mark.parametrize(
    ("machine", "length", "plan"),
    [
        (GPU, 512, ExecutionPlan(1, together=2, scan_layers=False)),
        (GPU, 1024, ExecutionPlan(1, together=4, scan_layers=False)),
        (GPU, 2048, ExecutionPlan(2, together=3, scan_layers=False, checkpointing=True)),
        (GPU, 8192, ExecutionPlan(2, scan_layers=False, checkpointing=True, paired=True)),
        (TPU, 8192, ExecutionPlan(2, scan_layers=False, checkpointing=True)),
        (CPU, 2048, ExecutionPlan(2)),
        (CPU, 8192, ExecutionPlan(2, checkpointing=True)),
    ],
)
def test_the_41m_shape_runs_as_it_was_measured(machine, length, plan):
    """By docs/performance.md: short sequences at once, up to 8 windows in threes, more of them in pairs."""
    with target(*machine):
        assert ModelConfig().plan(length // 256) == plan


def test_low_memory_is_what_a_million_tokens_were_measured_with():
    with target(*GPU):
        assert LONG.plan(1024) == ExecutionPlan(8, scan_layers=False, checkpointing=True)
        assert LONG.plan(2048).chunk > 0
        assert ModelConfig(memory="low").plan(2) == ExecutionPlan(1, scan_layers=False, checkpointing=True)
        assert ModelConfig(architecture="transformer", memory="low").plan().checkpointing
        assert not ModelConfig(architecture="transformer").plan(64).checkpointing
        assert not ModelConfig(architecture="transformer").plan(8).checkpointing


def test_deep_models_compile_one_layer():
    with target(*TPU):
        deep = ModelConfig(num_blocks=6)
        assert deep.plan(16) == ExecutionPlan(1, scan_layers=True, checkpointing=True)


@pytest.mark.parametrize(("width", "group"), [(96, 3), (432, 3), (512, 3), (528, 2), (768, 2), (1024, 2)])
def test_few_windows_run_in_groups(width, group):
    """In threes, or in twos in a wide model. Each group's gradients are computed with its loss, so that the activations
    of one group are kept at most."""
    model, grouped = (
        ModelConfig(d_model=width, num_heads=8),
        ExecutionPlan(2, group, scan_layers=False, checkpointing=True),
    )
    with target(*GPU):
        assert model.plan(8) == model.plan(5) == grouped
        assert model.plan(4) == ExecutionPlan(1, together=4, scan_layers=False), "1,024 tokens are short"
        assert dataclasses.replace(model, generation_window=1024).plan(2).together == 1, "the first has no history"
        assert dataclasses.replace(model, generation_window=2048).plan(1) == ExecutionPlan(2, scan_layers=False)
        assert model.plan(16) == ExecutionPlan(2, scan_layers=False, checkpointing=True, paired=True)
        assert not dataclasses.replace(model, architecture="transformer").plan(8).checkpointing
    with target(*TPU):
        assert model.plan(8) == grouped
    with target(*CPU):
        assert model.plan(8) == ExecutionPlan(2)


def test_windows_with_a_causal_history_run_together():
    """All up to 32 if they share keys without copies; then they store their activations, as a Transformer does."""
    model = ModelConfig(causal_history=True)
    together = ExecutionPlan(2, 8, scan_layers=False, checkpointing=True)
    with target(*GPU):
        for windows in (5, 8, 32):
            assert model.plan(windows) == ExecutionPlan(1, windows - 1, scan_layers=False)
        assert model.plan(33) == dataclasses.replace(together, together=32)
        assert model.plan(32, alone=True).one_at_a_time == together.one_at_a_time, "sampled windows"
        assert model.plan(4) == ExecutionPlan(1, 4, scan_layers=False), "1,024 tokens are short"
        low = dataclasses.replace(model, memory="low").plan(32)
        assert low == dataclasses.replace(together, segments=8, together=1)
        for changes in ({"dtype": "float32"}, {"attention": "xla"}):  # keys are copied for each window
            assert dataclasses.replace(model, **changes).plan(32) == together
        assert training_plan(model, 8192) == model.plan(32)
        assert training_plan(model, 8192, packed=True) == together, "the kernel masks no documents"
    with target(*TPU):
        assert model.plan(32) == together
    with target(*CPU):
        assert model.plan(32) == ExecutionPlan(2, checkpointing=True)


@pytest.mark.parametrize("width", [126, 128, 130])
@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 2}, {"fsdp": 2}])
def test_windows_share_keys_where_the_kernel_runs(width, axes):
    """Not in wide heads, nor if the compiler partitions the program: plain attention would store all scores of all
    windows, 339 instead of 19 GiB (41M, eight samples of 8,192 tokens)."""
    pytest.importorskip("jax.experimental.pallas.triton")
    model = ModelConfig(causal_history=True, d_model=2 * width, num_heads=2)
    mesh = build_mesh(axes, jax.devices()[: math.prod(axes.values())])
    with target(*GPU), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shares = use_kernel(model.compute_dtype, width)
        assert shares == (width <= 128 and axes == {"data": 1})
        assert model.plan(32).together == (31 if shares else 8)
        assert model.plan(32).checkpointing != shares


@pytest.mark.parametrize(
    "changes", [{"window_overlap": 1}, {"history_window": 257}, {"history_window": "auto"}, {"num_blocks": 3}]
)
def test_what_does_not_run_in_pairs(changes):
    config, pairs = ModelConfig(generation_window=256, **changes), ExecutionPlan(2, paired=True)
    segments = plan_segments(config, 9, pairs)
    assert isinstance(segments[0], PairedSegment) == (changes == {"num_blocks": 3})
    for other in (plan_segments(config, 9, pairs, first=2), plan_segments(config, 9, pairs.one_at_a_time)):
        assert not any(isinstance(segment, PairedSegment) for segment in other)
    alone = ExecutionPlan(2, scan_layers=False, checkpointing=True)
    with target(*GPU):
        assert config.plan(9) == dataclasses.replace(alone, paired=changes == {"num_blocks": 3})
        assert config.plan(9).one_at_a_time == alone, "sampled windows, and those of several devices"
        assert not dataclasses.replace(config, memory="low").plan(9).paired
        assert not dataclasses.replace(config, num_blocks=6).plan(9).paired, "not measured with scanned layers"


def test_a_plan_that_is_given_is_taken_as_it_is():
    plan = ExecutionPlan(segments=3, together=2, chunk=5)
    assert dataclasses.replace(LONG, memory=plan).plan(7) == plan
    assert (
        str(plan) == "3 segments of windows, 2 at a time, history in chunks of 5 rows, layers scanned, no checkpointing"
    )
