"""What a run would take, without starting it: `python -m tlinformer_jax.main --check --config=FILE`."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.data.sources import find_split
from tlinformer_jax.data.tasks import Split
from tlinformer_jax.data.tokenizers import build_tokenizer
from tlinformer_jax.parallel.sharding import batch_sharding
from tlinformer_jax.training.console import length_lines, model_line, split_line
from tlinformer_jax.training.optimizer import Horizon, run_horizon
from tlinformer_jax.training.setup import PENDING, Run, build_run, training_batches
from tlinformer_jax.training.step import jit_train_step


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
    found = {name: find_split(config.data, name, tokenizer) for name in ("train", "validation")}
    splits = {name: None if split is None else run.checked(name, split) for name, split in found.items()}
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
    found: Any = compiled_step(run).memory_analysis()
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return kept + found.temp_size_in_bytes, found.temp_size_in_bytes


def compiled_step(run: Run) -> jax.stages.Compiled:
    """A training step, compiled for the run's mesh."""
    rows, length = run.config.train.batch_size, run.config.data.sequence_length
    sharding = batch_sharding(run.mesh)
    dtypes: dict[str, Any] = {"inputs": jnp.int32, "labels": jnp.int32, "weights": jnp.float32}
    if run.config.data.document_masking:
        dtypes["documents"] = jnp.int32
    batch = {name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding) for name, dtype in dtypes.items()}
    state, shardings = run.abstract_state, run.shardings  # first: under the mesh, even a key is made on its devices
    with jax.set_mesh(run.mesh):
        step = jit_train_step(
            shardings, sharding, model=run.model, config=run.config.train, horizon=run.horizon, answers=run.answers
        )
        return step.lower(state, batch).compile()


def _device_bytes(tree: Any, itemsize: int | None = None) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * (itemsize or leaf.dtype.itemsize) for leaf in leaves)


def _horizon(config: RunConfig, train: Split | None) -> Horizon | None:
    """How long the run is; None where only the tokens can tell."""
    if train is not None:
        return run_horizon(config.train, training_batches(config, train))
    return Horizon(config.train.updates, config.train.updates) if config.train.updates else None


def _memory_line(run: Run, compile_step: bool) -> str:
    state = state_bytes(run)
    parts = {"parameters": state.parameters, "gradients": state.gradients, "optimizer state": state.optimizer}
    line = f"memory by device: {', '.join(f'{name} {size_text(size)}' for name, size in parts.items())}"
    return f"{line}; together {size_text(state.total)}{'' if compile_step else ' + activations'}"


def size_text(count: int) -> str:
    """So many bytes as text, in GiB or MiB."""
    return f"{count / 2**30:,.2f} GiB" if count >= 2**30 else f"{count / 2**20:,.2f} MiB"
