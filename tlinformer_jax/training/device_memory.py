"""Memory of devices: how much a program needs, how much is used, and advice if there is too little."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax

from tlinformer_jax.errors import UserError, first_line

TRAINING_ADVICE = (
    "a step needs less memory with model.memory = 'low', a larger train.accumulation, a smaller train.batch_size or "
    "data.sequence_length, or the axis fsdp of train.mesh on several devices (--check_compile prints how much memory a "
    "step needs)"
)
MORE = "or a device with more memory may help (on a GPU, XLA_PYTHON_CLIENT_MEM_FRACTION sets JAX's share)"
EVALUATION_ADVICE = f"a smaller --batch_size, {MORE}"
GENERATION_ADVICE = f"a smaller --num_samples or --max_new_tokens, a shorter prompt, {MORE}"


# ---- Too little memory


class OutOfMemoryError(UserError):
    """An error for a device with too little memory for this configuration."""

    status = 1  # the configuration is a valid one


@contextlib.contextmanager
def memory_advice(advice: str = TRAINING_ADVICE) -> Iterator[None]:
    """Turns running out of memory into an `OutOfMemoryError` whose message ends in `advice`."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError, MemoryError) as error:
        # JAX raises a ValueError when the host fetches a result that could not be computed.
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        reason = first_line(error).removeprefix("RESOURCE_EXHAUSTED: ").rstrip(". ")
        raise OutOfMemoryError(f"{reason}; {advice}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Returns whether a runtime error reports too little main memory of a device."""
    text = str(error).lower()
    # A kernel that asks for more shared memory than a core has fails with the same error name.
    exhausted = ("resource_exhausted" in text or "out of memory" in text) and "shared memory" not in text
    return exhausted or isinstance(error, MemoryError)


# ---- Memory in use


class ProgramBytes(NamedTuple):
    """Memory of a compiled program on one device, in bytes."""

    arguments: int
    outputs: int
    aliased: int  # outputs that reuse the memory of arguments
    temporary: int

    @property
    def total(self) -> int:
        """All of it, counting memory that is reused once."""
        return self.arguments + self.outputs - self.aliased + self.temporary


def program_bytes(compiled: jax.stages.Compiled) -> ProgramBytes | None:
    """Returns the memory of a compiled program; None if its compiler does not report it."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    return ProgramBytes(
        found.argument_size_in_bytes, found.output_size_in_bytes, found.alias_size_in_bytes, found.temp_size_in_bytes
    )


def peak_bytes() -> int | None:
    """Returns the peak bytes in use on the first device; None if the device does not count them."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
