"""Files of weights: `.safetensors`, and `.pt` of `torch.save` (read only). No content of a file is executed."""

import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.errors import ConfigError, DataError, file_errors_as

SAFETENSORS = ".safetensors"
TORCH = (".pt", ".pth")
# Keys under which training scripts store the model beside the optimiser, and prefixes that wrappers add to names.
MODEL_KEYS = ("model_state_dict", "state_dict", "model")
WRAPPERS = ("module.", "_orig_mod.")
# Fields of a model's configuration that decide its function.
SHAPE = (
    "architecture", "vocab_size", "d_model", "num_heads", "num_blocks", "hidden_depth", "history_window",
    "generation_window", "dropout",
)  # fmt: skip
# Fields that are written only if they differ from the default.
OPTIONAL = (
    "causal_history", "token_shift", "key_taps", "longest_wavelength", "window_overlap", "num_experts",
)  # fmt: skip
PLAIN = ModelConfig()


def read_weights(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the arrays of a file by name, in the file's dtypes; removes prefixes of wrappers."""
    if path.suffix not in (SAFETENSORS, *TORCH):
        raise DataError(f"{path}: must end in {SAFETENSORS}, {' or '.join(TORCH)}")
    with file_errors_as(f"{path}: cannot be read"):
        path.open("rb").close()
    arrays = _read_safetensors(path) if path.suffix == SAFETENSORS else _read_torch(path)
    for prefix in WRAPPERS:
        if arrays and all(name.startswith(prefix) for name in arrays):
            arrays = {name.removeprefix(prefix): array for name, array in arrays.items()}
    return arrays


def write_safetensors(path: pathlib.Path, arrays: Mapping[str, np.ndarray], model: ModelConfig | None = None) -> None:
    """Writes a new file, which appears under its name only when complete.

    Its metadata describe `model`, for `pytorch.from_safetensors`.
    """
    numpy = _safetensors()
    with file_errors_as(f"{path}: cannot be written"):
        if path.exists():
            raise DataError(f"{path}: exists; name a new file")
        if not path.parent.is_dir():
            raise DataError(f"{path}: cannot be written; the directory {path.parent} does not exist")
    metadata = {"format": "pt"}  # matrices are [out, in], as readers for PyTorch expect them
    if model is not None:
        shape = {name: getattr(model, name) for name in SHAPE} | {"d_ff": model.feed_forward_dim}
        changed = {name: getattr(model, name) for name in OPTIONAL if getattr(model, name) != getattr(PLAIN, name)}
        metadata["tlinformer"] = json.dumps(shape | changed)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        numpy.save_file(dict(arrays), draft, metadata=metadata)
        draft.replace(path)
    except Exception as error:  # safetensors wraps the operating system's errors in its own type
        raise DataError(f"{path}: cannot be written ({error})") from None
    finally:
        draft.unlink(missing_ok=True)


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        needed = "needs the package safetensors: pip install 'tlinformer-jax[convert]'"
        raise ConfigError("weights", SAFETENSORS, needed) from None
    return safetensors.numpy


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    import ml_dtypes  # noqa: F401  (gives NumPy the name bfloat16)

    numpy = _safetensors()
    try:
        return numpy.load_file(path)
    except Exception as error:  # the package's error type is a direct subclass of Exception
        raise DataError(f"{path}: not a valid safetensors file ({error})") from None


def _read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads the state_dict from a file of `torch.save`: a zip archive, whose checksums are verified."""
    try:
        import torch
    except ImportError:
        needed = "needs the package torch: pip install 'tlinformer-jax[torch]', or save it as .safetensors"
        raise ConfigError("weights", path.suffix, needed) from None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise DataError(f"{path}: record {damaged} is damaged (its checksum is wrong)")
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except zipfile.BadZipFile as error:
        raise DataError(f"{path}: not a valid zip archive, as torch.save writes since version 1.6 ({error})") from None
    except Exception as error:  # a damaged file can raise anything
        why = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise DataError(
            f"{path}: torch.load(weights_only=True) refuses it ({ascii(why.strip())[1:-1][:200]})"
        ) from None
    return {name: _as_numpy(tensor) for name, tensor in _state_dict(loaded, torch.Tensor, path).items()}


def _as_numpy(tensor: Any) -> np.ndarray:
    import ml_dtypes
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:  # NumPy has no such dtype of its own
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def _state_dict(loaded: Any, kind: type, path: pathlib.Path) -> dict[str, Any]:
    """Returns a model's names and tensors: all of `loaded`, or those under one of MODEL_KEYS."""
    held = f"a {type(loaded).__name__}"
    if isinstance(loaded, dict):
        found = next((loaded[key] for key in MODEL_KEYS if isinstance(loaded.get(key), dict)), loaded)
        if found and all(isinstance(name, str) and isinstance(value, kind) for name, value in found.items()):
            return found
        held = ", ".join(ascii(name) for name in list(found)[:8]) or "nothing"
    keys = ", ".join(MODEL_KEYS)
    raise DataError(f"{path}: must hold a state_dict (names and tensors), or one under {keys}; it holds {held}")
