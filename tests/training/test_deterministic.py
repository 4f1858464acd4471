"""Deterministic runs: attention without cuDNN, decided in one place and stored in config.json."""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from tests.support.commands import TEXT_FILE
from tlinformer_jax.config.run import RunConfig, load_config, run_config
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.kernels import common
from tlinformer_jax.models.attention import choose_backend
from tlinformer_jax.models.layers import Dropout
from tlinformer_jax.models.model import build_model
from tlinformer_jax.parallel.mesh import target
from tlinformer_jax.parallel.sharding import build_mesh
from tlinformer_jax.training.console import attention_backend
from tlinformer_jax.training.loop import train_and_evaluate
from tlinformer_jax.training.optimizer import Horizon
from tlinformer_jax.training.step import init_state, train_step

H100 = "NVIDIA H100 80GB HBM3"
HALF = jnp.zeros((1, 8, 2, 36), jnp.bfloat16)
MODEL = {"vocab_size": 257, "d_model": 72, "num_heads": 2, "num_blocks": 1, "hidden_depth": 1, "d_ff": 64}
MODEL |= {"history_window": 16, "generation_window": 32}


def config_of(deterministic: bool = True, *, model: Any = None, data: Any = None) -> RunConfig:
    train = {"batch_size": 2, "deterministic": deterministic}
    data = {"sequence_length": 96} if data is None else data
    return run_config({"model": MODEL if model is None else MODEL | model, "train": train, "data": data})


@pytest.fixture
def triton(monkeypatch):
    """Pallas's Triton back end, for which this machine would have to have a GPU."""
    monkeypatch.setattr(common, "available", lambda name: True)


# ---- The decision


@pytest.mark.parametrize(
    ("deterministic", "given", "resolved"),
    [(False, "auto", "auto"), (True, "auto", "deterministic"), (True, "xla", "xla"), (False, "cudnn", "cudnn")],
)
def test_auto_becomes_attention_without_cudnn(deterministic, given, resolved):
    config = config_of(deterministic, model={"attention": given})
    assert config.model.attention == resolved
    assert run_config(config.to_dict()) == config


def test_cudnn_is_refused():
    with pytest.raises(ConfigError, match=r"train.deterministic = True: must be False for model.attention = 'cudnn'"):
        config_of(model={"attention": "cudnn"})


def test_back_ends_in_half_precision_on_an_nvidia_gpu(triton):
    dropout = Dropout.by_key(jax.random.key(0), 0.1)
    choose = functools.partial(choose_backend, backend="deterministic")
    with target("gpu", H100):
        assert choose(HALF, None, False) == choose(HALF, dropout, False) == "triton"
        assert choose(HALF, None, True) == "triton"
        assert choose(HALF, None, False, documents=True) == "xla"
        assert choose(jnp.zeros((1, 8, 1, 136), jnp.bfloat16), None, False) == "xla", "too wide for the kernel"
        with jax.set_mesh(jax.make_mesh((2,), ("fsdp",))):
            assert choose(HALF, None, False) == "xla", "XLA partitions the program"


@pytest.mark.parametrize(
    ("device", "backend"),
    [(("cpu", "cpu"), "xla"), (("gpu", "AMD Instinct MI300X"), "xla"), (("tpu", "v5e"), "splash")],
)
def test_elsewhere_it_is_auto(device, backend):
    with target(*device):
        for asked in ("auto", "deterministic"):
            assert choose_backend(HALF, None, False, backend=asked) == backend


def test_the_line_that_a_run_prints_names_the_back_end(triton):
    masked = {"dataset": "text", "tokenizer": "bytes", "sequence_length": 96, "document_masking": True}
    masked |= {f"{split}_files": str(TEXT_FILE) for split in ("train", "validation")}
    with target("gpu", H100):
        assert attention_backend(config_of(False)) == "cudnn"
        assert attention_backend(config_of()) == attention_backend(config_of(model={"dropout": 0.1})) == "triton"
        assert attention_backend(config_of(data=masked)) == "xla"


def test_a_run_prints_and_stores_it_and_is_what_it_was(tmp_path, capsys):
    """On the CPU, where every run is deterministic."""
    data = {"dataset": "text", "tokenizer": "bytes", "sequence_length": 32}
    data |= {f"{split}_files": str(TEXT_FILE) for split in ("train", "validation")}
    small = MODEL | {"d_model": 16, "hidden_depth": 0, "dtype": "float32"}
    losses, printed = [], []
    for deterministic in (True, False):
        train = {"batch_size": 8, "steps": 2, "warmup_steps": 1, "log_every": 1, "deterministic": deterministic}
        losses.append(train_and_evaluate({"model": small, "train": train, "data": data}, tmp_path / str(deterministic)))
        printed.append(capsys.readouterr().err)
    assert "model.attention = 'deterministic', here by 'xla'" in printed[0]
    assert "train.deterministic" not in printed[1]
    assert json.loads((tmp_path / "True" / "config.json").read_text())["model"]["attention"] == "deterministic"
    assert load_config(tmp_path / "True").model.attention == "deterministic"
    assert losses[0] == losses[1]


# ---- The step for a GPU


def step_for_a_gpu(config: RunConfig) -> str:
    """StableHLO of the training step for one H100."""
    train, model, horizon = config.train, build_model(config.model), Horizon(3, 3)
    axes = build_mesh({}, jax.devices()[:1])
    device = jax.sharding.AbstractDevice(device_kind=H100, num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh(
        axes.axis_sizes, axes.axis_names, axis_types=axes.axis_types, abstract_device=device
    )
    batch = {name: jax.ShapeDtypeStruct((2, 96), jnp.int32) for name in ("inputs", "labels")}
    batch["weights"] = jax.ShapeDtypeStruct((2, 96), jnp.float32)
    with target("gpu", H100), jax.sharding.use_abstract_mesh(mesh):
        state = jax.eval_shape(lambda key: init_state(key, model, train, horizon), jax.random.key(0))
        step = jax.jit(functools.partial(train_step, model=model, config=train, horizon=horizon))
        return step.trace(state, batch).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("architecture", ["tlinformer", "transformer"])
def test_only_the_usual_step_calls_cudnn(architecture, monkeypatch):
    """It has several equal backward calls, of which XLA marks one; see `training.step.DETERMINISTIC`."""
    pytest.importorskip("jax.experimental.pallas.triton")
    pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91300)
    usual, safe = (step_for_a_gpu(config_of(on, model={"architecture": architecture})) for on in (False, True))
    assert usual.count("custom_call @__cudnn$fmhaSoftmaxBackward") > 1
    assert "dropout_attention" not in usual
    assert "__cudnn" not in safe
    for kernel in ("dropout_attention", "dropout_attention_query_gradient", "dropout_attention_key_gradient"):
        assert f'"{kernel}"' in safe
    dropped = step_for_a_gpu(config_of(model={"architecture": architecture, "dropout": 0.1}))
    assert "__cudnn" not in dropped


def test_the_step_in_single_precision_has_neither():
    text = step_for_a_gpu(config_of(model={"dtype": "float32", "architecture": "transformer"}))
    assert "__cudnn" not in text
    assert "dropout_attention" not in text


def test_a_copy_without_the_option_keeps_the_attention():
    """`dataclasses.replace` builds a configuration from resolved sections."""
    config = config_of()
    copy = dataclasses.replace(config, train=dataclasses.replace(config.train, deterministic=False))
    assert copy.model.attention == "deterministic"
