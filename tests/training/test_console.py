"""What a first run tells its user."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from clu.parameter_overview import count_parameters

from tests.support.commands import ROOT, command_line, run_line
from tests.training.test_resume import run_config
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.model import ARCHITECTURES, ModelConfig
from tlinformer_jax.config.run import run_config as configuration
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.tokenizers import build_tokenizer
from tlinformer_jax.models.model import build_model
from tlinformer_jax.parallel.mesh import target
from tlinformer_jax.training.checkpoint import load_params
from tlinformer_jax.training.console import goal_line, parameter_table, plan_line, stage_text
from tlinformer_jax.training.loop import train_and_evaluate
from tlinformer_jax.training.setup import build_run


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("shape", [{"num_blocks": 6, "hidden_depth": 4}, {"hidden_depth": 0}])
def test_the_table_of_parameters_is_short_and_complete(architecture, shape):
    model = build_model(ModelConfig(architecture=architecture, history_window=8, **shape))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    lines = parameter_table(params).splitlines()
    assert len(lines) <= 15
    numbers = [int(re.search(r"([\d,]+) +\d+%$", line)[1].replace(",", "")) for line in lines[1:]]
    assert sum(numbers[:-1]) == numbers[-1] == count_parameters(params)
    arrays = [int(re.search(r"(\d+) +[\d,]+ +\d+%$", line)[1]) for line in lines[1:-1]]
    assert sum(arrays) == len(jax.tree.leaves(params))


ALONE = "1 segment of windows, 1 at a time"
PAIRS = "windows in pairs of a long and a short history"


@pytest.mark.parametrize(
    ("changes", "plan"),
    [
        ({}, PAIRS),
        ({"sampled_windows": 16}, PAIRS),  # all of them
        ({"sampled_windows": 15}, ALONE),
        ({"mesh": "window=2"}, ALONE),
        ({"num_items": 8}, ALONE),  # questions begin in the fifth of 16 windows
        ({"history_window": 5}, ALONE),
        ({"checkpointing": False}, ALONE),
    ],
)
def test_a_run_prints_the_plan_that_its_steps_use(changes, plan):
    planned = ExecutionPlan(checkpointing=changes.get("checkpointing", True), paired=True)
    model = {"vocab_size": 64, "d_model": 16, "num_heads": 2, "history_window": 4, "generation_window": 4}
    sections = {
        "model": model | {"memory": planned},
        "train": {"sampled_windows": 0, "mesh": "", "batch_size": 8},
        "data": {"dataset": "recall", "sequence_length": 64, "num_items": 1, "tokenizer": "numbers:64"},
    }
    for section in sections.values():
        section |= {name: value for name, value in changes.items() if name in section}
    config = configuration(sections)
    assert f": {plan}," in plan_line(build_run(config, build_tokenizer(config.data.tokenizer)))


@pytest.mark.parametrize(("mesh", "together"), [("", 31), ("fsdp=2", 8)])
def test_the_printed_plan_is_that_of_the_mesh(mesh, together):
    """Devices that split the batch each run a program of their own; `fsdp` leaves the split to the compiler."""
    model = {"vocab_size": 64, "causal_history": True}
    train = {"mesh": mesh, "batch_size": 8, "sampled_windows": 0}
    data = {"dataset": "recall", "sequence_length": 8192, "num_items": 1, "tokenizer": "numbers:64"}
    config = configuration({"model": model, "train": train, "data": data})
    with target("gpu", "NVIDIA H100 80GB HBM3"):
        assert f", {together} at a time," in plan_line(build_run(config, build_tokenizer(config.data.tokenizer)))


def test_stages_are_described():
    stages = DataConfig(dataset="recall", tokenizer="numbers:64", curriculum="64:1500,128:3000@0.95").stages
    assert [stage_text(stage) for stage in stages] == [
        "1,500 updates on samples of 64 tokens",
        "at most 3,000 updates on samples of 128 tokens, until 95% of the answers are right",
    ]


def test_a_run_with_an_accuracy_says_when_it_is_measured():
    told = {every: goal_line(TrainConfig(steps="1000@.990", eval_every=every)) for every in (0, 1500, "epoch")}
    assert told == {
        0: "note: train.eval_every = 0 evaluates only after the last update, so no accuracy ends the run early",
        1500: "ends early at an accuracy of 0.99; evaluated every 1,500 updates",
        "epoch": "ends early at an accuracy of 0.99; evaluated after each epoch",
    }


def test_a_run_says_that_it_compiles_what_it_reached_and_what_comes_next(tmp_path, capfd):
    config = run_config(tmp_path, steps=2, eval_every=0)
    pydoc = dataclasses.replace(config.data, dataset="pydoc", train_files="", validation_files="")
    figures = train_and_evaluate(dataclasses.replace(config, data=pydoc), tmp_path / "a run")
    told = capfd.readouterr().err
    lines = told.splitlines()
    (compiles,) = [number for number, line in enumerate(lines) if line.startswith("compiling the step")]
    assert re.fullmatch(r"compiled and ran step 1 in \d+ s", lines[compiles + 1])
    assert "\r" not in told, "a log file keeps every line"
    (evaluation,) = [line for line in lines if line.startswith("evaluation at step 2: ")]
    assert evaluation.startswith(f"evaluation at step 2: bits per byte {figures['bits_per_byte']:.5g}  loss ")
    (goal,) = [line.removeprefix("to beat: ") for line in lines if line.startswith("to beat: ")]
    assert re.fullmatch(r"[12]\.\d{3} bits per byte, .* \([56] bytes of context, Kneser-Ney\)", goal)
    assert f"reached: {figures['bits_per_byte']:.3f} bits per byte; to beat: {goal}" in lines
    assert f"next: python -m tlinformer_jax evaluate --workdir='{tmp_path}/a run'" in lines
    assert f"next: python -m tlinformer_jax generate --workdir='{tmp_path}/a run' --prompt=\"...\"" in lines


def test_parameters_are_those_of_the_newest_or_a_given_step(tmp_path):
    config = run_config(tmp_path, eval_every=2, checkpoint_every=2)
    train_and_evaluate(config, tmp_path / "run")
    assert load_params(tmp_path / "run", config.model)[0] == 6
    step, params = load_params(tmp_path / "run", config.model, step=4)
    assert step == 4
    assert params["embedding"].shape == (257, 16)


FAST = """
import sys
sys.argv = ["main", "--config=configs/tiny.py", f"--workdir={sys.argv[1]}", *sys.argv[2:]]
from tlinformer_jax import main
from tlinformer_jax.commands import cli
try:
    cli.run(main.main)
