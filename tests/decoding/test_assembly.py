"""The GPU kernels' assembly, instruction by instruction: interpreted kernels compute the same without it."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from tlinformer_jax.kernels import decode as decode_kernel
from tlinformer_jax.kernels.common import powers

# Of float32, in float64 before the result is rounded.
ARITHMETIC = {
    "sub": lambda one, other: one - other,
    "fma.rn": lambda one, other, added: one * other + added,
    "ex2.approx.ftz": lambda power: np.exp2(power) if power >= -126 else 0.0,  # without subnormal numbers
}


def run_ptx(assembly: str, constraints: str, *words: int) -> list[float]:
    """Runs the assembly on 32-bit words, which have the numbers after those of its results; returns the results."""
    count = constraints.count("=")
    registers = {f"${count + number}": word for number, word in enumerate(words)}
    assert len(constraints.split(",")) == count + len(words)

    def bits(name: str) -> int:
        return registers[name] if name in registers else int(name.replace("0f", "0x"), 16)

    for instruction, operands in re.findall(r"(\w[\w.]*)\.[bf]32 ([^;]*);", assembly):
        target, *names = operands.split(", ")
        values = [bits(name) for name in names]
        if instruction == "xor":
            registers[target] = values[0] ^ values[1]
        elif instruction == "prmt":
            both = b"".join(value.to_bytes(4, "little") for value in values[:2])
            registers[target] = int.from_bytes(bytes(both[values[2] >> 4 * place & 7] for place in range(4)), "little")
        else:
            result = ARITHMETIC[instruction](*np.asarray(values, np.uint32).view(np.float32).astype(np.float64))
            registers[target] = int(np.float32(result).view(np.uint32))
    return np.asarray([registers[f"${place}"] for place in range(count)], np.uint32).view(np.float32).tolist()


def test_every_integer_is_converted():
    integers = np.arange(-128, 128, dtype=np.int8).reshape(4, 64).T  # a word has four different ones
    for four in integers:
        word = int.from_bytes(four.tobytes(), "little")
        assert run_ptx(decode_kernel.FOUR_FLOATS, "=f,=f,=f,=f,r", word) == four.tolist()


def test_powers_are_those_of_numpy(monkeypatch):
    triton = pytest.importorskip("jax.experimental.pallas.triton")

    def run_each(code, args, constraints, pack, result_shape_dtypes):
        assert pack == 1
        words = [np.asarray(array, np.float32).view(np.uint32).ravel().tolist() for array in args]
        (shape,) = result_shape_dtypes
        results = [run_ptx(code, constraints, *each) for each in zip(*words, strict=True)]
        return [jnp.asarray(results, shape.dtype).reshape(shape.shape)]

    monkeypatch.setattr(triton, "elementwise_inline_asm", run_each)
    rng = np.random.default_rng(0)
    scores, shift, scale = 20 * rng.standard_normal((3, 50)), np.asarray([-9.0, 0.5, 30.0]), 0.3
    scores[:, 0] = -np.inf  # a row that is masked out
    scores[:, 1] = (shift - 126.5) / scale  # below the least normal number
    expected = np.exp2(scores * scale - shift[:, None])
    expected[:, 1] = 0
    found = powers(jnp.asarray(scores, jnp.float32), jnp.asarray(shift, jnp.float32), scale, False)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
