"""Compares attention backends with exact attention and times them: `python -m benchmarks.attention --check`.

Every backend of this machine is compared, in the dtypes that it supports, with float32 attention by plain products:
outputs, log-sum-exp and gradients, on the shapes of the model (heads of 36 features, causal windows, key lengths). The
error is the norm of the difference over the norm of the exact result. With --check the exit status is 1 if an error is
above its tolerance. Times are medians of `repeats` jitted calls on the training shapes, each waited for.

Dropout on the weights has its own kernel on NVIDIA GPUs ('dropout'). It is compared with plain products that use the
same mask, and timed next to XLA's dropout ('dropout xla'). Without dropout it is the attention of deterministic runs
('triton'). `--backends` and `--shapes` select what runs.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

from tlinformer_jax.commands import cli
from tlinformer_jax.errors import UserError

CHECK = flags.DEFINE_bool("check", False, "Compare with exact attention; status 1 if an error is too large.")
TIME = flags.DEFINE_bool("time", False, "Time forward, and forward with backward, on the shapes of training.")
BACKENDS = flags.DEFINE_list("backends", [], "Backends to check or time, of those that there are; none: all.")
SHAPES = flags.DEFINE_string("shapes", "", "Check or time the shapes whose name has this in it.")
REPEATS = flags.DEFINE_integer("repeats", 20, "Timed calls.", lower_bound=1)

RATE = 0.1
SCALE = 36**-0.5
# Allowed norm of the difference over norm of the exact result: float32 sums in another order, half precision rounds.
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}

# Queries, keys, and which keys a query sees (`causal`, `window`, `key_length`); the batch is 2, with 12 heads of 36
# features.
CHECKS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "all keys": (512, 256, {}),
    "one query": (1, 300, {}),
    "causal": (256, 256, {"causal": True}),
    "odd lengths": (63, 77, {}),
    "causal, odd length": (77, 77, {"causal": True}),
    "causal, local window": (300, 300, {"causal": True, "window": 64}),
    "key lengths": (192, 512, {"key_length": (511, 64)}),
    "a row without keys": (64, 128, {"key_length": (0, 128)}),
}
# Batch, queries, keys, causal: a layer of the 41M shape at N = 512 with 64 sequences, and at N = 8192 with 4.
TIMES = {
    "N = 512: window": (64, 256, 256, True),
    "N = 512: both streams": (64, 512, 256, False),
    "N = 512: baseline": (64, 512, 512, True),
    "N = 8192: compress": (4, 512, 8192, False),
    "N = 8192: restore": (4, 8192, 256, False),
}
# Timed widths of the padded heads.
WIDTHS = {"xla": (36,), "dropout xla": (36,), "dropout": (40,), "triton": (40,)}


def backends(wanted: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Returns the (backend, dtype) pairs of this machine, only those of `wanted` backends if any are named."""
    import jax
    import jax.numpy as jnp

    from tlinformer_jax.models.attention import fused_kernel

    found = [("xla", "float32"), ("xla", "bfloat16")]
    if fused_kernel(jnp.dtype("bfloat16")):
        found += [("cudnn", "bfloat16"), ("cudnn", "float16"), ("triton", "bfloat16"), ("triton", "float16")]
        found += [("dropout", "bfloat16"), ("dropout", "float16"), ("dropout xla", "bfloat16")]
    found += [("splash", "bfloat16")] if jax.default_backend() == "tpu" else []
    return [pair for pair in found if not wanted or pair[0] in wanted]


