"""Attention backends against exact ones: `python -m tlinformer_jax.bench.attention --check`, and their speed.

Every backend that this machine has is compared, in the dtype that it takes, with float32 attention by plain products:
outputs, log-sum-exp and gradients, on the shapes of the model: heads of 36 features, causal windows, key lengths. The
error is the norm of the difference over the norm of the exact result. With --check the command ends with status 1 if
one is above its tolerance. Times are of a jitted call on the training shapes, median of `repeats`, waited for.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from tlinformer_jax import cli

CHECK = flags.DEFINE_bool("check", False, "Compare with exact attention; status 1 if an error is too large.")
TIME = flags.DEFINE_bool("time", False, "Time forward, and forward with backward, on the shapes of training.")
REPEATS = flags.DEFINE_integer("repeats", 20, "Timed calls.", lower_bound=1)

# Norm of the difference over norm: float32 by another order of sums, and half precision.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}

# queries, keys, options of attend; batch 2, 12 heads of 36.
CHECKS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "all keys": (512, 256, {}),
    "one query": (1, 300, {}),
    "causal": (256, 256, {"causal": True}),
    "causal, odd length": (77, 77, {"causal": True}),
    "causal, local window": (300, 300, {"causal": True, "window": 64}),
    "key lengths": (192, 512, {"key_length": (511, 64)}),
    "a row without keys": (64, 128, {"key_length": (0, 128)}),
}
# batch, queries, keys, causal: a layer of the 41M shape at N = 512 with 64 sequences, and at N = 8192 with 4.
TIMES = {
    "N = 512: window": (64, 256, 256, True),
    "N = 512: both streams": (64, 512, 256, False),
    "N = 512: baseline": (64, 512, 512, True),
    "N = 8192: compress": (4, 512, 8192, False),
    "N = 8192: restore": (4, 8192, 256, False),
}


def backends() -> list[tuple[str, str]]:
    """Backends and dtypes that this machine has."""
    import jax
    import jax.numpy as jnp

    from tlinformer_jax.models.attention import fused_kernel

    found = [("xla", "float32"), ("xla", "bfloat16")]
    if fused_kernel(jnp.dtype("bfloat16")):
        found += [("cudnn", "bfloat16"), ("cudnn", "float16")]
    return found + ([("splash", "bfloat16")] if jax.default_backend() == "tpu" else [])


def check(backend: str, dtype: str, name: str) -> dict[str, float]:
    """Errors of one backend on one of CHECKS: of the output, the log-sum-exp and the three gradients."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from tlinformer_jax.models.attention import attend

    queries, keys, options = CHECKS[name]
    options = {key: jnp.array(value) if key == "key_length" else value for key, value in options.items()}
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, n, 12, 36)), dtype) for n in (queries, keys, keys)]
    mixing = jnp.asarray(rng.standard_normal((2, queries, 12, 36)), jnp.float32)

    def outcome(arrays: list[jax.Array], backend: str) -> dict[str, np.ndarray]:
        def total(*arrays: jax.Array) -> jax.Array:
            return (attend(*arrays, backend=backend, **options).astype(jnp.float32) * mixing).sum()

        output, lse = jax.jit(lambda *a: attend(*a, backend=backend, return_lse=True, **options))(*arrays)
        gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*arrays)
        names = ("output", "lse", "d query", "d key", "d value")
        return {name: np.asarray(part, np.float64) for name, part in zip(names, (output, lse, *gradients))}

    with jax.default_matmul_precision("highest"):
        exact = outcome([array.astype(jnp.float32) for array in arrays], "xla")
        found = outcome(arrays, backend)
    errors = {}
    for part, truth in exact.items():
        value, seen = found[part], np.isfinite(truth)
        # Where there is no key the log-sum-exp is -inf, and must be that exactly.
        same = np.array_equal(np.isfinite(value), seen)
        errors[part] = (
            float(np.linalg.norm(value[seen] - truth[seen]) / np.linalg.norm(truth[seen])) if same else np.inf
        )
    return errors


def checked() -> Iterator[tuple[str, bool]]:
    """A line for every backend and shape, and whether all its errors are small enough."""
    for backend, dtype in backends():
        for name in CHECKS:
            errors = check(backend, dtype, name)
            good = all(error <= TOLERANCE[dtype] for error in errors.values())
            parts = "  ".join(f"{part} {error:.1e}" for part, error in errors.items())
            yield f"{'ok  ' if good else 'FAIL'}  {backend:7} {dtype:9} {name:22} {parts}", good


def seconds(function: Callable[..., Any], *arrays: Any) -> float:
    """Median time of a call."""
    import jax

    jax.block_until_ready(function(*arrays))
    times = []
    for _ in range(REPEATS.value):
        started = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def timed() -> Iterator[str]:
    """A line for every backend in half precision, head padding and shape of TIMES."""
    import jax
    import jax.numpy as jnp

    from tlinformer_jax.models.attention import attend

    for name, (batch, queries, keys, causal) in TIMES.items():
        for backend, dtype in backends():
            if dtype != "bfloat16":
                continue
            for width in (36,) if backend == "xla" else (40, 48, 64):
                arrays = [jnp.ones((batch, n, 12, width), dtype) for n in (queries, keys, keys)]

                def forward(*arrays: jax.Array, backend: str = backend, causal: bool = causal) -> jax.Array:
                    return attend(*arrays, causal=causal, backend=backend, scale=1 / 6)

                def total(*arrays: jax.Array, forward: Any = forward) -> jax.Array:
                    return forward(*arrays).astype(jnp.float32).sum()

                once = seconds(jax.jit(forward), *arrays)
                both = seconds(jax.jit(jax.grad(total, argnums=(0, 1, 2))), *arrays)
                yield (
                    f"{name:24} {backend:7} heads of {width}: forward {once * 1e3:.3f} ms, "
                    f"with backward {both * 1e3:.3f} ms"
                )


def main() -> None:
    """Checks, or times, or both."""
    import jax

    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}", flush=True)
    failures = 0
    if CHECK.value or not TIME.value:
        for line, good in checked():
            print(line, flush=True)
            failures += not good
    if TIME.value:
        for line in timed():
            print(line, flush=True)
    if CHECK.value and failures:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
