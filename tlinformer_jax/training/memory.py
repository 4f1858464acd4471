"""The devices' memory: whether there is room, and if not, one line on what a user can change."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.errors import UserError

MORE = "or a device with more memory may do (of a GPU's, XLA_PYTHON_CLIENT_MEM_FRACTION says how much JAX takes)"


class OutOfMemoryError(UserError):
    """A device has too little memory for this configuration."""

    status = 1  # the configuration is a valid one


def memory_advice(config: RunConfig) -> contextlib.AbstractContextManager[None]:
    """Turns a device's running out of memory in training into an `OutOfMemoryError` with advice."""
    return advised(
        lambda: (
            f"a step holds less with {', or '.join(memory_savers(config, jax.device_count()))} "
            "(--check_compile tells what it takes)"
        )
    )


@contextlib.contextmanager
def advised(advice: Callable[[], str]) -> Iterator[None]:
    """Turns a device's running out of memory into an `OutOfMemoryError` that ends in `advice`."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError, MemoryError) as error:
        # A ValueError where the host fetches what could not be computed.
        if isinstance(error, UserError) or not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")[:200].rstrip(". ")
        raise OutOfMemoryError(f"{reason}; {advice()}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of the runtime is about a device's main memory."""
    if isinstance(error, MemoryError):
        return True
    text = str(error).lower()
    # A kernel that needs more shared memory than a core has fails with the same name.
    return ("resource_exhausted" in text or "out of memory" in text) and "shared memory" not in text


def peak_bytes() -> int | None:
    """Peak bytes in use on the first device since the process began; None where it does not count them."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def copy_on_devices(tree: Any) -> Any:
    """A copy of a pytree of arrays on their devices; None where the peak use so far leaves no room for it."""
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    for device in jax.local_devices():
        stats = device.memory_stats()
        size = sum(shard.data.nbytes for shard in shards if shard.device == device)
        limit = (stats or {}).get("bytes_limit")
        if stats and (limit is None or stats.get("peak_bytes_in_use", limit) + size > limit):
            return None
    try:
        return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding, may_alias=False), tree)
    except jax.errors.JaxRuntimeError as error:
        if is_out_of_memory(error):  # enough room, but fragmented
            return None
        raise


def evaluation_advice(batch_size: int) -> str:
    """What saves memory in an evaluation of `batch_size` sequences at a time."""
    return f"{_smaller('batch_size', batch_size)}{MORE}"


def generation_advice(num_samples: int, max_new_tokens: int) -> str:
    """What saves memory in a generation of `num_samples` times `max_new_tokens` tokens."""
    return f"{_smaller('num_samples', num_samples)}a shorter prompt, {_smaller('max_new_tokens', max_new_tokens)}{MORE}"


def _smaller(flag: str, value: int) -> str:
    return f"a smaller --{flag} (now {value}), " if value > 1 else ""


def memory_savers(config: RunConfig, devices: int) -> list[str]:
    """The fields of `config` that can still be changed to save memory, cheapest first, each with its value."""
    model, train, length = config.model, config.train, config.data.sequence_length
    advice = []
    if model.memory == "auto":
        advice.append("model.memory = 'low' (now 'auto')")
    if train.micro_batch_size > 1:
        advice.append(
            f"a larger train.accumulation (now {train.accumulation}, {train.micro_batch_size} sequences at a time)"
        )
    if train.batch_size > 1:
        advice.append(f"a smaller train.batch_size (now {train.batch_size})")
    if devices > 1 and config.mesh.fsdp == 1:
        advice.append(f"mesh.fsdp = {devices} (now 1)")
    advice.append(f"a smaller data.sequence_length (now {length})")
    return advice
