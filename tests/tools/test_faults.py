"""The fault trials notice what they are for: a step lost or doubled, a bit that differs, a wrong moment of a kill."""

import concurrent.futures
import json
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from tests.support.commands import command_line, run_line
from tools import fault_runs
from tools.fault_check import log_difference, state_difference
from tools.fault_runs import Outcome, PlannedSignal, Process, fault_config
from tools.fault_trials import Trial, draw_signals, process_problem

EVENTS = [{"step": step, "train/loss": 1 / step, "train/learning_rate": 0.1} for step in (1, 2, 3)]
EVENTS.insert(2, {"step": 2, "eval/loss": 0.5})

DIFFERENCES = {
    "none": (lambda events: None, None),
    "doubled": (lambda events: events.append(events[-1]), "step 3 is logged 2 times"),
    "missing": (lambda events: events.pop(0), "step 1 is not logged"),
    "no evaluation": (lambda events: events.pop(2), "step 2: "),
    "last bit": (lambda events: events[3].update({"train/loss": np.nextafter(1 / 3, 1)}), "step 3: train/loss "),
    "one more": (lambda events: events.append({"step": 3, "eval/loss": 1}), "5 events instead of 4"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_log_that_differs_in_anything_is_told(name):
    change, message = DIFFERENCES[name]
    other = [dict(event) for event in EVENTS]
    change(other)
    found = log_difference(EVENTS, other)
    assert found is None if message is None else found.startswith(message)


def test_a_state_that_differs_in_a_bit_is_told():
    whole = {"a": np.array([0.0, np.nan], np.float32), "b": np.int32(1)}
    assert state_difference(whole, {name: array.copy() for name, array in whole.items()}) is None
    assert state_difference(whole, whole | {"a": np.array([-0.0, np.nan], np.float32)}) == "a differs"
    assert state_difference(whole, whole | {"b": np.int64(1)}) == "b differs"
    assert state_difference(whole, {"b": whole["b"]}) == "other arrays: ['a']"


# What a training process does, as seen from outside: a number of seconds to sleep, a folder or a line of its log.
STORY = """
import pathlib, sys, time
for part in sys.argv[1:]:
    if part.replace(".", "").isdecimal():
        time.sleep(float(part))
    elif part.startswith("-"):
        pathlib.Path(part[1:]).rmdir()
    elif "/" in part and " " not in part:
        pathlib.Path(part).mkdir(parents=True)
    else:
        print(part, flush=True)
"""
START = [
    "cache/tokens/a.tmp-x",
    "0.4",
    "-cache/tokens/a.tmp-x",
    "0.4",
    "compiled and ran step 1",
    "step 1/9  loss",
    "0.4",
]
SAVED = ["run/checkpoints/2.saving", "step 2/9  loss", "0.4", "-run/checkpoints/2.saving"]
REST = ["step 8/9  loss", "0.5", "evaluation at step 8: x", "step 9/9  loss", "0.5", "evaluation at step 9: x", "0.5"]
MOMENTS = {
    "before all": (PlannedSignal("anywhere", 1, 0), "start", False, None),
    "first tokens": (PlannedSignal("tokenisation", 1, 0.01), "tokenisation", False, None),
    "first step": (PlannedSignal("step", 1, 0.01), "step", False, 1),
    "second step": (PlannedSignal("step", 2, 0.01), "step", True, 2),
    "save": (PlannedSignal("saving", 1, 0.01), "step", True, 2),
    "evaluation": (PlannedSignal("evaluation", 1, 0.05), "evaluation", False, 8),
    "last evaluation": (PlannedSignal("step", 4, 0.1), "evaluation", False, 9),
    "end": (PlannedSignal("step", 4, 0.75), "end", False, 9),
}


@pytest.mark.slow
def test_a_kill_comes_at_its_moment_and_the_phase_is_told(tmp_path, monkeypatch):
    """All moments at once: the processes do nothing but sleep."""
    kept: list[subprocess.Popen] = []

    def started(config, workdir, log):
        line = [sys.executable, "-S", "-c", STORY, "0.4", *START, *SAVED, *REST]
        process = subprocess.Popen(line, cwd=workdir.parent, stdout=log)
        kept.append(process)  # if it were forgotten, another Popen might reap it
        return process.pid

    def ended(name: str):
        folder = tmp_path / name
        (folder / "run" / "checkpoints" / "1.saving").mkdir(parents=True)  # an earlier process has left this
        found = Process(fault_config(folder), folder, 0).wait(MOMENTS[name][0])
        return found.status, found.phase, found.saving, found.last_step

    monkeypatch.setattr(fault_runs, "_fork", started)
    with concurrent.futures.ThreadPoolExecutor(len(MOMENTS)) as pool:
        found = dict(zip(MOMENTS, pool.map(ended, MOMENTS)))
    assert found == {name: (-signal.SIGKILL, *rest) for name, (_, *rest) in MOMENTS.items()}


def outcome(status, planned="step", phase="step", resumed=None, last_step=None, noticed=False, finished=False):
    sent = None if planned is None else PlannedSignal(planned, 1, 0)
    return Outcome(status, sent, phase, False, resumed, last_step, noticed, finished, 0.1)


KILL, TERM = signal.SIGKILL, signal.SIGTERM
ENDED = outcome(0, None, "end", finished=True)
ENDINGS = {
    "killed": (KILL, [outcome(-9), ENDED], None),
    "killed at its end": (KILL, [outcome(0, phase="end", finished=True), ENDED], None),
    "hung": (KILL, [outcome(-9), outcome(None, None)], "process 1 did not end"),
    "failed": (KILL, [outcome(-9), outcome(2, None)], "process 1 ended with status 2 instead of 0"),
    "failed before the kill": (KILL, [outcome(1), ENDED], "process 0 ended with status 1 instead of -9"),
    "stopped": (TERM, [outcome(0, last_step=4, noticed=True), outcome(0, None, resumed=4)], None),
    "lost a step": (TERM, [outcome(0, last_step=4, noticed=True), outcome(0, None, resumed=3)], "process 0 stopped"),
    "not answered": (TERM, [outcome(-15), ENDED], "process 0 did not answer SIGTERM"),
    "nothing to save": (TERM, [outcome(-15, phase="tokenisation"), ENDED], None),
    "answered and failed": (TERM, [outcome(1, noticed=True), ENDED], "process 0 ended with status 1 instead of 0"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_how_processes_may_end(name):
    number, outcomes, message = ENDINGS[name]
    found = process_problem(outcomes, number)
    assert found is None if message is None else found.startswith(message)


def test_steps_done_again_are_counted_from_the_furthest_that_was_logged():
    outcomes = (
        outcome(-9, last_step=17),
        outcome(-9, phase="start"),
        outcome(-9, resumed=10, last_step=12),
        outcome(-9, resumed=10, last_step=None),
        outcome(0, None, resumed=10, last_step=60),
    )
    assert Trial(0, outcomes, None).repeated_steps == [7, 7]


def test_moments_are_those_of_the_seed():
    aims = fault_runs.AIMS
    durations = fault_runs.Durations(dict.fromkeys(aims, 0.5), dict.fromkeys(aims, 9))

    def drawn(seed):
        return [draw_signals(np.random.default_rng([seed, trial]), trial, durations) for trial in range(50)]

    assert drawn(1) == drawn(1) != drawn(2)
    signals = [one for trial in drawn(1) for one in trial]
    assert {one.aim for one in signals} == set(aims)
    assert all(1 <= one.occurrence <= 9 and 0 <= one.delay < 0.5 for one in signals)


# Runs of two epochs: one that is killed in a step and then while a checkpoint is saved; one whose data begins anew and
# one whose log keeps lost steps, both killed seven steps after a checkpoint; one that gets SIGTERM.
TRIALS = """
import contextlib, dataclasses, signal
from unittest import mock
from tlinformer_jax.data.batches import TrainingBatches
from tlinformer_jax.training import metrics
from tools import fault_trials
from tools.fault_runs import PlannedSignal

read, run_trial, config = TrainingBatches.prefetched, fault_trials.run_trial, fault_trials.fault_config
BREAKS = {
    1: mock.patch.object(TrainingBatches, "prefetched", lambda self, first, *rest: read(self, 0, *rest)),
    2: mock.patch.object(metrics, "cut_back", lambda *_: None),
}
SIGNALS = [[PlannedSignal("step", 18, 0), PlannedSignal("saving", 1, 0)], *[[PlannedSignal("step", 27, 0)]] * 3]

def short(root):
    made = config(root)
    model = dataclasses.replace(made.model, architecture="transformer", hidden_depth=0)  # is soon traced
    return dataclasses.replace(made, model=model, train=dataclasses.replace(made.train, steps="2epochs"))

def chosen(root, trial, durations, seed, number):
    with BREAKS.get(trial, contextlib.nullcontext()):
        return run_trial(root, trial, durations, seed, number if trial == 3 else signal.SIGKILL)

fault_trials.fault_config, fault_trials.run_trial = short, chosen
fault_trials.draw_signals = lambda rng, trial, durations: SIGNALS[trial]
"""


@pytest.mark.slow
@pytest.mark.long
def test_killed_and_terminated_runs_lose_nothing_and_a_resume_that_is_broken_on_purpose_is_caught(tmp_path):
    line, environment = command_line("tools.faults", "--trials=4", "--signal=term", f"--out={tmp_path}")
    line[2] = f"{TRIALS}\n{line[2]}"
    result = run_line(line, environment)
    assert result.returncode == 1, result.stdout + result.stderr
    values = json.loads((tmp_path / "faults_term.json").read_text())
    assert (values["trials"], values["survived"], values["signals"], values["answered"]) == (4, 2, 5, 1)
    assert values["signals_by_aim"] == dict.fromkeys(fault_runs.AIMS, 0) | {"step": 4, "saving": 1}
    assert [entry["trial"] for entry in values["lost"]] == [1, 2]
    assert all(f"LOST trial {number}" in result.stdout for number in (1, 2))
    problems = [entry["problem"] for entry in values["lost"]]
    assert re.fullmatch(r"step \d+: train/.* instead of .*", problems[0])
    assert re.fullmatch(r"step \d+ is logged 2 times", problems[1])
    left = [path.parent.name for path in tmp_path.glob("faults-*/*/run")]
    assert sorted(left) == ["1", "2", "whole"], "what was lost is kept to be looked at"


# Runs of one epoch and of a model that is soon compiled; the signals are those that the command draws.
SMALL = """
import dataclasses
from tools import fault_trials

config = fault_trials.fault_config

def small(root):
    made = config(root)
    model = dataclasses.replace(made.model, hidden_depth=0, dropout=0.0)
    train = dataclasses.replace(made.train, steps="1epochs", accumulation=1)
    return dataclasses.replace(made, model=model, train=train)

fault_trials.fault_config = small
"""


@pytest.mark.slow
def test_a_run_that_is_killed_at_a_moment_that_the_command_draws_loses_nothing(tmp_path):
    """With this seed in a step after the first checkpoint."""
    line, environment = command_line("tools.faults", "--trials=1", "--seed=11", "--signal=kill", f"--out={tmp_path}")
    line[2] = f"{SMALL}\n{line[2]}"
    result = run_line(line, environment)
    assert result.returncode == 0, result.stdout + result.stderr
    values = json.loads((tmp_path / "faults_kill.json").read_text())
    assert (values["trials"], values["survived"], values["never_hit"], values["answered"]) == (1, 1, 0, 0)
    assert values["signals_by_aim"] == dict.fromkeys(fault_runs.AIMS, 0) | {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["faults_kill.json"], "what was not lost is removed"
