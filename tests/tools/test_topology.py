"""tools.training_topology: the training step, compiled by a TPU's compiler on a machine without a TPU."""

import importlib.util
import os
import re
import sys

import pytest

from tests.support.commands import ROOT, check_refusal, command, in_fork, run_line
from tests.support.optional import need
from tools.collectives import Collective, Shape
from tools.topologies import collective_lines

SMALL = (
    "--config=configs/tiny.py",
    *("--config.model.d_model=128", "--config.model.num_heads=2", "--config.model.num_blocks=1"),
    *("--config.model.history_window=128", "--config.model.generation_window=128"),
    *("--config.data.sequence_length=256", "--config.train.batch_size=8"),
)
# Counts the kernels of TPUs in the compiled step, after what the command itself prints.
SCRIPT = """
from tlinformer_jax.commands import cli
from tools import training_topology as topology

compile_for = topology.compile_for

def counted(config, name):
    line, compiled = compile_for(config, name)
    print("kernels =", compiled.as_text().count("tpu_custom_call"))
    return line, compiled

topology.compile_for = counted
cli.define_config_flag()
cli.run(topology.main)
"""


def tpu_python() -> str:
    """A Python whose environment has libtpu: TLINFORMER_TPU_PYTHON, which .ci/run sets, or this one."""
    python = os.environ.get("TLINFORMER_TPU_PYTHON", "")
    if not python:
        missing = [] if importlib.util.find_spec("libtpu") else ["libtpu"]
        need(missing, "TLINFORMER_TPU_PYTHON may name the Python of an environment with '.[tpu]'")
        python = sys.executable
    return python


def check(topology: str, *arguments: str) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    line = [tpu_python(), "-c", SCRIPT, f"--topology={topology}", *SMALL, *arguments]
    result = run_line(line, environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_v5e_with_its_kernel_and_one_reduction_of_the_gradient():
    text = check("v5e:2x2")
    assert "bfloat16 on 4 x TPU v5 lite" in text
    assert int(re.search(r"kernels = (\d+)", text)[1]) >= 1, "attention takes splash, a custom call"
    total = float(re.search(r"; total ([\d.]+) MiB", text)[1])
    parameters = int(re.search(r"([\d,]+) parameters", text)[1].replace(",", "")) * 4 / 2**20
    assert 3 * parameters < total < 100 * parameters
    assert set(re.findall(r"^([a-z-]+): \d", text, re.M)) == {"all-reduce"}
    largest = float(re.search(r"largest ([\d.]+) MiB", text)[1])
    assert largest == pytest.approx(parameters, rel=0.05)


@pytest.mark.slow
def test_v6e_with_parameters_split():
    text = check("v6e:2x2", "--config.train.mesh=fsdp=4", "--config.model.vocab_size=384")
    assert "4 x TPU v6 lite" in text
    assert "'fsdp': 4" in text
    assert re.search(r"^all-gather: ", text, re.M)


@pytest.mark.slow
@pytest.mark.long
def test_the_decoder_at_four_million_tokens_on_four_chips():
    """The 41M shape; heads of 36 features do not lie along the 128 lanes, which would take 3.5 times the memory."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment.pop("XLA_FLAGS", None)
    line = [tpu_python(), "-m", "tools.decoder_topology", "--topology=v5e:2x2", "--length=4000000"]
    result = run_line(line, environment)
    assert result.returncode == 0, result.stderr
    totals = [float(total) for total in re.findall(r"; total ([\d.]+) GiB", result.stdout)]
    # Keys and values of a fourth of the history in each of two blocks; compilers put 36 features in tiles of 8 or 16.
    cache = 2 * 2 * 1e6 * 12 * 36 * 2 / 2**30
    assert len(totals) == 3
    assert all(cache < total < 1.6 * cache for total in totals)
    assert "all-gather: 2 runs of 2 operations" in result.stdout


def test_a_line_for_each_kind():
    whole, part = (Shape("bf16", (1024, 1024)),), (Shape("bf16", (256, 1024)),)
    lines = collective_lines(
        [
            Collective("all-gather", part, whole, 3, "a"),
            Collective("all-gather", part, whole, 1, "b", known_trips=False),
            Collective("all-reduce", part, part, 1, "c"),
        ]
    )
    assert lines == [
        "all-gather: 4 runs of 2 operations, 8.00 MiB by chip, the largest 2.00 MiB; 1 in loops of unknown length, "
        "counted once",
        "all-reduce: 1 runs of 1 operations, 0.50 MiB by chip, the largest 0.50 MiB",
    ]
    assert collective_lines([]) == ["collectives: none"]


def test_mistakes_are_one_line():
    refused = command("tools.training_topology", "--topology=v5e:2x2", "--config=configs/tiny.py", blocked=("libtpu",))
    check_refusal(refused, "--topology=v5e:2x2: needs libtpu")
    check_refusal(in_fork("tools.training_topology"), "--config: must name a config file")
