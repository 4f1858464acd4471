"""Reading and writing files of weights: every value as it was, everything else refused, nothing executed."""

import itertools
import os
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest

from tests.support.optional import need_modules
from tlinformer_jax.errors import DataError
from tlinformer_jax.interop.files import read_weights, write_safetensors

ARRAYS = {
    "float32": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
    "float64": np.linspace(0, 1, 5),
    "float16": np.array([[1.5, -2.25], [65504, 6e-8]], np.float16),
    "bfloat16": np.array([3.0, -0.0078125, 1e38], ml_dtypes.bfloat16),
    "int64": np.array([1, -(2**40)]),
    "scalar": np.array(2.5, np.float32),
}


@pytest.fixture
def torch():
    """PyTorch, which writes the files that these tests read."""
    need_modules("torch", extra="torch")
    import torch

    return torch


def tensors(torch, arrays=ARRAYS):
    def tensor(array):
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
        return torch.from_numpy(array.copy())

    return {name: tensor(array) for name, array in arrays.items()}


def check_equal(found, truth):
    assert sorted(found) == sorted(truth)
    for name, array in truth.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


def test_safetensors_gives_every_tensor_as_it_was(tmp_path):
    need_modules("safetensors", extra="convert")
    write_safetensors(tmp_path / "model.safetensors", ARRAYS)
    check_equal(read_weights(tmp_path / "model.safetensors"), ARRAYS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
    with pytest.raises(DataError, match="exists"):
        write_safetensors(tmp_path / "model.safetensors", ARRAYS)
    with pytest.raises(DataError, match="cannot be written"):
        write_safetensors(tmp_path / "none" / "model.safetensors", ARRAYS)
    with pytest.raises(DataError, match=r"cannot be written \(File name too long\)"):
        write_safetensors(tmp_path / f"{'n' * 300}.safetensors", ARRAYS)


def test_damaged_safetensors(tmp_path):
    need_modules("safetensors", extra="convert")
    write_safetensors(tmp_path / "whole.safetensors", ARRAYS)
    whole, part = (tmp_path / "whole.safetensors").read_bytes(), tmp_path / "part.safetensors"
    for length in itertools.chain(range(0, len(whole), max(1, len(whole) // 40)), [len(whole) - 1]):
        part.write_bytes(whole[:length])
        with pytest.raises(DataError):
            read_weights(part)
    part.write_bytes(struct.pack("<Q", 2**62) + b"{}")  # a header that promises too much
    with pytest.raises(DataError, match="not a valid safetensors file"):
        read_weights(part)


def test_files_of_no_weights(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name, message in (
        ("none.pt", "cannot be read"),
        ("folder.safetensors", "cannot be read"),
        ("text.safetensors", "not a valid safetensors file"),
        ("model.bin", "must end in"),
    ):
        with pytest.raises(DataError, match=message):
            read_weights(tmp_path / name)


@pytest.mark.slow
def test_pt_gives_every_tensor_as_it_was(torch, tmp_path):
    """Each dtype; tied, sliced and transposed tensors, which torch.save stores as views of one storage."""
    torch.save(tensors(torch), tmp_path / "model.pt")
    check_equal(read_weights(tmp_path / "model.pt"), ARRAYS)
    whole = torch.arange(24.0).reshape(4, 6)
    views = {"whole": whole, "tied": whole, "transposed": whole.T, "rows": whole[2:], "column": whole[:, 5]}
    torch.save(views, tmp_path / "views.pth")
    check_equal(read_weights(tmp_path / "views.pth"), {name: view.numpy() for name, view in views.items()})


@pytest.mark.slow
def test_training_checkpoints_and_wrappers(torch, tmp_path):
    """A state_dict beside an optimiser's, its names behind the prefix of a compiled model."""
    model = {f"_orig_mod.{name}": tensor for name, tensor in tensors(torch).items()}
    optimizer = {"state": {0: {"step": 3, "betas": (0.9, 0.95), "lr": None}}, "param_groups": [{"params": [0, 1]}]}
    torch.save({"epoch": 7, "optimizer": optimizer, "model_state_dict": model}, tmp_path / "model.pt")
    check_equal(read_weights(tmp_path / "model.pt"), ARRAYS)
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    with pytest.raises(DataError, match="it holds 'epoch'"):
        read_weights(tmp_path / "none.pt")


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.slow
@pytest.mark.parametrize("function", [os.system, eval, os.mkdir])
def test_malicious_pickles_are_refused_and_not_executed(torch, tmp_path, function):
    marker = tmp_path / "executed"
    argument = {os.system: f"touch {marker}", eval: f"open({str(marker)!r}, 'w')", os.mkdir: str(marker)}[function]
    attack = Malicious(function, argument)
    pickle.loads(pickle.dumps(attack))  # the attack is one
    assert marker.exists()
    marker.rmdir() if marker.is_dir() else marker.unlink()
    for structure in (attack, tensors(torch) | {"x": attack}, {"model": {}, "optimizer": [attack]}):
        torch.save(structure, tmp_path / "model.pt")
        with pytest.raises(DataError, match="weights_only") as caught:
            read_weights(tmp_path / "model.pt")
        assert "\n" not in str(caught.value)
        assert not marker.exists()


@pytest.mark.slow
def test_truncated_and_altered_pt(torch, tmp_path):
    """Any cut and any flipped bit of a tensor is noticed, in one line."""
    torch.save(tensors(torch), tmp_path / "whole.pt")
    whole, part = (tmp_path / "whole.pt").read_bytes(), tmp_path / "part.pt"
    for length in itertools.chain(range(0, len(whole), max(1, len(whole) // 20)), [len(whole) - 1]):
        part.write_bytes(whole[:length])
        with pytest.raises(DataError) as caught:
            read_weights(part)
        assert "\n" not in str(caught.value)
    start = whole.index(ARRAYS["float32"].tobytes())
    for position in range(start, start + 48, 7):
        part.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(DataError, match="checksum"):
            read_weights(part)
