"""Checkpoints by wall time: often enough, and agreed on by all processes."""

import numpy as np
import pytest
from jax.experimental import multihost_utils

from tlinformer_jax.training import callbacks
from tlinformer_jax.training.callbacks import Timer


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, in a list."""
    now = [1000.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("step_seconds", [0.01, 3.0, 70.0])
def test_a_checkpoint_is_due_with_the_first_step_after_the_minutes(clock, step_seconds):
    """The first step takes two minutes, which are compilation."""
    timer, saved = Timer(600), [clock[0]]
    clock[0] += 120
    for step in range(1, int(3600 / step_seconds)):
        clock[0] += step_seconds
        if timer.due(step, 50):
            saved.append(clock[0])
            timer.restart()
    gaps = np.diff(saved)
    assert len(gaps) >= 5
    assert gaps.min() >= 600
    assert gaps.max() < 600 + step_seconds + 1e-6


def test_the_time_begins_after_the_action(clock):
    """Otherwise an action that takes longer than the time would run after every update."""
    timer = Timer(600)
    clock[0] += 600
    assert timer.due(1, 50)
    clock[0] += 700  # the action
    timer.restart()
    clock[0] += 599
    assert not timer.due(2, 50)
    clock[0] += 1
    assert timer.due(3, 50)


def test_without_a_time_nothing_is_due(clock):
    timer = Timer(0)
    clock[0] += 1e6
    assert not any(timer.due(step, 50) for step in range(1, 5))


def test_process_0_decides_when_the_processes_meet(clock, monkeypatch):
    """Another clock that is far ahead changes neither the answer nor when the next question is."""
    monkeypatch.setattr(callbacks.jax, "process_count", lambda: 2)
    asked, answers = [], iter([False, True, False])
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda mine: asked.append(mine) or next(answers))
    monkeypatch.setattr(callbacks, "AGREE_EVERY", 5)
    timer = Timer(600)
    clock[0] += 1e6
    assert [step for step in range(1, 16) if timer.due(step, 50)] == [10]
    assert asked == [True, True, True], "at steps 5, 10 and 15"
