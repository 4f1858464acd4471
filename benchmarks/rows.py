"""Measures one row of the inference benchmark: all parts at one length on one cache, and the memory they took."""

import dataclasses
import functools
import gc
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import limits, parts
from benchmarks.limits import Ceilings
from benchmarks.session import Session
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.decoding.memory import tree_bytes
from tlinformer_jax.errors import first_line
from tlinformer_jax.training.device_memory import is_out_of_memory, peak_bytes

# In the order in which they are measured.
PARTS = ("figure9", "prefill", "windows", "sustained", "slide", "longest")
WINDOWED_ONLY = ("slide",)

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to measure, and for how long.

    Attributes:
      lengths: (tokens of a prompt N, sequences), measured in this order; ascending, because the device's peak memory is
        that of the whole process.
      longest: prompt lengths of the part 'longest', ascending.
      parts: names out of PARTS.
      windows: number of generation windows in the part 'windows'.
      seconds: budget of each measurement, without compilation.
      max_uncached_length: longest prompt for which a token without a cache is timed.
      max_quadratic_prefill: longest prompt for architectures with a quadratic prefill, such as 'transformer'; for
        longer ones the cache is filled with random rows, and Figure 9's protocol and 'prefill' are left out.
      seed: seed of the prompts.
      cache_dtype: see `sampling.GenerationConfig`.
    """

    lengths: tuple[tuple[int, int], ...]
    longest: tuple[int, ...]
    parts: tuple[str, ...]
    windows: int
    seconds: float
    max_uncached_length: int
    max_quadratic_prefill: int
    seed: int
    cache_dtype: str = "auto"


class Memory:
    """The peak of the device's memory, which can only rise while a process runs."""

    def __init__(self, decoder: Decoder) -> None:
        self._before, self._weights = peak_bytes(), tree_bytes(decoder.params)

    def figures(self) -> Row:
        """Returns the peak in bytes; `exact` if it rose since this object was made, else it is only a bound."""
        peak = peak_bytes()
        source = "memory_stats" if peak is not None else "live_arrays"
        value = tree_bytes(jax.live_arrays()) if peak is None else peak
        return {
            "source": source,
            "peak_bytes": value,
            "weights_bytes": self._weights,
            "peak_above_weights_bytes": value - self._weights,
            "exact": peak is not None and peak > (self._before or 0),
        }


def measure_row(
    plan: Plan, decoder: Decoder, length: int, batch: int, ceilings: Ceilings, report: Callable[[Row], None]
) -> Row:
    """Measures the plan's parts at one length.

    Args:
      report: called with the row after each part.

    Returns:
      the row; if memory ran out, it has the figures measured until then and 'error'.
    """
    config = decoder.config
    row: Row = {
        "architecture": config.architecture,
        "length": length,
        "batch": batch,
        "devices": decoder.devices,
        "equation_7_bytes": limits.equation_7(config, batch, length, plan.cache_dtype),
        "elapsed_seconds": {},
    }
    memory = Memory(decoder)
    current = "cache"
    try:
        session = new_session(plan, decoder, length, batch)
        row |= {"cache_bytes": session.cache_bytes, "capacity": session.cache.capacity}
        for current in _parts_of(plan, session):
            started = time.perf_counter()
            _measure_part(current, plan, session, row, ceilings)
            row["memory"] = memory.figures()
            row["elapsed_seconds"][current] = time.perf_counter() - started
            report(row)
        _release(session)
        current = "uncached"
        # The uncached forward pass runs on one device; a baseline's cost is quadratic, as in its prefill.
        alone = batch == 1 and decoder.mesh is None and can_prefill(plan, session)
        if "figure9" in plan.parts and alone and length <= plan.max_uncached_length:
            started = time.perf_counter()
            row["uncached"] = parts.uncached(session, plan.seconds)
            row["elapsed_seconds"]["uncached"] = time.perf_counter() - started
            report(row)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        row["error"] = _out_of_memory(error, current)
        report(row)
    session = None  # type: ignore[assignment]
    gc.collect()
    return row


def measure_longest(plan: Plan, decoder: Decoder, report: Callable[[Row], None]) -> list[Row]:
    """Tries prompts of growing length, each with a whole generation window after it, until one does not fit.

    Args:
      report: called with each row.

    Returns:
      one row for each try; the last may have fits: False.
    """
    rows = []
    for length in plan.longest:
        row: Row = {"architecture": decoder.config.architecture, "length": length}
        memory = Memory(decoder)
        try:
            session = Session(decoder, 1, length, decoder.config.generation_window, plan.seed, plan.cache_dtype)
            row |= parts.longest(session, functools.partial(fill, plan, session))
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            row |= {"fits": False, "error": _out_of_memory(error, "longest")}
        row["memory"] = memory.figures()
        session = None  # type: ignore[assignment]
        gc.collect()
        rows.append(row)
        report(row)
        if not row["fits"]:
            break
    return rows


def _parts_of(plan: Plan, session: Session) -> list[str]:
    """Returns the parts that this row can have, in order."""
    names = [name for name in PARTS if name in plan.parts and name != "longest"]
    if not session.config.windowed:
        names = [name for name in names if name not in WINDOWED_ONLY]
    if session.batch > 1:
        names = [name for name in names if name != "figure9"]
    if not can_prefill(plan, session):
        names = [name for name in names if name not in ("figure9", "prefill")]
    return names


def new_session(plan: Plan, decoder: Decoder, length: int, batch: int) -> Session:
    """Returns a session with room for all parts."""
    room = (plan.windows + 2) * decoder.config.generation_window
    return Session(decoder, batch, length, room, plan.seed, plan.cache_dtype)


def fill(plan: Plan, session: Session) -> str:
    """Gives the session's sequences their prompts; returns 'prefill', or 'random' if a prefill takes too long."""
    if can_prefill(plan, session):
        jax.block_until_ready(session.fill(session.prompts()))
        return "prefill"
    session.fill_randomly(plan.seed)
    return "random"


def enter_window(session: Session) -> None:
    """Moves a session that was just filled to the beginning of the generation window of position N."""
    if session.must_slide:
        session.slide()
    session.rewind(session.history, session.overlap)


def can_prefill(plan: Plan, session: Session) -> bool:
    """Returns whether a prefill of the session's length is affordable."""
    quadratic = session.config.grows and not session.config.windowed
    return not quadratic or session.length <= plan.max_quadratic_prefill


def _measure_part(name: str, plan: Plan, session: Session, row: Row, ceilings: Ceilings) -> None:
    """Moves the session to the start of a part, measures it, and adds its figures to the row."""
    weights, budget = limits.weights_of(session.decoder.params), plan.seconds
    if name == "figure9":
        row[name] = parts.figure9(session, budget)
        return
    if name == "prefill":
        row[name] = parts.prefill(session, weights, ceilings, budget)
        return
    row["filled"] = fill(plan, session)
    if name == "windows":
        row[name] = parts.windows(session, plan.windows, weights, ceilings, budget)
        return
    enter_window(session)
    row["used_bytes"] = parts.used_bytes(session)
    row[name] = getattr(parts, name)(session, weights, ceilings, budget)


def _release(session: Session) -> None:
    """Frees the memory of the cache."""
    for array in jax.tree.leaves(session.cache):
        array.delete()


def _out_of_memory(error: Exception, part: str) -> str:
    """Returns a line about a lack of host or device memory; raises any other error again."""
    if not is_out_of_memory(error):
        raise error
    return f"out of memory in part {part!r}: {first_line(error)[:200]}"
