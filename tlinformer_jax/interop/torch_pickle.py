"""Reads the structure that `torch.save` pickles, without unpickling: no name is looked up and nothing is called.

A pickle is a program for a stack machine. `pickletools.genops` only splits it into instructions; `read_structure` obeys
those that build plain containers, and knows four names (three functions of torch and OrderedDict) as mere symbols that
it interprets itself. Every other name or instruction is refused where it stands, before anything that follows it.
"""

import dataclasses
import pickletools
from collections.abc import Iterable
from typing import Any

import numpy as np

from tlinformer_jax.errors import DataError

# What PyTorch's storages hold, by class name; bfloat16 is ml_dtypes', which JAX brings.
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
ORDERED_DICT = "collections OrderedDict"
TENSOR = "torch._utils _rebuild_tensor_v2"
PARAMETER = "torch._utils _rebuild_parameter"
SIZE = "torch Size"
SYMBOLS = {ORDERED_DICT, TENSOR, PARAMETER, SIZE, *(f"torch {name}" for name in STORAGES)}

EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
IGNORED = {"PROTO", "FRAME"}


class Refused(Exception):
    """The pickle is damaged, or holds what is not part of a checkpoint of tensors; the message says what."""


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A name that the pickle refers to, as "module name"; it stands for itself."""

    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A flat array in a file of its own: its key, the name of its dtype, its number of elements."""

    key: str
    dtype: str
    elements: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage, offset and strides counted in elements; checked to lie inside it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_structure(data: bytes, source: str) -> Any:
    """What a checkpoint's `data.pkl` describes: dicts, lists, tuples, numbers, strings and `Tensor`s.

    Args:
      data: the pickle.
      source: names the file in messages.

    Raises:
      DataError: for a damaged pickle, and for one that names or does anything that tensors do not need.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "STOP":
                (result,) = machine.stack
                return result
            machine.obey(opcode.name, argument)
    except Refused as error:
        raise DataError(f"{source}: refused, {error}; nothing of it was executed") from None
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise DataError(f"{source}: its pickle is damaged ({type(error).__name__}: {error})") from None
    raise DataError(f"{source}: its pickle is damaged (it does not end)")


class _Machine:
    """The stack machine, with only such instructions as build plain values."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._marked: list[list[Any]] = []  # the stacks below each open mark
        self._memo: dict[int, Any] = {}

    def obey(self, name: str, argument: Any) -> None:
        """Executes one instruction; raises what a damaged program leads to, or `Refused`."""
        if name in LITERALS:
            self.stack.append(argument)
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in TUPLES:
            self.stack.append(self._pop(TUPLES[name]))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self.stack[-1]
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[argument])
        elif name == "MARK":
            self._marked.append(self.stack)
            self.stack = []
        elif name not in IGNORED:
            handler = getattr(self, f"_do_{name.lower()}", None)
            if handler is None:
                raise Refused(f"its pickle has the instruction {name}, which no checkpoint of tensors needs")
            handler(argument)

    def _pop(self, count: int) -> tuple[Any, ...]:
        if len(self.stack) < count:
            raise IndexError("stack too short")
        taken = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return taken

    def _since_mark(self) -> list[Any]:
        taken, self.stack = self.stack, self._marked.pop()
        return taken

    def _do_tuple(self, _: None) -> None:
        taken = tuple(self._since_mark())
        self.stack.append(taken)

    def _do_append(self, _: None) -> None:
        (item,) = self._pop(1)
        _container(self.stack[-1], list).append(item)

    def _do_appends(self, _: None) -> None:
        items = self._since_mark()
        _container(self.stack[-1], list).extend(items)

    def _do_setitem(self, _: None) -> None:
        pair = self._pop(2)
        _container(self.stack[-1], dict).update(_entries([pair]))

    def _do_setitems(self, _: None) -> None:
        items = self._since_mark()
        _container(self.stack[-1], dict).update(_entries(zip(items[::2], items[1::2], strict=True)))

    def _do_global(self, argument: str) -> None:
        if argument not in SYMBOLS:
            # Escaped: a stranger's text goes to a terminal.
            raise Refused(f"its pickle refers to {argument.replace(' ', '.')!a}, which is not part of a tensor")
        self.stack.append(Symbol(argument))

    def _do_stack_global(self, _: None) -> None:
        module, name = self._pop(2)
        self._do_global(f"{module} {name}")

    def _do_binpersid(self, _: None) -> None:
        ((kind, storage, key, _location, elements),) = self._pop(1)
        dtype = STORAGES.get(storage.name.removeprefix("torch ")) if isinstance(storage, Symbol) else None
        if kind != "storage" or dtype is None or not isinstance(key, str):
            raise Refused("its pickle refers to something outside that is no storage of a tensor")
        self.stack.append(Storage(key, dtype, _count(elements)))

    def _do_build(self, _: None) -> None:
        """Takes off the attributes that a state_dict carries (versions of its modules); they are not kept."""
        self._pop(1)
        _container(self.stack[-1], dict)

    def _do_reduce(self, _: None) -> None:
        function, arguments = self._pop(2)
        if not isinstance(function, Symbol) or not isinstance(arguments, tuple):
            raise Refused("its pickle calls something that is no function of a tensor")
        self.stack.append(_interpret(function.name, arguments))


def _interpret(name: str, arguments: tuple[Any, ...]) -> Any:
    """What the function that a symbol stands for would make of its arguments."""
    if name == ORDERED_DICT:
        return _entries(*arguments) if arguments else {}
    if name == PARAMETER:
        return _container(arguments[0], Tensor)
    if name == SIZE:
        return tuple(map(_count, arguments[0]))
    if name != TENSOR:
        raise Refused(f"its pickle calls {name.replace(' ', '.')}, which is no function of a tensor")
    storage, offset, shape, strides = arguments[:4]
    shape, strides = tuple(map(_count, shape)), tuple(map(_count, strides))
    tensor = Tensor(_container(storage, Storage), _count(offset), shape, strides)
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and tensor.offset + last >= tensor.storage.elements:
        raise ValueError("a tensor reaches past its storage")
    return tensor


def _entries(pairs: Iterable[Any]) -> dict[Any, Any]:
    """A dict; only texts and numbers may be keys, as hashing deeply nested tuples would end the interpreter."""
    entries = {}
    for key, value in pairs:
        if not isinstance(key, str | int):
            raise TypeError(f"a key is a {type(key).__name__}")
        entries[key] = value
    return entries


def _container(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{kind.__name__} expected, {type(value).__name__} found")
    return value


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value


def view(tensor: Tensor, storage: np.ndarray) -> np.ndarray:
    """The tensor as an array on its storage's elements, [elements]; not a copy.

    Raises:
      ValueError, OverflowError: for sizes that no array can have.
    """
    flat = storage[tensor.offset :]
    if 0 in tensor.shape:
        return np.zeros(tensor.shape, storage.dtype)
    strides = tuple(stride * storage.itemsize for stride in tensor.strides)
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
