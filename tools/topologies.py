"""Shared by the tools that compile for TPUs without having them. The compiler is libtpu's, as on a TPU."""

import collections
import importlib.util
import os
from collections.abc import Iterable, Sequence
from typing import Any

from tlinformer_jax.errors import UserError
from tools.collectives import Collective, collectives

PLATFORM = "tpu"
# Without these, JAX would look for TPUs, and libtpu would query Google's cloud and lock itself for one process.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "none",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def compile_without_tpus() -> None:
    """Sets the environment so that libtpu only compiles. Call it before JAX is imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def topology_devices(name: str) -> Sequence[Any]:
    """Returns the devices of a topology in JAX's order. Programs can be compiled for them but not run.

    Args:
      name: TPU generation and its grid of chips, such as 'v5e:2x2'.

    Raises:
      UserError: if there is no topology of this name, or libtpu is missing.
    """
    from jax.experimental import topologies

    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name}: needs libtpu, best in an environment of its own: pip install 'tlinformer-jax[tpu]'"
        )
    try:
        return topologies.get_topology_desc(platform=PLATFORM, topology_name=name).devices
    except Exception as error:  # JAX wraps libtpu's errors in several types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"--topology={name}: must be a TPU and its grid of chips, such as v5e:2x2 ({reason})"
        ) from error


def program_lines(compiled: Any) -> list[str]:
    """Returns lines with the memory per chip and the exchanges in one run of a program (`jax.stages.Compiled`)."""
    return [memory_line(compiled), *collective_lines(collectives(compiled.as_text()))]


def memory_line(compiled: Any) -> str:
    """Returns a line with the memory of a program (`jax.stages.Compiled`) on one device."""
    from tlinformer_jax.training.check import size_text
    from tlinformer_jax.training.device_memory import program_bytes

    found = program_bytes(compiled)
    if found is None:
        return "memory by chip: the compiler does not report it"
    arguments, outputs, aliased, temporary = map(size_text, found)
    return (
        f"memory by chip: arguments {arguments}, outputs {outputs} (of them {aliased} in the arguments' place), "
        f"temporary {temporary}; total {size_text(found.total)}"
    )


def collective_lines(found: Iterable[Collective]) -> list[str]:
    """Returns lines with the exchanges of one device in a run of a program, by kind, once per loop iteration."""
    from tlinformer_jax.training.check import size_text

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
