"""Times the attention calls of a training step in isolation, forward and forward with backward."""

import concurrent.futures
import functools
import json
import os
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.models.attention import attend

TINY = "--tiny" in sys.argv
BACKEND = "xla" if TINY else "cudnn"
OUT = os.environ["OUT"]
B = 1 if TINY else 32
W = 8 if TINY else 256
LONG, SHORT = 31 * W, 16 * W
# name: batch, queries, keys, causal, key length (None: no mask)
SHAPES = {
    "compress 7936 keys, no mask": (B, 2 * W, LONG, False, None),
    "compress 7936 keys, length 7936": (B, 2 * W, LONG, False, LONG),
    "compress 7936 keys, length 6144": (B, 2 * W, LONG, False, 24 * W),
    "compress 7936 keys, length 2048": (B, 2 * W, LONG, False, 8 * W),
    "compress 4096 keys, length 2048": (B, 2 * W, SHORT, False, 8 * W),
    "restore 7936 rows": (B, LONG, W, False, None),
    "restore 31 x 256 rows as batch": (B * 31, W, W, False, None),
    "hidden shared": (B, 2 * W, W, False, None),
    "hidden shared, two windows": (2 * B, 2 * W, W, False, None),
    "hidden shared, two windows, length 256": (2 * B, 2 * W, W, False, W),
    "causal": (B, W, W, True, None),
    "causal, two windows": (2 * B, W, W, True, None),
}
FEW = [name for name in SHAPES if name.startswith(("compress 7936 keys, length 6", "restore", "hidden shared, two windows, l", "causal, t"))]
# heads, true features, padded features
WIDTHS = [(12, 36, 40), (12, 36, 48), (12, 36, 64), (9, 48, 48), (8, 54, 56), (6, 72, 72), (6, 72, 80), (7, 64, 64), (4, 108, 112)]
CASES = [(name, WIDTHS[0]) for name in SHAPES] + [(name, width) for width in WIDTHS[1:] for name in FEW]


def build(case):
    name, (heads, true, padded) = case
    batch, queries, keys, causal, length = SHAPES[name]
    q, k = jax.ShapeDtypeStruct((batch, queries, heads, padded), jnp.bfloat16), jax.ShapeDtypeStruct((batch, keys, heads, padded), jnp.bfloat16)
    lengths = None if length is None else jax.ShapeDtypeStruct((batch,), jnp.int32)

    def forward(q, k, v, lengths):
        return attend(q, k, v, causal=causal, key_length=lengths, backend=BACKEND, scale=true**-0.5, never_empty=True)

    def both(q, k, v, lengths, slope):
        output, pull = jax.vjp(lambda q, k, v: forward(q, k, v, lengths), q, k, v)
        return output, pull(slope)

    return case, jax.jit(forward).lower(q, k, k, lengths).compile(), jax.jit(both).lower(q, k, k, lengths, q).compile()


def timed(call, *inputs):
    jax.block_until_ready(call(*inputs))
    times = []
    for _ in range(4):
        started = time.perf_counter()
        for _ in range(5):
            out = call(*inputs)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - started) / 5)
    return statistics.median(times)


def main():
    print(jax.devices(), jax.__version__, flush=True)
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        built = list(pool.map(build, CASES))
    print(f"compiled {len(built)} in {time.perf_counter() - started:.1f} s", flush=True)
    rows = []

    @functools.lru_cache(4)
    def array(shape, seed):
        return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    for (name, (heads, true, padded)), forward, both in built:
        batch, queries, keys, causal, length = SHAPES[name]
        q, slope = (array((batch, queries, heads, padded), seed) for seed in (0, 1))
        k, v = (array((batch, keys, heads, padded), seed) for seed in (2, 3))
        lengths = None if length is None else jnp.full((batch,), length, jnp.int32)
        one, two = timed(forward, q, k, v, lengths), timed(both, q, k, v, lengths, slope)
        seen = (length or keys) * (0.5 if causal else 1)
        flops = 2 * 2 * batch * heads * queries * seen * true
        row = {"call": name, "heads": heads, "features": true, "padded": padded, "forward_ms": one * 1e3, "backward_ms": (two - one) * 1e3, "tflops": 3.5 * flops / two / 1e12}
        rows.append(row)
        print(f"{name:42s} {heads:3d} x {true:3d} ({padded:3d})  forward {one * 1e3:7.3f}  backward {(two - one) * 1e3:7.3f} ms  {row['tflops']:6.0f} TFLOP/s", flush=True)
    with open(os.path.join(OUT, "attention_calls.json"), "w") as file:
        json.dump(rows, file, indent=1)


main()
