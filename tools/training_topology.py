"""A training step compiled for TPUs that are not here: `main --check --topology=v5e:16x16 --config=FILE`.

The compiler is libtpu's, the one that a TPU has, so memory and collectives are those of a real run; how fast it is, it
does not tell. Nothing is allocated, and no data is read.
"""

import collections
import importlib.util
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.data.tokenizers import ByteTokenizer
from tlinformer_jax.errors import UserError
from tlinformer_jax.parallel.target import target
from tlinformer_jax.training.check import compiled_step, model_line, size_text
from tlinformer_jax.training.memory import is_out_of_memory
from tlinformer_jax.training.setup import PENDING, build_run
from tools.collectives import Collective, collectives

PLATFORM = "tpu"
LANES = 128


def topology_devices(name: str) -> Sequence[Any]:
    """The devices of a topology, in JAX's order; they can be compiled for and nothing else.

    Args:
      name: of a TPU generation and its grid of chips, such as 'v5e:2x2'.

    Raises:
      UserError: if there is none of this name, or libtpu is missing.
    """
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name}: needs libtpu, best in an environment of its own: pip install 'tlinformer-jax[tpu]'"
        )
    try:
        return topologies.get_topology_desc(platform=PLATFORM, topology_name=name).devices
    except Exception as error:  # JAX wraps what libtpu says in errors of several kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"--topology={name}: must be a TPU and its grid of chips, such as v5e:2x2 ({reason})"
        ) from error


def check_topology(config: RunConfig, name: str) -> str:
    """Lines on the model, the memory of a chip, and what each chip exchanges with others in a step.

    Args and errors are those of `compile_for`.
    """
    model, compiled = compile_for(config, name)
    lines = [model, memory_line(compiled.memory_analysis())]
    return "\n".join([*lines, *collective_lines(collectives(compiled.as_text()))])


def compile_for(config: RunConfig, name: str) -> tuple[str, Any]:
    """Compiles a training step for a TPU topology.

    Args:
      config: of the run; its data and tokenizer are not looked at.
      name: of the topology.

    Returns:
      a line on the model and its devices, and the step (`jax.stages.Compiled`).

    Raises:
      ConfigError: if the configuration does not fit the devices.
      UserError: for an unknown topology, or if the step does not fit a chip's memory.
    """
    devices = topology_devices(name)
    with target(PLATFORM, devices[0].device_kind):
        # No text is read, so the tokenizer that every vocabulary holds stands in for the real one.
        run = build_run(config, ByteTokenizer(), PENDING, devices)
        try:
            return model_line(run), compiled_step(run)
        except jax.errors.JaxRuntimeError as error:
            reason = next(line for line in str(error).splitlines() if line.strip()).strip()[:300]
            if is_out_of_memory(error):
                raise UserError(f"--topology={name}: a step does not fit a chip's memory ({reason})") from error
            advice = ""
            if run.mesh.shape["fsdp"] > 1 and config.model.vocab_size % LANES:
                # Seen with libtpu 0.0.42 at a vocabulary of 257.
                advice = f"model.vocab_size = {config.model.vocab_size}, not a multiple of {LANES}, may be why; "
            raise UserError(f"--topology={name}: the TPU's compiler fails; {advice}it says: {reason}") from error


def memory_line(found: Any) -> str:
    """A compiled program's memory on one device, from its `memory_analysis()`."""
    arguments, outputs, temporary = found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes
    total = arguments + outputs - found.alias_size_in_bytes + temporary
    return (
        f"memory by chip: arguments {size_text(arguments)}, outputs {size_text(outputs)} (of them "
        f"{size_text(found.alias_size_in_bytes)} in the arguments' place), temporary {size_text(temporary)}; total "
        f"{size_text(total)}"
    )


def collective_lines(found: Iterable[Collective]) -> list[str]:
    """What one device exchanges in a run of a program, by kind; loops counted as often as they turn."""
    kinds = collections.defaultdict(list)
    for collective in found:
        kinds[collective.kind].append(collective)
    if not kinds:
        return ["collectives: none"]
    lines = []
    for kind, each in sorted(kinds.items()):
        total, largest = sum(one.total_bytes for one in each), max(one.bytes for one in each)
        line = (
            f"{kind}: {sum(one.trips for one in each):,} runs of {len(each):,} operations, {size_text(total)} by chip, "
            f"the largest {size_text(largest)}"
        )
        unknown = sum(not one.known_trips for one in each)
        lines.append(f"{line}; {unknown} in loops of unknown length, counted once" if unknown else line)
    return lines
