"""What several of the decoder's tests patch: nothing that was traced before or during them is served to another."""

import pytest

from tlinformer_jax.decoding import cache as cache_module
from tlinformer_jax.decoding import params as params_module
from tlinformer_jax.kernels import decode as decode_kernel
from tlinformer_jax.kernels import history as history_kernel
from tlinformer_jax.kernels import storing as storing_kernel
from tlinformer_jax.models import cached_attention


@pytest.fixture
def interpreted_kernels(monkeypatch, own_traces):
    """The path that a GPU takes, its kernels interpreted, heads and rows padded; the names of those that were used."""
    real, attend, used = decode_kernel.call_kernel, decode_kernel.attend, set()

    def interpreted(kernel, grid, outputs, operands, name, interpret, **options):
        used.add(name)
        return real(kernel, grid, outputs, operands, name, True, **options)

    for module in (decode_kernel, history_kernel, storing_kernel):
        monkeypatch.setattr(module, "call_kernel", interpreted)
    # An interpreted kernel converts int8 without assembly.
    monkeypatch.setattr(decode_kernel, "attend", lambda *arguments: attend(*arguments[:-1], True))
    powers = history_kernel.powers
    monkeypatch.setattr(history_kernel, "powers", lambda scores, shift, scale, _: powers(scores, shift, scale, True))
    monkeypatch.setattr(cached_attention, "available", lambda name: True)
    monkeypatch.setattr(params_module, "head_multiple", lambda *_: 8)
    monkeypatch.setattr(cache_module, "padded_rows", lambda rows: -(-rows // 128) * 128)
    return used
