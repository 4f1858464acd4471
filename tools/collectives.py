"""What a compiled program sends between devices, read from its HLO text: `collectives(compiled.as_text())`.

A collective in the body of a loop counts as often as the loop turns; on the CPU and on GPUs XLA says how often that is,
on TPUs it is worked out from the loop's counter. Of a conditional every branch is listed. What a custom kernel sends
by itself is not in the text.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

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
# Operations that hand their operand on unchanged, as far as a loop's counter is concerned.
SAME_VALUE = ("copy", "copy-start", "copy-done", "bitcast", "convert", "reshape", "opt-barrier")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of an array on one device: its dtype as HLO names it ('bf16'), and its dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size without padding."""
        width = 8 if self.dtype == "pred" else int((re.findall(r"\d+", self.dtype) or ["0"])[0])
        return -(-math.prod(self.dims) * width // 8)


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation, as one device takes part in it.

    Attributes:
      kind: one of `KINDS`; asynchronous forms go by the same name.
      operands: what this device gives.
      results: what it gets.
      trips: how often it runs in one run of the program.
      name: of the instruction.
      op_name: which operation of the traced program it comes from, as XLA knows it.
      known_trips: whether all loops around it have a number of turns that the text tells; others count once.
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
        """Of one run: the larger of what goes in and what comes out."""
        return max(sum(shape.bytes for shape in shapes) for shapes in (self.operands, self.results))

    @property
    def total_bytes(self) -> int:
        """Of all its runs."""
        return self.bytes * self.trips


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of HLO: its name, result shapes, operation, names of the operands, and the rest of the line."""

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def computations(self, *attributes: str) -> tuple[str, ...]:
        """Names of the computations that the given attributes refer to."""
        text = re.sub(r'"(?:[^"\\]|\\.)*"', '""', self.attributes)
        found = [re.search(rf"\b{attribute}=(\{{[^}}]*\}}|[^\s,]+)", text) for attribute in attributes]
        return tuple(name for match in found if match for name in re.findall(r"[\w.\-]+", match[1]))


@dataclasses.dataclass
class Computation:
    """Instructions by name, in order, with the name of the root."""

    instructions: dict[str, Instruction]
    root: str = ""


Module = dict[str, Computation]


@dataclasses.dataclass(frozen=True)
class Frame:
    """A computation at one place where it is run; `caller` runs it by `site`, None at the entry."""

    computation: Computation
    caller: "Frame | None" = None
    site: Instruction | None = None


def collectives(hlo_text: str) -> tuple[Collective, ...]:
    """The collectives of a compiled program, in the order of the text from the entry on.

    Args:
      hlo_text: `jax.jit(...).lower(...).compile().as_text()`.

    Raises:
      ValueError: if the text has no entry computation.
    """
    module, entry = parse(hlo_text)
    return tuple(_walk(module, Frame(module[entry]), 1, True, set()))


def parse(hlo_text: str) -> tuple[Module, str]:
    """The computations by name, and the name of the entry.

    Raises:
      ValueError: if there is none.
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
    """Where the bracket that opens at `start` is closed; the end where it is not."""
    depth = 0
    for match in re.compile(r"[(){}\[\]]").finditer(text, start):
        depth += 1 if match[0] in "({[" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _split(text: str) -> list[str]:
    """The parts between commas outside of all brackets; empty ones left out."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "({[") - (character in ")}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def _shapes(text: str) -> tuple[Shape, ...]:
    """The arrays of a type, those of nested tuples in a row."""
    found = re.findall(r"([a-z]\w*)\[([\d,<= ]*)\]", text)
    return tuple(Shape(dtype, tuple(int(size) for size in re.findall(r"\d+", dims))) for dtype, dims in found)


def _walk(module: Module, frame: Frame, trips: int, known: bool, chains: set[tuple[str, str]]) -> Iterator[Collective]:
    """Collectives of a computation and of those that it runs, each with its number of runs.

    Args:
      trips: how often the computation runs.
      known: whether that is certain.
      chains: of collectives that a TPU runs in several fusions, those already listed: (kind, channel and chain).
    """
    for item in frame.computation.instructions.values():
        kind = item.opcode.removesuffix("-start")
        if kind in KINDS and "is_host_transfer=true" not in item.attributes:
            if _first_of_chain(item, kind, chains):
                yield _collective(frame.computation, item, kind, trips, known)
        elif item.opcode == "while":
            turns = _turns(module, frame, item)
            certain, turns = known and turns is not None, 1 if turns is None else turns
            for role, times in (("body", turns), ("condition", turns + 1)):
                for name in item.computations(role):
                    yield from _walk(module, Frame(module[name], frame, item), trips * times, certain, set())
        elif item.opcode not in ("async-update", "async-done"):
            called = ("calls", "called_computations", "branch_computations", "true_computation", "false_computation")
            for name in item.computations(*called, *(("to_apply",) if item.opcode == "call" else ())):
                inner = chains if item.opcode == "fusion" else set()
                yield from _walk(module, Frame(module[name], frame, item), trips, known, inner)


def _first_of_chain(item: Instruction, kind: str, chains: set[tuple[str, str]]) -> bool:
    """Whether this is not a later part of a collective that was listed before.

    A TPU's compiler spreads a collective over fusions that start it, carry it on and end it, each with a copy of the
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
    names = item.operands[:1] if kind == "send" else item.operands  # its second is a token
    operands = tuple(shape for name in names for shape in computation.instructions[name].shapes)
    results = operands if kind == "send" else item.shapes
    if item.opcode == f"{kind}-start":  # its own result holds operands and counters besides
        done = (other for other in computation.instructions.values() if other.opcode == f"{kind}-done")
        results = next((other.shapes for other in done if other.operands[:1] == (item.name,)), results)
    op_name = re.search(r'op_name="([^"]*)"', item.attributes)
    return Collective(kind, operands, results, trips, item.name, op_name[1] if op_name else "", known)


def _turns(module: Module, frame: Frame, loop: Instruction) -> int | None:
    """How often a loop's body runs; None where neither XLA nor the loop's counter tells."""
    told = re.search(r"known_trip_count\W+n\W+(\d+)", loop.attributes)
    if told:
        return int(told[1])
    condition = Frame(module[loop.computations("condition")[0]], frame, loop)
    test = _resolved(module, condition, condition.computation.root)
    if test is None or test[1].opcode != "compare":
        return None
    place, compare = test
    left, right = compare.operands
    order = (re.findall(r"direction=(\w+)", compare.attributes) or [""])[0]
    counter = _element(module, place, left, loop)
    if counter is None:
        left, right = right, left
        order = {"GT": "LT", "GE": "LE", "LT": "GT", "LE": "GE"}.get(order, order)
        counter = _element(module, place, left, loop)
    if counter is None or order not in ("LT", "LE", "GT", "GE", "NE"):
        return None
    bound = _constant(module, place, right)
    first = _constant(module, frame, _initial_name(frame, loop, counter))
    step = _step(module, frame, loop, counter)
    if bound is None or first is None or not step:
        return None
    distance = (bound - first if step > 0 else first - bound) + (order in ("LE", "GE"))
    return max(0, -(-distance // abs(step)))


def _resolved(module: Module, frame: Frame, name: str) -> tuple[Frame, Instruction] | None:
    """Where the value `name` is made, through copies, tuples, fusions and the computation's own arguments.

    A value that a loop carries is followed outwards if the body leaves it as it is. The result is what no rule leads
    further: a constant, an addition, or an element that a loop changes (`get-tuple-element` of its parameter).
    """
    item = frame.computation.instructions.get(name)
    if item is None:
        return None
    if item.opcode in SAME_VALUE:
        return _resolved(module, frame, item.operands[0])
    if item.opcode == "fusion":
        inner = Frame(module[item.computations("calls")[0]], frame, item)
        return _resolved(module, inner, inner.computation.root)
    if item.opcode == "parameter" and frame.caller and frame.site and frame.site.opcode in ("fusion", "call"):
        return _resolved(module, frame.caller, frame.site.operands[int(item.operands[0])])
    if item.opcode == "get-tuple-element":
        return _resolved_element(module, frame, item)
    return frame, item


def _resolved_element(module: Module, frame: Frame, item: Instruction) -> tuple[Frame, Instruction] | None:
    """`_resolved` of an element of a tuple."""
    source = _resolved(module, frame, item.operands[0])
    if source is None:
        return None
    place, whole = source
    index = _index(item)
    if whole.opcode == "tuple":
        return _resolved(module, place, whole.operands[index])
    if whole.opcode == "while" and _unchanged(module, whole, index):
        return _resolved(module, place, _initial_name(place, whole, index))
    loop = place.site
    if whole.opcode == "parameter" and loop and loop.opcode == "while" and place.caller:
        if _unchanged(module, loop, index):
            return _resolved(module, place.caller, _initial_name(place.caller, loop, index))
        return place, item
    return None


def _index(item: Instruction) -> int:
    match = re.search(r"index=(\d+)", item.attributes)
    return int(match[1]) if match else 0


def _constant(module: Module, frame: Frame, name: str) -> int | None:
    found = _resolved(module, frame, name)
    if found is None or found[1].opcode != "constant" or not re.fullmatch(r"-?\d+", found[1].operands[0]):
        return None
    return int(found[1].operands[0])


def _element(module: Module, frame: Frame, name: str, loop: Instruction) -> int | None:
    """Which element of the loop's state `name` is; None if it is another value, or one that the loop leaves."""
    found = _resolved(module, frame, name)
    if found is None or found[1].opcode != "get-tuple-element" or found[0].site is not loop:
        return None
    return _index(found[1])


def _initial_name(frame: Frame, loop: Instruction, index: int) -> str:
    """Name, in the loop's own computation, of the value that an element of its state starts with; '' if not known."""
    state = frame.computation.instructions[loop.operands[0]]
    while state.opcode in SAME_VALUE:
        state = frame.computation.instructions[state.operands[0]]
    return state.operands[index] if state.opcode == "tuple" else ""


def _next_name(body: Computation, index: int) -> str:
    """Name, in a loop's body, of what an element of its state becomes; '' if not known."""
    root = body.instructions[body.root]
    return root.operands[index] if root.opcode == "tuple" else ""


def _unchanged(module: Module, loop: Instruction, index: int) -> bool:
    """Whether the loop's body hands an element of the loop's state on as it got it."""
    body = module[loop.computations("body")[0]]
    item = body.instructions.get(_next_name(body, index))
    while item is not None and item.opcode in SAME_VALUE:
        item = body.instructions.get(item.operands[0])
    return (
        item is not None
        and item.opcode == "get-tuple-element"
        and _index(item) == index
        and body.instructions[item.operands[0]].opcode == "parameter"
    )


def _step(module: Module, frame: Frame, loop: Instruction, index: int) -> int | None:
    """What the body adds to an integer of the loop's state; None if it does anything else with it."""
    body = Frame(module[loop.computations("body")[0]], frame, loop)
    found = _resolved(module, body, _next_name(body.computation, index))
    if found is None or found[1].opcode not in ("add", "subtract"):
        return None
    place, change = found
    left, right = change.operands
    if _element(module, place, left, loop) == index:
        amount = _constant(module, place, right)
        return -amount if amount is not None and change.opcode == "subtract" else amount
    if change.opcode == "add" and _element(module, place, right, loop) == index:
        return _constant(module, place, left)
    return None
