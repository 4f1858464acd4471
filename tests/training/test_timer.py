"""Checkpoints by wall time: often enough, rarely looked for, agreed on by all processes, and of no effect on a run."""

import numpy as np
import pytest
from jax.experimental import multihost_utils

from tlinformer_jax.training import callbacks
from tlinformer_jax.training.callbacks import LOOKS, Timer


@pytest.fixture
def clock(monkeypatch):
    """The time in seconds, in a list; and how often the devices were waited for."""
    now, looks = [1000.0], []
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(callbacks.jax, "block_until_ready", looks.append)
    return now, looks


@pytest.mark.parametrize("step_seconds", [0.01, 3.0, 70.0])
def test_no_checkpoint_is_older_than_the_minutes_and_the_clock_is_seldom_looked_at(clock, step_seconds):
    """The first step takes two minutes, which are compilation."""
    (now, looks), due = clock, Timer(600)
    saved, steps = [now[0]], int(3600 / step_seconds)
    now[0] += 120
    for step in range(steps):
        now[0] += step_seconds
        if due.due(step):
            saved.append(now[0])
    gaps = np.diff(saved)
    assert len(gaps) >= 5
    assert gaps.max() <= 600
    assert gaps.min() >= 600 - 2 * max(600 / LOOKS, step_seconds)
    assert len(looks) <= min(steps, 3600 / 600 * LOOKS * 1.5 + 30)


def test_without_a_time_nothing_is_due_and_nothing_waits(clock):
    due = Timer(0)
    clock[0][0] += 1e6
    assert not any(due.due(step) for step in range(5))
    assert not clock[1]


def test_process_0_decides(clock, monkeypatch):
    """Another clock that is far ahead changes neither the answer nor when the next question is."""
    monkeypatch.setattr(callbacks.jax, "process_count", lambda: 2)
    asked = []
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda mine: asked.append(mine) or np.array([0, 2]))
    due = Timer(600)
    clock[0][0] += 1e6
    assert [due.due(step) for step in range(5)] == [False] * 5
    assert len(asked) == 3, "at the first, third and fifth step"
