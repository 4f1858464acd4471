"""Files of weights, by name of each array: `.pt` of `torch.save` (read only) and `.safetensors`.

Reading executes nothing of a file: `.pt` is taken apart by `torch_pickle`, safetensors has nothing to execute.
"""

import importlib
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.interop.torch_pickle import Storage, Tensor, read_structure, view

SAFETENSORS = ".safetensors"
TORCH = (".pt", ".pth")
# Where a training script's checkpoint keeps the model beside its optimiser, and what wrappers put before every name.
MODEL_KEYS = ("model_state_dict", "state_dict", "model")
WRAPPERS = ("module.", "_orig_mod.")


def read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a file under their names, in the file's own dtypes; prefixes of wrappers are taken off.

    Raises:
      DataError: if the file cannot be read, is damaged, or holds anything but tensors; the message says which.
      ConfigError: if the package safetensors is missing.
    """
    if path.suffix not in (SAFETENSORS, *TORCH):
        raise DataError(f"{path}: must end in {SAFETENSORS}, {' or '.join(TORCH)}")
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    arrays = _read_safetensors(path) if path.suffix == SAFETENSORS else _read_torch(path)
    for prefix in WRAPPERS:
        if arrays and all(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    return arrays


def write_safetensors(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a file that is complete as soon as it has its name.

    Raises:
      DataError: if it exists or cannot be written.
      ConfigError: if the package safetensors is missing.
    """
    numpy = _safetensors()
    if path.exists():
        raise DataError(f"{path}: exists; name a new file")
    if not path.parent.is_dir():
        raise DataError(f"{path}: cannot be written; there is no directory {path.parent}")
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        # "pt": matrices are [out, in], as readers for PyTorch expect them.
        numpy.save_file(dict(arrays), draft, metadata={"format": "pt"})
        draft.replace(path)
    except Exception as error:  # safetensors wraps the operating system's errors in one of its own
        raise DataError(f"{path}: cannot be written ({error})") from None
    finally:
        draft.unlink(missing_ok=True)


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError:
        raise ConfigError(
            "weights", SAFETENSORS, "needs the package safetensors: pip install 'tlinformer-jax[convert]'"
        ) from None


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    import ml_dtypes  # noqa: F401  (gives NumPy the name bfloat16)

    numpy = _safetensors()
    try:
        return numpy.load_file(path)
    except Exception as error:  # the package's own class derives from Exception alone
        raise DataError(f"{path}: not a sound safetensors file ({error})") from None


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive, path)
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path}: not a sound zip archive, as torch.save writes since version 1.6 ({error})") from None


def _read_archive(archive: zipfile.ZipFile, path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of the archive's state_dict; a record that is not one of them is not read."""
    names = [name for name in archive.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(names) != 1:
        raise DataError(f"{path}: must hold one data.pkl, as torch.save writes; it holds {len(names)}")
    folder = names[0].removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and _record(archive, f"{folder}byteorder", path) != b"little":
        raise DataError(f"{path}: its byte order must be little")
    tensors = _state_dict(read_structure(_record(archive, names[0], path), str(path)), path)
    storages: dict[Storage, np.ndarray] = {}
    for tensor in tensors.values():
        if tensor.storage not in storages:
            storages[tensor.storage] = _storage(archive, f"{folder}data/{tensor.storage.key}", tensor.storage, path)
    try:
        return {name: view(tensor, storages[tensor.storage]) for name, tensor in tensors.items()}
    except (ValueError, OverflowError) as error:
        raise DataError(f"{path}: a tensor has a shape that no array can have ({error})") from None


def _storage(archive: zipfile.ZipFile, name: str, storage: Storage, path: pathlib.Path) -> np.ndarray:
    """A storage's elements, [elements]; the zip's checksum of them is verified."""
    import ml_dtypes

    dtype = np.dtype(ml_dtypes.bfloat16 if storage.dtype == "bfloat16" else storage.dtype)
    data = _record(archive, name, path)
    if len(data) != storage.elements * dtype.itemsize:
        raise DataError(f"{path}: record {name} has {len(data)} bytes, must have {storage.elements} x {dtype.itemsize}")
    return np.frombuffer(data, dtype)


def _record(archive: zipfile.ZipFile, name: str, path: pathlib.Path) -> bytes:
    """A record's bytes; torch.save compresses none, so that none can be larger than the file."""
    try:
        record = archive.getinfo(name)
    except KeyError:
        raise DataError(f"{path}: record {name} is missing") from None
    if record.compress_type != zipfile.ZIP_STORED or record.file_size > path.stat().st_size:
        raise DataError(f"{path}: record {name} is compressed; torch.save compresses none")
    return archive.read(record)


def _state_dict(structure: Any, path: pathlib.Path) -> dict[str, Tensor]:
    """The names and tensors of a model: the whole structure, or what it keeps under one of MODEL_KEYS."""
    if isinstance(structure, dict):
        found = next((structure[key] for key in MODEL_KEYS if isinstance(structure.get(key), dict)), structure)
        if found and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items()):
            return found
        held = ", ".join(ascii(name) for name in list(found)[:8]) or "nothing"
    else:
        held = f"a {type(structure).__name__}"
    raise DataError(
        f"{path}: must hold a state_dict (names and tensors), or one under {', '.join(MODEL_KEYS)}; it holds {held}"
    )
