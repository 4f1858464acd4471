"""Checks whether an interrupted run equals an uninterrupted one bit for bit, in its log and its final state."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tlinformer_jax.training.checkpoint import DAMAGED, FOLDER, STATE, newest_good
from tlinformer_jax.training.metrics import METRICS_FILE

# Entries that depend on the clock.
SPEED = {f"train/{name}" for name in ("tokens_per_second", "tflops", "mfu", "input_wait", "save_wait")}


def logged(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the events of a run in order, without the parts that depend on the clock.

    JSON writes float32 numbers such that equal text means equal bits.
    """
    lines = (workdir / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in SPEED} for line in lines]


def log_difference(whole: list[dict[str, Any]], other: list[dict[str, Any]]) -> str | None:
    """Returns the first difference between two runs' events in words; None if there is none."""
    steps = [event["step"] for event in other if "train/loss" in event]
    doubled = sorted({step for step in steps if steps.count(step) > 1})
    missing = sorted({event["step"] for event in whole} - {event["step"] for event in other})
    if doubled:
        return f"step {doubled[0]} is logged {steps.count(doubled[0])} times"
    if missing:
        return f"step {missing[0]} is not logged"
    for expected, found in zip(whole, other):
        if expected != found:
            names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
            return f"step {expected['step']}: " + ", ".join(
                f"{name} {found.get(name)!r} instead of {expected.get(name)!r}" for name in names
            )
    return None if len(whole) == len(other) else f"{len(other)} events instead of {len(whole)}"


def final_state(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns every array of the newest checkpoint by path: parameters, optimiser, step, skips."""
    found = newest_good(workdir / FOLDER)
    assert found is not None, "a run that ended has saved"
    folder = workdir.absolute() / FOLDER / str(found.step) / STATE
    with ocp.PyTreeCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(folder).item_metadata.tree
        # As NumPy arrays, because they may come from devices that this process does not use.
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        tree = checkpointer.restore(folder, restore_args=how)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def state_difference(whole: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> str | None:
    """Returns the first array that differs in a bit, in words; None if there is none."""
    if whole.keys() != other.keys():
        return f"other arrays: {sorted(whole.keys() ^ other.keys())}"
    for name, array in whole.items():
        found = other[name]
        if (found.shape, found.dtype) != (array.shape, array.dtype) or found.tobytes() != array.tobytes():
            return f"{name} differs"
    return None


def damaged(workdir: pathlib.Path) -> str | None:
    """Returns a message if a checkpoint was found damaged: a kill must never leave one under its final name."""
    found = sorted(path.name for path in (workdir / FOLDER).iterdir() if DAMAGED in path.name)
    return f"checkpoint {found[0]} was left" if found else None
