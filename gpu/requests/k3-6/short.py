"""Times Triton attention against cuDNN at the shapes of windows: four independent calls in one program."""
import concurrent.futures, functools, json, os, statistics, sys, time
import jax, jax.numpy as jnp
import flash
from tlinformer_jax.models.attention import attend

TINY = "--tiny" in sys.argv
W = 32 if TINY else 256
HEADS, TRUE, PADDED = (2, 36, 40) if TINY else (12, 36, 40)
SCALE = TRUE**-0.5
CALLS = 4
SHAPES = {  # batch, queries, keys, causal
    "causal 128": (2 if TINY else 128, W, W, True),
    "shared 128": (2 if TINY else 128, 2 * W, W, False),
    "restore 32": (2 if TINY else 32, (4 if TINY else 31) * W, W, False),
}
T = (lambda *t: (32, 32, *t[2:])) if TINY else (lambda *t: t)
TILES = {
    "forward": [T(128, 64, 8, 2), T(128, 64, 4, 2), T(64, 64, 4, 3), T(128, 128, 8, 2), T(64, 128, 4, 2)],
    "query": [T(64, 64, 4, 3), T(128, 64, 8, 2), T(128, 64, 4, 2), T(64, 128, 4, 2)],
    "key": [T(64, 64, 4, 2), T(64, 64, 4, 3), T(64, 128, 8, 2), T(128, 64, 4, 2), T(64, 128, 4, 2)],
}
if TINY:
    TILES = {name: tiles[:1] for name, tiles in TILES.items()}


def arrays(shape, key):
    return jax.random.normal(jax.random.key(key), (CALLS, *shape), jnp.bfloat16)


def inputs(name):
    b, n, m, causal = SHAPES[name]
    q, g, o = (arrays((b, n, HEADS, PADDED), i).at[..., TRUE:].set(0) for i in (0, 1, 2))
    k, v = (arrays((b, m, HEADS, PADDED), i).at[..., TRUE:].set(0) for i in (3, 4))
    return q, k, v, g


def cudnn(causal):
    def call(q, k, v):
        return attend(q, k, v, causal=causal, backend="xla" if TINY else "cudnn", scale=SCALE)
    return call


def build(case):
    name, what, tile, whole = case
    b, n, m, causal = SHAPES[name]
    q, k = jax.ShapeDtypeStruct((CALLS, b, n, HEADS, PADDED), jnp.bfloat16), jax.ShapeDtypeStruct((CALLS, b, m, HEADS, PADDED), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct((CALLS, b, HEADS, n), jnp.float32)
    options = dict(tile=tile, true_scale=SCALE, causal=causal, whole=whole, interpret=TINY)

    def each(function):
        return lambda *arguments: [function(*(a[i] for a in arguments)) for i in range(CALLS)]

    def both(q, k, v, g):
        output, pull = jax.vjp(cudnn(causal), q, k, v)
        return output, pull(g)

    makers = {
        "cudnn forward": (cudnn(causal), (q, k, k)), "cudnn both": (both, (q, k, k, q)),
        "forward": (functools.partial(flash.forward, **options), (q, k, k)),
        "query": (functools.partial(flash.query_gradient, **options), (q, k, k, q, q, lse)),
        "key": (functools.partial(flash.key_gradient, **options), (q, k, k, q, lse, lse)),
    }
    function, shapes = makers[what]
    try:
        return case, jax.jit(each(function)).lower(*shapes).compile()
    except Exception as error:
        return case, f"{type(error).__name__}: {str(error)[:150]}"


def timed(call, *inputs):
    jax.block_until_ready(call(*inputs))
    times = []
    for _ in range(4):
        started = time.perf_counter()
        for _ in range(3):
            out = call(*inputs)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - started) / 3 / CALLS)
    return statistics.median(times) * 1e3


def error(value, truth):
    value, truth = value.astype(jnp.float32), truth.astype(jnp.float32)
    return float(jnp.linalg.norm(value - truth) / jnp.linalg.norm(truth))


def main():
    cases = [(name, f"cudnn {what}", None, None) for name in SHAPES for what in ("forward", "both")]
    cases += [(name, what, tile, whole) for name in SHAPES for what, tiles in TILES.items() for tile in tiles for whole in (False, True)]
    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        built = dict(pool.map(build, cases))
    print(f"{len(cases)} compiled in {time.perf_counter() - started:.1f} s", flush=True)
    rows = []
    for name in SHAPES:
        q, k, v, g = inputs(name)
        causal = SHAPES[name][3]
        first = tuple(array[0] for array in (q, k, v))
        truth, pull = jax.vjp(functools.partial(attend, causal=causal, backend="xla", scale=SCALE), *(array[:1].astype(jnp.float32) for array in first))
        slopes = pull(g[0, :1].astype(jnp.float32))
        lse = delta = o = None
        best = {}
        for case, program in built.items():
            if case[0] != name:
                continue
            what = case[1]
            if isinstance(program, str):
                print(case, program, flush=True)
                continue
            try:
                if what.startswith("cudnn"):
                    arguments = (q, k, v) if what.endswith("forward") else (q, k, v, g)
                    out = program(*arguments)[0]
                    wrong = [error(out[:1], truth)] if what.endswith("forward") else [error(a[:1], b) for a, b in zip(out[1], slopes)]
                elif what == "forward":
                    arguments = (q, k, v)
                    out = program(*arguments)
                    wrong = [error(out[0][0][:1], truth)]
                    if lse is None:
                        o, lse = (jnp.stack([one[i] for one in out]) for i in (0, 1))
                elif what == "query":
                    arguments = (q, k, v, o, g, lse)
                    out = program(*arguments)
                    wrong = [error(out[0][0][:1], slopes[0])]
                    if delta is None:
                        delta = jnp.stack([one[1] for one in out])
                else:
                    arguments = (q, k, v, g, lse, delta)
                    out = program(*arguments)
                    wrong = [error(a[:1], b) for a, b in zip(out[0], slopes[1:])]
                ms = timed(program, *arguments)
            except Exception as problem:
                print(case, type(problem).__name__, str(problem)[:150], flush=True)
                continue
            rows.append({"shape": name, "what": what, "tile": case[2], "whole": case[3], "ms": ms, "errors": wrong})
            best[what] = min(best.get(what, 1e9), ms)
            print(f"{name:12s} {what:14s} {str(case[2]):20s} {'64' if case[3] else '32+16'} {ms:8.4f} ms  errors {' '.join(f'{e:.4f}' for e in wrong)}", flush=True)
        print(name, "BEST", {a: round(b, 4) for a, b in best.items()}, "triton", round(sum(best.get(w, 0) for w in TILES), 4), flush=True)
    json.dump(rows, open(os.path.join(os.environ["OUT"], "short.json"), "w"), indent=0)


main()