def check(backend: str, dtype: str, name: str) -> dict[str, float]:
    """Returns a backend's errors on one of CHECKS: output, log-sum-exp (not of our kernel) and three gradients."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    queries, keys, options = CHECKS[name]
    options = {key: jnp.array(value) if key == "key_length" else value for key, value in options.items()}
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.standard_normal((2, n, 12, 36)), dtype) for n in (queries, keys, keys)]
    mixing = jnp.asarray(rng.standard_normal((2, queries, 12, 36)), jnp.float32)

    def outcome(arrays: list[jax.Array], attention: Callable[..., tuple[jax.Array, ...]]) -> dict[str, np.ndarray]:
        def total(*arrays: jax.Array) -> jax.Array:
            return (attention(*arrays, gradient=True)[0].astype(jnp.float32) * mixing).sum()

        found = dict(zip(("output", "lse"), jax.jit(lambda *a: attention(*a, gradient=False))(*arrays)))
        gradients = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*arrays)
        found |= dict(zip(("d query", "d key", "d value"), gradients))
        return {name: np.asarray(part, np.float64) for name, part in found.items()}

    with jax.default_matmul_precision("highest"):
        exact = outcome([array.astype(jnp.float32) for array in arrays], _exactly(backend, options))
        found = outcome(arrays, _by(backend, options))
    errors = {}
    for part, value in found.items():
        truth, seen = exact[part], np.isfinite(exact[part])
        # A row without keys must have a log-sum-exp of exactly -inf.
        same = np.array_equal(np.isfinite(value), seen)
        errors[part] = (
            float(np.linalg.norm(value[seen] - truth[seen]) / np.linalg.norm(truth[seen])) if same else np.inf
        )
    return errors


def _scores(options: dict[str, Any]) -> Any:
    """Returns the `Scores` of one of CHECKS."""
    from tlinformer_jax.kernels.common import Scores

    return Scores(SCALE, options.get("causal", False), options.get("window"))


def _by(backend: str, options: dict[str, Any]) -> Callable[..., Any]:
    """Returns attention by a backend: the output, and the log-sum-exp if no gradient is needed and it has one."""
    import jax

    from tlinformer_jax.models.attention import attend, attend_with_lse
    from tlinformer_jax.models.layers import Dropout

    scores, length = _scores(options), options.get("key_length")

    def attention(*arrays: jax.Array, gradient: bool) -> tuple[jax.Array, ...]:
        if backend == "dropout":
            dropout = Dropout.by_key(jax.random.key(0), RATE)
            return (attend(*arrays, scores, key_length=length, backend="triton", dropout=dropout),)
        if gradient or backend == "triton":
            return (attend(*arrays, scores, key_length=length, backend=backend),)
        return attend_with_lse(*arrays, scores, key_length=length, backend=backend)

    return attention


def _exactly(backend: str, options: dict[str, Any]) -> Callable[..., Any]:
    """Returns the exact attention to compare with: plain products, with the kernel's mask for 'dropout'."""
    import jax
    import jax.numpy as jnp

    from tlinformer_jax.models.attention import visible
    from tlinformer_jax.models.layers import Dropout, dropout_mask

    if backend != "dropout":
        return _by("xla", options)

    def attention(query: jax.Array, key: jax.Array, value: jax.Array, gradient: bool) -> tuple[jax.Array, ...]:
        (batch, queries, heads, width), keys = query.shape, key.shape[1]
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / width**0.5
        seen = visible(queries, keys, _scores(options), options.get("key_length"))
        powers = jnp.exp(scores) if seen is None else jnp.where(seen, jnp.exp(scores), 0.0)
        total = powers.sum(-1, keepdims=True)
        keep = dropout_mask(Dropout.by_key(jax.random.key(0), RATE).words, batch, heads, queries, keys, RATE)
        weights = jnp.where(keep, powers / jnp.where(total > 0, total, 1.0) / (1 - RATE), 0.0)
        return (jnp.einsum("bhqk,bkhd->bqhd", weights, value),)

    return attention


def checked(pairs: Sequence[tuple[str, str]], shapes: str = "") -> Iterator[tuple[str, bool]]:
    """Yields a line for each backend and each shape with `shapes` in its name, and whether its errors are small."""
    for backend, dtype in pairs:
        # XLA's dropout draws a different mask, so it has no exact counterpart.
        for name in () if backend == "dropout xla" else CHECKS:
            if shapes not in name:
                continue
            errors = check(backend, dtype, name)
            good = all(error <= TOLERANCE[dtype] for error in errors.values())
            parts = "  ".join(f"{part} {error:.1e}" for part, error in errors.items())
            yield f"{'ok  ' if good else 'FAIL'}  {backend:11} {dtype:9} {name:22} {parts}", good


def seconds(function: Callable[..., Any], *arrays: Any) -> float:
    """Returns the median time of a call."""
    import jax

    jax.block_until_ready(function(*arrays))
    times = []
    for _ in range(REPEATS.value):
        started = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def timed(pairs: Sequence[tuple[str, str]], shapes: str = "") -> Iterator[str]:
    """Yields a line for each bfloat16 backend, head padding, and shape of TIMES with `shapes` in its name."""
    import jax
    import jax.numpy as jnp

    for name, (batch, queries, keys, causal) in TIMES.items():
        for backend, dtype in pairs:
            if dtype != "bfloat16" or shapes not in name:
                continue
            for width in WIDTHS.get(backend, (40, 48, 64)):
                arrays = [jnp.ones((batch, n, 12, width), dtype) for n in (queries, keys, keys)]
                forward = _timed_attention(backend, causal)

                def total(*arrays: jax.Array, forward: Any = forward) -> jax.Array:
                    return forward(*arrays).astype(jnp.float32).sum()

                once = seconds(jax.jit(forward), *arrays)
                both = seconds(jax.jit(jax.grad(total, argnums=(0, 1, 2))), *arrays)
                yield (
                    f"{name:24} {backend:11} heads of {width}: forward {once * 1e3:.3f} ms, with backward "
                    f"{both * 1e3:.3f} ms"
                )


def _timed_attention(backend: str, causal: bool) -> Callable[..., Any]:
    """Returns the attention function that `timed` calls."""
    import jax

    from tlinformer_jax.kernels.common import Scores
    from tlinformer_jax.models.attention import attend
    from tlinformer_jax.models.layers import Dropout

    dropout = Dropout.by_key(jax.random.key(0), RATE) if backend.startswith("dropout") else None
    chosen = {"dropout": "triton", "dropout xla": "xla"}.get(backend, backend)
    return lambda *arrays: attend(*arrays, Scores(SCALE, causal), backend=chosen, dropout=dropout)


def main() -> None:
    """Checks, times, or does both."""
    import jax

    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}", flush=True)
    failures, ran, pairs = 0, 0, backends(BACKENDS.value)
    if CHECK.value or not TIME.value:
        for line, good in checked(pairs, SHAPES.value):
            print(line, flush=True)
            failures, ran = failures + (not good), ran + 1
    if TIME.value:
        for line in timed(pairs, SHAPES.value):
            print(line, flush=True)
            ran += 1
    if not ran:  # a check of nothing must not look like one that passes
        chosen = f"--backends={','.join(BACKENDS.value)} --shapes={SHAPES.value}"
        raise UserError(f"{chosen}: no backend of this machine has such a shape")
    if CHECK.value and failures:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
