"""Files as `torch.save` writes them, without PyTorch: the zip by hand, the pickle by Python's own pickler."""

import collections
import contextlib
import io
import pathlib
import pickle
import sys
import types
import zipfile
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
}


class Storage:
    """What a pickler is to write as a reference to a record of the zip."""

    def __init__(self, array: np.ndarray, key: str) -> None:
        self.array, self.key = array, key


class Tensor:
    """Pickles as PyTorch's tensors do."""

    def __init__(self, storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.parts = storage, offset, shape, strides

    def __reduce_ex__(self, protocol):
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
        return rebuild, (*self.parts, False, collections.OrderedDict())


def tensors(arrays: Mapping[str, np.ndarray]) -> "collections.OrderedDict[str, Tensor]":
    """A state_dict, each array in a storage of its own, with the attribute `_metadata` that PyTorch's have."""
    result = collections.OrderedDict()
    for number, (name, array) in enumerate(arrays.items()):
        strides = tuple(stride // array.itemsize for stride in array.strides)
        storage = Storage(np.ascontiguousarray(array).reshape(-1), str(number))
        assert array.flags.c_contiguous
        result[name] = Tensor(storage, 0, array.shape, strides)
    result._metadata = collections.OrderedDict({"": {"version": 1}})
    return result


def save(path: pathlib.Path, structure, protocol: int = 2, compression: int = zipfile.ZIP_STORED, **records) -> None:
    """Writes `structure`, whatever Python can pickle, with the storages of its `Tensor`s."""
    storages: dict[str, np.ndarray] = {}
    with fake_torch() as storage_types:

        class Pickler(pickle.Pickler):
            def persistent_id(self, value):
                if not isinstance(value, Storage):
                    return None
                storages[value.key] = value.array
                return "storage", storage_types[value.array.dtype.name], value.key, "cpu", value.array.size

        buffer = io.BytesIO()
        Pickler(buffer, protocol).dump(structure)
    write(path, buffer.getvalue(), storages, compression, **records)


def write(
    path: pathlib.Path,
    data: bytes,
    storages: Mapping[str, np.ndarray],
    compression: int = zipfile.ZIP_STORED,
    byteorder: bytes = b"little",
) -> None:
    """Writes the zip of a given pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", byteorder)
        for key, array in storages.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", b"3\n")


@contextlib.contextmanager
def fake_torch() -> Iterator[dict[str, type]]:
    """Modules `torch` and `torch._utils` that the pickler finds its names in; gives the storages' types by dtype."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    kinds = {}
    for dtype, name in STORAGES.items():
        kinds[np.dtype(getattr(ml_dtypes, dtype, dtype)).name] = type(name, (), {"__module__": "torch"})
        setattr(torch, name, kinds[dtype])

    def _rebuild_tensor_v2(*arguments):
        raise AssertionError("only named, never called")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    kept = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules |= {"torch": torch, "torch._utils": utils}
    try:
        yield kinds
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