finally:
    print("jax" in sys.modules, "flax" in sys.modules, "orbax" in sys.modules)
"""


@pytest.mark.parametrize("wrong", ["--config.model.num_heads=7", "--config.model.widnow=1", "--config.data.dataset=x"])
def test_a_wrong_configuration_is_refused_before_jax_is_imported(wrong, tmp_path):
    line, environment = command_line("tlinformer_jax.main")
    result = run_line([line[0], "-c", FAST, f"{tmp_path}/run", wrong], environment | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 2, result.stderr
    assert result.stdout.split() == ["False"] * 3


LIBRARY = """
import sys
from tlinformer_jax import train_and_evaluate
model = {"d_model": 16, "num_heads": 2, "num_blocks": 1, "hidden_depth": 0, "d_ff": 24}
train_and_evaluate({"model": model, "train": {"steps": 1, "batch_size": 4, "eval_every": 0}}, sys.argv[1])
"""


@pytest.mark.slow
def test_a_library_call_keeps_its_compiled_programs(tmp_path):
    line, environment = command_line("tlinformer_jax.main")
    del environment["JAX_COMPILATION_CACHE_DIR"]
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    result = run_line([line[0], "-c", LIBRARY, str(tmp_path / "run")], environment)
    assert result.returncode == 0, result.stderr
    assert any((tmp_path / ".cache" / "tlinformer_jax" / "xla").iterdir())
