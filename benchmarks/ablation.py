"""Runs a benchmark with one Pallas kernel replaced by plain XLA: `python -m benchmarks.ablation KERNEL MODULE FLAGS`.

For example `python -m benchmarks.ablation norm benchmarks.training --lengths=512 --batch_tokens=65536`. KERNEL `none`
keeps all kernels. docs/performance.md has the results.

    loss, norm, dropout         training: the loss, the backward pass of LayerNorm, attention with dropout
    token, dense                a token step: all of its kernels, or only the products with the weights
    store, compress, restore    slide and prefill: writing keys and values, reading the history, reading the context
"""

import contextlib
import importlib
import runpy
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

# For each kernel: module and name of the gate that turns it on, and the gate's value without the kernel.
GATES: dict[str, tuple[str, str, Any]] = {
    "loss": ("training.loss", "usable", lambda *_: False),
    "norm": ("models.layers", "usable", lambda *_: False),
    "dropout": ("kernels.dropout", "use_kernel", lambda *_: False),
    "token": ("models.cached_attention", "use_token_kernels", lambda _: False),
    "dense": ("models.cached_attention", "MAX_FUSED_ROWS", 0),
}
# Functions of `models.cached_attention` whose kernels share the gate `use_kernels`.
SHARED = {"store": "can_store", "compress": "attend_history", "restore": "attend_context"}


@contextlib.contextmanager
def without(kernel: str) -> Iterator[None]:
    """Replaces a kernel with plain XLA in everything that is imported and compiled inside the context."""
    module, name, plain = GATES.get(kernel, ("models.cached_attention", SHARED.get(kernel, ""), None))
    home = importlib.import_module(f"tlinformer_jax.{module}")
    with mock.patch.object(home, name, _ungated(home, getattr(home, name)) if kernel in SHARED else plain):
        yield


def _ungated(home: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    def plain(*args: Any, **options: Any) -> Any:
        with mock.patch.object(home, "use_kernels", return_value=False):
            return function(*args, **options)

    return plain


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in ("none", *GATES, *SHARED):
        sys.exit(f"{__doc__}\nKERNEL must be one of none, {', '.join([*GATES, *SHARED])}")
    chosen, benchmark = sys.argv[1:3]
    sys.argv = sys.argv[2:]
    print(f"{benchmark}, kernel left out: {chosen}", flush=True)
    with contextlib.nullcontext() if chosen == "none" else without(chosen):
        runpy.run_module(benchmark, run_name="__main__", alter_sys=True)
