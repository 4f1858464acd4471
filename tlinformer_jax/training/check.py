"""What a run would take, without starting it: `python -m tlinformer_jax.main --check --config=FILE`."""

import dataclasses
import math
from typing import Any

import jax

from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.data.sources import find_split
from tlinformer_jax.data.tasks import Split
from tlinformer_jax.data.tokenizers import build_tokenizer
from tlinformer_jax.training.console import length_lines, model_line, split_line
from tlinformer_jax.training.optimizer import Horizon, run_horizon
from tlinformer_jax.training.setup import PENDING, Run, build_run, training_batches


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Memory of the train state in bytes, on the device that holds most.

    The gradients are in the parameters' dtype; with accumulation their float32 sum is counted too.
    """

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Of all three."""
        return self.parameters + self.gradients + self.optimizer


def check_run(config: RunConfig, compile_step: bool = False) -> str:
    """Checks a configuration against tokenizer, data and devices, and says what the run would take; writes nothing.

    With `compile_step` a training step is compiled, for the memory that it takes.
    """
    tokenizer = build_tokenizer(config.data.tokenizer)
    run = build_run(config, tokenizer, PENDING)
    splits = {name: find_split(config.data, name, tokenizer) for name in ("train", "validation")}
    for name, split in splits.items():
        if split is not None:
            run.checked(name, split)
    horizon = _horizon(config, splits["train"])
    lines = [model_line(run), _memory_line(run, compile_step), *length_lines(run, horizon, splits["train"])]
    lines += [split_line(name, split, config.data.sequence_length) for name, split in splits.items()]
    if compile_step:
        total, temporary = step_bytes(dataclasses.replace(run, horizon=horizon or PENDING))
        rest = f"{size_text(temporary)} are activations, gradients and the like"
        lines.append(f"compiled step by device: {size_text(total)}, of which {rest}")
    return "\n".join(lines)


def state_bytes(run: Run) -> StateBytes:
    """Memory of the train state and the gradients, by device, from shapes and shardings."""
    params = run.abstract_state.params
    parameters = _device_bytes(params)
    summed = _device_bytes(params, itemsize=4) if run.config.train.accumulation > 1 else 0
    return StateBytes(parameters, parameters + summed, _device_bytes(run.abstract_state.opt_state))


def step_bytes(run: Run) -> tuple[int, int]:
    """Memory of a compiled training step by device, in bytes: in all, and what of it is temporary."""
    found: Any = run.compiled_train_step().memory_analysis()
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return kept + found.temp_size_in_bytes, found.temp_size_in_bytes


def _device_bytes(tree: Any, itemsize: int | None = None) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * (itemsize or leaf.dtype.itemsize) for leaf in leaves)


def _horizon(config: RunConfig, train: Split | None) -> Horizon | None:
    """How long the run is; None where only the tokens can tell."""
    if train is not None:
        return run_horizon(config.train, training_batches(config, train))
    return Horizon(config.train.steps, config.train.steps) if config.train.steps else None


def _memory_line(run: Run, compile_step: bool) -> str:
    state = state_bytes(run)
    parts = {"parameters": state.parameters, "gradients": state.gradients, "optimizer state": state.optimizer}
    line = f"memory by device: {', '.join(f'{name} {size_text(size)}' for name, size in parts.items())}"
    return f"{line}; together {size_text(state.total)}{'' if compile_step else ' + activations'}"


def size_text(count: int) -> str:
    """So many bytes as text, in GiB or MiB."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"
