"""Reads what a compiled program sends between devices from its HLO text: `collectives(compiled.as_text())`.

A collective in the body of a loop counts once per iteration. On the CPU and on GPUs XLA states the number of
iterations; on TPUs it is computed from the loop's counter. All branches of a conditional are listed. What a custom
kernel sends by itself is not in the text.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Iterator

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
    "send",
)
# Operations that do not change a loop counter, and operations that run another computation on their operands.
SAME_VALUE = ("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "opt-barrier")
CALLS = ("fusion", "call")
MOST_TURNS = 2**16


@dataclasses.dataclass(frozen=True)
class Shape:
    """Dtype in HLO's notation ('bf16') and dimensions of an array on one device."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size without padding."""
        width = 8 if self.dtype == "pred" else int((re.findall(r"\d+", self.dtype) or ["0"])[0])
        return -(-math.prod(self.dims) * width // 8)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation from the view of one device.

    Attributes:
      kind: one of `KINDS`; asynchronous forms have the same name.
      operands: arrays that this device sends.
      results: arrays that it receives.
      trips: how often the operation runs in one run of the program.
      name: name of the instruction.
      op_name: XLA's name of the traced operation that it comes from.
      known_trips: whether the text tells the number of iterations of all loops around it; unknown loops count once.
    """

    kind: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    trips: int
    name: str
    op_name: str = ""
    known_trips: bool = True

    @property
    def bytes(self) -> int:
        """Bytes of one run: the larger of the operands and the results."""
        return max(sum(shape.bytes for shape in shapes) for shapes in (self.operands, self.results))

    @property
    def total_bytes(self) -> int:
        """Bytes of all its runs."""
        return self.bytes * self.trips


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO: name, result shapes, operation, names of the operands, and the rest of the line."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def computations(self, *attributes: str) -> tuple[str, ...]:
        """Returns the names of the computations in the given attributes."""
        text = re.sub(r'"(?:[^"\\]|\\.)*"', '""', self.attributes)
        found = [re.search(rf"\b{attribute}=(\{{[^}}]*\}}|[^\s,]+)", text) for attribute in attributes]
        return tuple(name for match in found if match for name in re.findall(r"[\w.\-]+", match[1]))


@dataclasses.dataclass
class Computation:
    """Instructions by name, in order, and the name of the root."""

    instructions: dict[str, Instruction]
    root: str = ""


Module = dict[str, Computation]


# The known part of a value before the program runs: an integer, the parts of a tuple, or None.
Value = int | tuple["Value", ...] | None
Known = Callable[[str], Value]  # by an instruction's name


def collectives(hlo_text: str) -> tuple[Collective, ...]:
    """Returns the collectives of a compiled program, in the order of the text from the entry on.

    Args:
      hlo_text: `jax.jit(...).lower(...).compile().as_text()`.

    Raises:
      ValueError: if the text has no entry computation.
    """
    module, entry = parse(hlo_text)
    return tuple(_walk(module, module[entry], lambda _: None, 1, True, set()))


def parse(hlo_text: str) -> tuple[Module, str]:
    """Returns the computations by name, and the name of the entry.

    Raises:
      ValueError: if there is no entry.
    """
    module: Module = {}
    entry, current = "", Computation({})
    for line in hlo_text.splitlines():
        if not line[:1].isspace():
            if header := re.match(r"(ENTRY\s+)?%?([\w.\-]+)\s*\(.*\{\s*$", line):
                current = module[header[2]] = Computation({})
                entry = header[2] if header[1] else entry
        elif instruction := _instruction(line):
            current.instructions[instruction.name] = instruction
            if line.lstrip().startswith("ROOT "):
                current.root = instruction.name
    if not entry:
        raise ValueError("collectives: the text has no ENTRY computation; it must be that of a compiled program")
    return module, entry


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(?:ROOT\s+)?%?([\w.\-]+)\s*=\s*(.*)", re.sub(r"/\*.*?\*/", "", line))
    if not match:
        return None
    name, rest = match.groups()
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    call = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if not call:
        return None
    start = end + call.end() - 1
    close = _closing(rest, start)
    operands = tuple(part.split()[-1].lstrip("%") for part in _split(rest[start + 1 : close]))
    return Instruction(name, _shapes(rest[:end]), call[1], operands, rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Returns the position where the bracket that opens at `start` closes; the end if it does not."""
    depth = 0
    for match in re.compile(r"[(){}\[\]]").finditer(text, start):
        depth += 1 if match[0] in "({[" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _split(text: str) -> list[str]:
    """Returns the nonempty parts between the commas outside of all brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def _shapes(text: str) -> tuple[Shape, ...]:
    """Returns the arrays of a type, with nested tuples flattened."""
    found = re.findall(r"([a-z]\w*)\[([\d,<= ]*)\]", text)
    return tuple(Shape(dtype, tuple(int(size) for size in re.findall(r"\d+", dims))) for dtype, dims in found)


def _walk(
    module: Module,
    computation: Computation,
    argument: Callable[[int], Value],
    trips: int,
    certain: bool,
    chains: set[tuple[str, str]],
) -> Iterator[Collective]:
    """Yields the collectives of a computation and of those that it runs, each with its number of runs.

    Args:
      argument: known value of the computation's arguments, the same in all of its runs.
      trips: how often the computation runs.
      certain: whether `trips` is certain.
      chains: (kind, channel, chain) of collectives that a TPU runs in several fusions and that are already listed.
    """
    known = _known(module, computation, argument)
    for item in computation.instructions.values():
        kind = item.opcode.removesuffix("-start")
        if kind in KINDS and "is_host_transfer=true" not in item.attributes:
            if _first_of_chain(item, kind, chains):
                yield _collective(computation, item, kind, trips, certain)
        elif item.opcode == "while":
            turns, state = _loop(module, item, known(item.operands[0]))
            sure, turns = certain and turns is not None, 1 if turns is None else turns
            for role, times in (("body", turns), ("condition", turns + 1)):
                for name in item.computations(role):
                    yield from _walk(module, module[name], lambda _, state=state: state, trips * times, sure, set())
        elif item.opcode not in ("async-update", "async-done"):
            called = ("calls", "called_computations", "branch_computations", "true_computation", "false_computation")
            for name in item.computations(*called, *(("to_apply",) if item.opcode == "call" else ())):
                inner = chains if item.opcode == "fusion" else set()
                operands = _operands(item, known) if item.opcode in CALLS else lambda _: None
                yield from _walk(module, module[name], operands, trips, certain, inner)


def _first_of_chain(item: Instruction, kind: str, chains: set[tuple[str, str]]) -> bool:
    """Returns whether this is not a later part of a collective that is already listed.

    A TPU's compiler splits a collective into fusions that start, continue and end it, each with a copy of the
    instruction.
    """
    chain = re.search(r'chain_id="?(\w+)', item.attributes)
    if not chain:
        return True
    channel = re.search(r"channel_id=(\d+)", item.attributes)
    key = (kind, f"{channel[1] if channel else ''}/{chain[1]}")
    first = key not in chains
    chains.add(key)
    return first


def _collective(computation: Computation, item: Instruction, kind: str, trips: int, known: bool) -> Collective:
    names = item.operands[:1] if kind == "send" else item.operands  # its second operand is a token
    operands = tuple(shape for name in names for shape in computation.instructions[name].shapes)
    results = operands if kind == "send" else item.shapes
    if item.opcode == f"{kind}-start":  # its own result also contains operands and counters
        done = (other for other in computation.instructions.values() if other.opcode == f"{kind}-done")
        results = next((other.shapes for other in done if other.operands[:1] == (item.name,)), results)
    op_name = re.search(r'op_name="([^"]*)"', item.attributes)
    return Collective(kind, operands, results, trips, item.name, op_name[1] if op_name else "", known)


def _loop(module: Module, loop: Instruction, state: Value) -> tuple[int | None, Value]:
    """Returns how often a loop's body runs, None if unknown, and the part of the loop's state that it does not change.

    The number comes from XLA, or else from simulating the loop with the known part of its state, such as its counter.
    If XLA states the number, only the first iteration is simulated.
    """
    stated = re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes)
    body, condition = (module[loop.computations(role)[0]] for role in ("body", "condition"))
    turn = _result(module, body, lambda _: state)
    constant = _common(state, turn)
    if stated:
        return int(stated[1]), constant
    for turns in range(MOST_TURNS):
        goes_on = _result(module, condition, lambda _, state=state: state)
        if not isinstance(goes_on, int) or not goes_on:
            return turns if goes_on == 0 else None, constant
        state = _result(module, body, lambda _, state=state: state)
        constant = _common(constant, state)
    return None, constant


def _common(one: Value, other: Value) -> Value:
    """Returns what two values agree in."""
    if isinstance(one, tuple) and isinstance(other, tuple):
        return tuple(map(_common, one, other))
    return one if one == other else None


def _result(module: Module, computation: Computation, argument: Callable[[int], Value]) -> Value:
    """Returns what is known of a computation's result."""
    return _known(module, computation, argument)(computation.root)


def _operands(item: Instruction, known: Known) -> Callable[[int], Value]:
    """Returns a function that looks up what is known of an operand by its number, only when it is called."""
    return lambda number: known(item.operands[number])


def _known(module: Module, computation: Computation, argument: Callable[[int], Value]) -> Known:
    """Returns what is known of a computation's values, from its constants and the known part of its arguments."""

    @functools.cache
    def known(name: str) -> Value:
        item = computation.instructions.get(name)
        if item is None:
            return None
        if item.opcode == "constant":
            return int(item.operands[0]) if re.fullmatch(r"-?\d+", "".join(item.operands)) else None
        if item.opcode == "parameter":
            return argument(int(item.operands[0]))
        if item.opcode in SAME_VALUE:
            return known(item.operands[0])
        if item.opcode == "tuple":
            return tuple(map(known, item.operands))
        if item.opcode == "get-tuple-element":
            whole, index = known(item.operands[0]), int(re.findall(r"index=(\d+)", item.attributes)[0])
            return whole[index] if isinstance(whole, tuple) else None
        if item.opcode in CALLS:
            called = module[item.computations("calls", "to_apply")[0]]
            return _result(module, called, _operands(item, known))
        if item.opcode == "while":
            return _loop(module, item, known(item.operands[0]))[1]
        if item.opcode in ("add", "subtract", "compare"):
            left, right = map(known, item.operands)
            direction = (re.findall(r"direction=(\w+)", item.attributes) or [item.opcode])[0].lower()
            compute = getattr(operator, {"subtract": "sub"}.get(direction, direction))
            return int(compute(left, right)) if isinstance(left, int) and isinstance(right, int) else None
        return None

    return known
