"""The inference benchmark where something is wrong: killed or starved runs, wrong flags, absent packages."""

import dataclasses
from typing import Any

import jax
import pytest

from benchmarks import limits, parts, report, rows, runner
from benchmarks.session import Session
from tests.benchmarks.test_inference import CONFIGS, PLAN, SMALL, command, read
from tests.support import commands

pytestmark = pytest.mark.usefixtures("one_measurement_of_the_device")


def test_a_killed_run_keeps_what_it_measured(tmp_path, monkeypatch):
    calls = []

    def slide(*arguments: Any) -> dict[str, Any]:
        calls.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "slide", slide)
    plan = dataclasses.replace(PLAN, parts=("sustained", "slide"), lengths=((10, 1),))
    with pytest.raises(KeyboardInterrupt):
        runner.run_benchmark(plan, CONFIGS[:1], out=tmp_path)
    assert len(calls) == 1
    values = read(tmp_path)
    assert values["complete"] is False
    assert values["rows"][0]["sustained"]["seconds"] > 0
    assert "slide" not in values["rows"][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inference.json"]


def test_too_little_memory_is_reported_and_the_run_goes_on(tmp_path, monkeypatch):
    decode, made = Session.__init__, []

    def starved(session: Session, decoder: Any, batch: int, length: int, *rest: Any) -> None:
        made.append(length)
        if length in (12, 30):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        decode(session, decoder, batch, length, *rest)

    monkeypatch.setattr(Session, "__init__", starved)
    plan = dataclasses.replace(PLAN, parts=("sustained", "longest"), lengths=((12, 1), (10, 1)), longest=(20, 30, 40))
    values = runner.run_benchmark(plan, CONFIGS[:1], out=tmp_path)
    assert values == read(tmp_path) | {"plan": values["plan"]}
    assert values["complete"] is True
    assert values["rows"][0]["error"].startswith("out of memory in part 'cache': RESOURCE_EXHAUSTED")
    assert values["rows"][1]["sustained"]["seconds"] > 0
    assert [(row["length"], row["fits"]) for row in values["longest"]] == [(20, True), (30, False)]
    assert made == [12, 10, 20, 30]
    assert "out of memory" in report.table(values)


@pytest.mark.parametrize("text", ["INTERNAL: the kernel is wrong", "RESOURCE_EXHAUSTED: Shared memory size limit"])
def test_other_failures_are_raised(text, monkeypatch):
    """A kernel that wants more shared memory than a core has is wrong too: the device is not full."""

    def broken(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError(text)

    monkeypatch.setattr(Session, "__init__", broken)
    decoder, _ = runner._decoder(SMALL, 0, None)
    with pytest.raises(jax.errors.JaxRuntimeError, match=text):
        rows.measure_row(PLAN, decoder, 10, 1, limits.Ceilings(1.0, 1.0, 1.0, 1), lambda row: None)


MISTAKES = {
    "a length that is none": (["--lengths=10,1e6"], "--lengths=10,1e6: must be integers"),
    "no length to try": (["--parts=longest", "--longest="], "--longest=: must be integers from 1"),
    "an unknown part": (["--parts=sustained,speed"], "--parts = 'speed'"),
    "an unknown architecture": (["--architectures=mamba"], "--architectures = 'mamba'"),
    "more devices than there are": (
        ["--context=2", "--architectures=tlinformer"],
        "--context = 2: must be from 1 to the number of devices of this machine; there is 1 device (cpu)",
    ),
    "heads that do not divide the width": (["--d_model=30", "--num_heads=4"], "model.num_heads = 4"),
    "a config file, its override and a flag": (
        ["--config=configs/tiny.py", "--config.model.d_model=18", "--num_heads=5"],
        "model.num_heads = 5: must divide model.d_model = 18",
    ),
    "an int8 cache of what does not grow": (
        ["--cache_dtype=int8", "--architectures=transformer,tconstformer"],
        "--cache_dtype = 'int8': needs a cache that grows; model.architecture = 'tconstformer' has none",
    ),
    "a missing config file": (["--config=configs/none.py"], "configs/none.py"),
    "a directory that cannot be written": (["--out=/proc/none"], "--out=/proc/none"),
    "two configurations": (["--config=configs/tiny.py", "--workdir=runs"], "--config: not together with --workdir"),
}


def test_mistakes_get_one_line_and_status_2():
    results = commands.in_forks([("benchmarks.inference", arguments) for arguments, _ in MISTAKES.values()])
    for result, (_, message) in zip(results, MISTAKES.values(), strict=True):
        commands.check_refusal(result, message)


def test_the_command_needs_neither_ml_collections_nor_matplotlib(tmp_path):
    """And a config file without ml_collections is a mistake like any other."""
    small = ["--d_model=16", "--num_heads=2", "--num_blocks=1", "--vocab_size=37", "--window=8"]
    small += ["--lengths=9x2", "--parts=sustained", "--seconds=0.01", "--architectures=tlinformer", f"--out={tmp_path}"]
    blocked = ("ml_collections", "matplotlib", "tensorflow", "clu", "grain", "orbax", "tensorboardX")
    result = command(*small, blocked=blocked)
    assert result.returncode == 0, result.stderr
    assert result.stderr.strip().startswith("no plots: ")
    assert "sustained took" in result.stdout
    values = read(tmp_path)
    assert values["config"]["generation_window"] == values["config"]["history_window"] == 8
    assert (values["rows"][0]["length"], values["rows"][0]["batch"]) == (9, 2)
    assert "--lengths=9x2" in values["command"]
    refused = command("--config=configs/tiny.py", blocked=("ml_collections",))
    assert (refused.returncode, len(refused.stderr.strip().splitlines())) == (2, 1)
    assert "ml_collections" in refused.stderr
