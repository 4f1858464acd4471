"""Reading and writing files of weights: every value as it was, everything else refused, nothing executed."""

import collections
import itertools
import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tests.support import torch_files
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


def check_equal(found, truth):
    assert list(found) == list(truth)
    for name, array in truth.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pt_gives_every_tensor_as_it_was(tmp_path, protocol):
    torch_files.save(tmp_path / "model.pt", torch_files.tensors(ARRAYS), protocol)
    check_equal(read_weights(tmp_path / "model.pt"), ARRAYS)


def test_safetensors_gives_every_tensor_as_it_was(tmp_path):
    pytest.importorskip("safetensors")
    write_safetensors(tmp_path / "model.safetensors", ARRAYS)
    found = read_weights(tmp_path / "model.safetensors")
    check_equal({name: found[name] for name in ARRAYS}, ARRAYS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
    with pytest.raises(DataError, match="exists"):
        write_safetensors(tmp_path / "model.safetensors", ARRAYS)
    with pytest.raises(DataError, match="cannot be written"):
        write_safetensors(tmp_path / "none" / "model.safetensors", ARRAYS)


def test_views_of_one_storage(tmp_path):
    """Tied tensors, slices and transposes, which torch.save stores as offsets and strides."""
    storage = torch_files.Storage(np.arange(24, dtype=np.float32), "0")
    structure = {
        "whole": torch_files.Tensor(storage, 0, (4, 6), (6, 1)),
        "tied": torch_files.Tensor(storage, 0, (4, 6), (6, 1)),
        "transposed": torch_files.Tensor(storage, 0, (6, 4), (1, 6)),
        "rows": torch_files.Tensor(storage, 12, (2, 6), (6, 1)),
        "column": torch_files.Tensor(storage, 5, (4,), (6,)),
    }
    torch_files.save(tmp_path / "model.pth", structure)
    found, whole = read_weights(tmp_path / "model.pth"), np.arange(24, dtype=np.float32).reshape(4, 6)
    truth = {"whole": whole, "tied": whole, "transposed": whole.T, "rows": whole[2:], "column": whole[:, 5]}
    for name, array in truth.items():
        np.testing.assert_array_equal(found[name], array)


def test_training_checkpoints_and_wrappers(tmp_path):
    """A state_dict beside an optimiser's, its names behind the prefix of a compiled model."""
    model = torch_files.tensors({f"_orig_mod.{name}": array for name, array in ARRAYS.items()})
    optimizer = {"state": {0: {"step": 3, "betas": (0.9, 0.95), "lr": None}}, "param_groups": [{"params": [0, 1]}]}
    torch_files.save(tmp_path / "model.pt", {"epoch": 7, "optimizer": optimizer, "model_state_dict": model})
    check_equal(read_weights(tmp_path / "model.pt"), ARRAYS)


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@pytest.mark.parametrize(
    ("function", "argument"), [(os.system, "touch {marker}"), (eval, "open({marker!r}, 'w')"), (os.mkdir, "{marker}")]
)
def test_malicious_pickles_are_refused_and_not_executed(tmp_path, protocol, function, argument):
    marker = tmp_path / "executed"
    attack = Malicious(function, argument.format(marker=str(marker)))
    # First the proof that the attack is one.
    pickle.loads(pickle.dumps(attack, protocol))
    assert marker.exists()
    marker.rmdir() if marker.is_dir() else marker.unlink()
    for structure in (attack, torch_files.tensors(ARRAYS) | {"x": attack}, {"model": {}, "optimizer": [attack]}):
        torch_files.save(tmp_path / "model.pt", structure, protocol)
        with pytest.raises(DataError, match="nothing of it was executed") as caught:
            read_weights(tmp_path / "model.pt")
        assert "\n" not in str(caught.value)
        assert not marker.exists()


class Settings:
    """An object of a class that the reader does not know, as argparse's are."""

    def __init__(self):
        self.lr = 1e-3


def test_names_and_instructions_outside_tensors_are_named(tmp_path):
    torch_files.save(tmp_path / "model.pt", {"args": Settings()})
    with pytest.raises(DataError, match=r"refers to 'copyreg\._reconstructor'|refers to '[\w.]*Settings'"):
        read_weights(tmp_path / "model.pt")
    hidden = b"\x80\x04\x8c\x05posix\n\x8c\x06system\x93."  # a line end in a module's name
    torch_files.write(tmp_path / "model.pt", hidden.replace(b"\x05posix\n", b"\x06posix\n"), {})
    with pytest.raises(DataError) as caught:
        read_weights(tmp_path / "model.pt")
    assert r"posix\n" in str(caught.value)
    torch_files.write(tmp_path / "model.pt", b"\x80\x02cos\nsystem\nq\x00(X\x01\x00\x00\x00xi.", {})
    with pytest.raises(DataError, match="refused"):
        read_weights(tmp_path / "model.pt")


def pickled(*parts: bytes) -> bytes:
    return b"".join((b"\x80\x02", *parts, b"."))


DEEP = b")" + b"\x85" * 200_000  # an empty tuple in a tuple in a tuple ...
DAMAGED = {
    "empty": b"",
    "no end": b"\x80\x02}",
    "nothing on the stack": pickled(b"u"),
    "two values": pickled(b"}}"),
    "unknown memo": pickled(b"h\x05"),
    "unknown instruction": pickled(b"\xff"),
    "text cut short": pickled(b"X\xff\xff\xff\x7fabc"),
    "key that cannot be hashed safely": pickled(b"}", DEEP, b"Ns"),
    "set of a number": pickled(b"K\x01K\x02K\x03s"),
    "call of a number": pickled(b"K\x01)R"),
    "call without arguments": pickled(b"ctorch._utils\n_rebuild_tensor_v2\n)R"),
    "tensor of no storage": pickled(b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))tR"),
    "storage of no type": pickled(b"(X\x07\x00\x00\x00storageNNNNtQ"),
    "persistent number": pickled(b"K\x01Q"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_pickles_are_one_line(tmp_path, name):
    torch_files.write(tmp_path / "model.pt", DAMAGED[name], {})
    with pytest.raises(DataError) as caught:
        read_weights(tmp_path / "model.pt")
    assert str(caught.value).startswith(str(tmp_path / "model.pt"))
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (25,), (1,)),
        (1, (24,), (1,)),
        (0, (4, 7), (6, 1)),
        (24, (), ()),
        (-1, (2,), (1,)),
        (0, (-2,), (1,)),
        (8, (2,), (-1,)),
        (0, (10**30,), (0,)),
        (0, (2,), (1, 1)),
        (0, (2.0,), (1,)),
    ],
)
def test_tensors_that_leave_their_storage(tmp_path, offset, shape, strides):
    storage = torch_files.Storage(np.arange(24, dtype=np.float32), "0")
    torch_files.save(tmp_path / "model.pt", {"x": torch_files.Tensor(storage, offset, shape, strides)})
    with pytest.raises(DataError, match=r"damaged|no array can have"):
        read_weights(tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_and_altered_files(tmp_path, suffix):
    """Any cut is noticed; a flipped bit is noticed in .pt, whose records have checksums."""
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
        write_safetensors(tmp_path / "whole.safetensors", ARRAYS)
    else:
        torch_files.save(tmp_path / "whole.pt", torch_files.tensors(ARRAYS))
    whole, part = (tmp_path / f"whole{suffix}").read_bytes(), tmp_path / f"part{suffix}"
    for length in itertools.chain(range(0, len(whole), max(1, len(whole) // 40)), [len(whole) - 1]):
        part.write_bytes(whole[:length])
        with pytest.raises(DataError):
            read_weights(part)
    if suffix == ".safetensors":
        return
    start = whole.index(ARRAYS["float32"].tobytes())
    for position in range(start, start + 48):
        part.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(DataError, match="CRC"):
            read_weights(part)


def test_other_files(tmp_path):
    missing, folder, text, old = (tmp_path / name for name in ("none.pt", "folder.pt", "text.pt", "model.bin"))
    folder.mkdir()
    text.write_text("no zip")
    for path, message in (
        (missing, "cannot be read"),
        (folder, "cannot be read"),
        (text, "zip archive"),
        (old, "must end in"),
    ):
        with pytest.raises(DataError, match=message):
            read_weights(path)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(DataError, match=r"one data\.pkl"):
        read_weights(tmp_path / "other.pt")
    state = torch_files.tensors(ARRAYS)
    torch_files.save(tmp_path / "packed.pt", state, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(DataError, match="compressed"):
        read_weights(tmp_path / "packed.pt")
    torch_files.save(tmp_path / "big.pt", state, byteorder=b"big")
    with pytest.raises(DataError, match="byte order"):
        read_weights(tmp_path / "big.pt")
    torch_files.save(tmp_path / "list.pt", collections.OrderedDict({"epoch": 3}))
    with pytest.raises(DataError, match="it holds 'epoch'"):
        read_weights(tmp_path / "list.pt")


def test_a_header_that_promises_too_much(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(DataError, match="not a sound safetensors file"):
        read_weights(path)
