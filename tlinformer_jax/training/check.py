"""Tells what a run needs, without starting it: `python -m tlinformer_jax.main --check --config=FILE`."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.data.sources import find_split
from tlinformer_jax.data.tokenizers import build_tokenizer
from tlinformer_jax.training.console import length_lines, model_line, split_line
from tlinformer_jax.training.device_memory import program_bytes
from tlinformer_jax.training.optimizer import Horizon, run_horizon
from tlinformer_jax.training.setup import ANY_LENGTH, Run, build_run, check_trainable, training_batches


class StateBytes(NamedTuple):
    """Memory of the train state in bytes, on the device that holds the most."""

    parameters: int
    gradients: int  # in the parameters' dtype; with accumulation also their float32 sum
    optimizer: int


def check_run(config: RunConfig, compile_step: bool = False) -> str:
    """Checks a configuration and describes, as text, what a run with it needs; writes nothing."""
    tokenizer = build_tokenizer(config.data.tokenizer)
    run = build_run(config, tokenizer)
    check_trainable(run)
    splits = {name: find_split(config.data, name, tokenizer) for name in ("train", "validation")}
    splits = {name: None if split is None else run.checked(name, split) for name, split in splits.items()}
    horizon = None  # None if only the tokenised text determines it
    if splits["train"] is not None:
        horizon = run_horizon(config.train, training_batches(config, splits["train"]))
    elif config.train.updates:
        horizon = Horizon(config.train.updates, config.train.updates)
    state = state_bytes(run)
    parameters, gradients, optimizer, total = map(size_text, (*state, sum(state)))
    memory = f"memory by device: parameters {parameters}, gradients {gradients}, optimizer state {optimizer}"
    memory += f"; together {total}{'' if compile_step else ' + activations'}"
    lines = [model_line(run), memory, *length_lines(run, horizon, splits["train"])]
    lines += [split_line(name, split, config.data.sequence_length) for name, split in splits.items()]
    if compile_step:
        lines.append(step_line(dataclasses.replace(run, horizon=horizon or ANY_LENGTH)))
    return "\n".join(lines)


def state_bytes(run: Run) -> StateBytes:
    """Computes the memory of the train state from shapes and shardings."""
    params = run.abstract_state.params
    parameters = _device_bytes(params)
    summed = _device_bytes(params, itemsize=4) if run.config.train.accumulation > 1 else 0
    return StateBytes(parameters, parameters + summed, _device_bytes(run.abstract_state.opt_state))


def step_line(run: Run) -> str:
    """Compiles a step, and says how much memory it needs on a device."""
    found = program_bytes(run.compiled_train_step())
    if found is None:
        return "compiled step by device: the compiler does not report its memory"
    total, temporary = size_text(found.total), size_text(found.temporary)
    return f"compiled step by device: {total}, of which {temporary} are activations, gradients and the like"


def _device_bytes(tree: Any, itemsize: int | None = None) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * (itemsize or leaf.dtype.itemsize) for leaf in leaves)


def size_text(count: int) -> str:
    """Formats a number of bytes in GiB or MiB."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"
