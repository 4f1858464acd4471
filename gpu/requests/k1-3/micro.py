"""Times designs of the kernel that reads one block's history for a token: heads 12, width 36, a million rows."""
import argparse, concurrent.futures, functools, json, os, sys, time
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import jax, jax.numpy as jnp, numpy as np
import designs
from tlinformer_jax.kernels import common, decode, history
from tlinformer_jax.kernels.key_value import KeyValue

flags = argparse.ArgumentParser()
flags.add_argument("--rows", type=int, default=1048576)
flags.add_argument("--length", type=int, default=999937)
flags.add_argument("--interpret", action="store_true")
flags.add_argument("--workers", type=int, default=14)
flags.add_argument("--seconds", type=float, default=80, help="no timing begins after this")
flags.add_argument("--only", default="")
flags = flags.parse_args()
HEADS, WIDTH, LOOPS = 12, 36, 1 if flags.interpret else 10
STARTED = time.perf_counter()
if flags.interpret:
    for name in ("asm", "topasm"):
        designs.CONVERT[name] = designs.CONVERT[{"asm": "unsigned", "topasm": "top"}[name]]

def say(*words):
    print(f"[{time.perf_counter() - STARTED:5.1f}]", *words, flush=True)

@jax.jit
def make_cache(key):
    shape = (1, HEADS, WIDTH, flags.rows)
    k = jax.random.split(key, 4)
    ints = [jax.random.randint(one, shape, -127, 128, jnp.int8) for one in k[:2]]
    scales = [(jax.random.uniform(one, (1, HEADS, flags.rows), jnp.float32, 0.5, 1.5) / 73).astype(jnp.bfloat16) for one in k[2:]]
    whole = [(i.astype(jnp.float32) * s.astype(jnp.float32)[:, :, None]).astype(jnp.bfloat16) for i, s in zip(ints, scales)]
    return KeyValue(*ints, *scales), KeyValue(*whole)

@jax.jit
def truth(query, cache, length):
    """float32 softmax attention in chunks, products at the highest precision."""
    chunk = min(32768, flags.rows)
    def some(start):
        def cut(a): return jax.lax.dynamic_slice_in_dim(a[0], start, chunk, axis=-1).astype(jnp.float32)
        key, value = cut(cache.key), cut(cache.value)
        if cache.key_scale is not None:
            key, value = key * cut(cache.key_scale)[:, None], value * cut(cache.value_scale)[:, None]
        scores = jnp.einsum("hd,hdk->hk", query, key, precision="highest")
        scores = jnp.where(start + jnp.arange(chunk) < length[0], scores, -jnp.inf)
        top = jnp.maximum(jnp.max(scores, axis=-1), -1e30)
        weights = jnp.exp(scores - top[:, None])
        return jnp.einsum("hk,hdk->hd", weights, value, precision="highest"), top, jnp.sum(weights, axis=-1)
    sums, tops, totals = jax.lax.map(some, jnp.arange(0, flags.rows, chunk))
    return common.merge_softmaxes(sums, tops, 0, totals)

def current(query, cache, length, *, lanes=128, warps=4, programs=1056, stages=3, interpret=False):
    """`decode.attend` of this tree with other constants, with a window of one block beside the history."""
    saved, call = (decode.LANES, decode.PROGRAMS), decode.call_kernel
    decode.LANES, decode.PROGRAMS = lanes, programs
    decode.call_kernel = lambda *a, **k: call(*a, **{**k, "num_warps": warps, "num_stages": stages})
    try:
        projected = jnp.zeros((1, 3, HEADS, WIDTH), jnp.bfloat16).at[0, 0].set(query.astype(jnp.bfloat16))
        tables = jnp.ones((1, WIDTH // 2), jnp.float32), jnp.zeros((1, WIDTH // 2), jnp.float32)
        window = KeyValue(*(jnp.zeros((1, HEADS, WIDTH, 256), jnp.bfloat16) for _ in range(2)))
        out, lse, _ = decode.attend(projected, tables, [(window, length * 0 + 128, None), (cache, length, None)], 1.0, interpret)
        return out[1, 0], lse[1, 0]
    finally:
        decode.LANES, decode.PROGRAMS = saved
        decode.call_kernel = call

def by_dot(query, cache, length, *, tile=16, rows=64, warps=4, stages=3, programs=1056, interpret=False):
    """`history.attend` for one query: a tile of 16 queries, of which one counts."""
    saved = {name: getattr(history, name) for name in ("QUERY_TILE", "ROW_TILE", "WARPS", "STAGES", "PROGRAMS")}
    for name, value in zip(saved, (tile, rows, warps, stages, programs)):
        setattr(history, name, value)
    try:
        out, lse = history.attend(jnp.pad(query, ((0, 0), (0, 4)))[None].astype(jnp.bfloat16), cache, jnp.int32(0), length[0], 1.0, interpret)
        return out[0], lse[0]
    finally:
        for name, value in saved.items():
            setattr(history, name, value)

def table():
    """(dtype, name, function)"""
    def of(kind, name, function, **options):
        text = " ".join(f"{k}={v}" for k, v in options.items())
        return kind, f"{name} {text}", functools.partial(function, interpret=flags.interpret, **options)
    own = functools.partial(of, "int8", "owned", designs.owned)
    yield of("int8", "current", current)
    yield of("bf16", "current", current)
    for convert in ("asm", "top", "magic", "topasm", "unsigned"):
        for parts in (132, 264, 88, 176):
            yield own(each=4, warps=1, parts=parts, convert=convert, style="3d")
    for parts in (528,):
        for style in ("3d", "unrolled"):
            yield own(each=4, warps=1, parts=parts, convert="asm", style=style)
    for convert in ("asm", "top"):
        for parts in (132, 264):
            yield own(each=8, warps=1, parts=parts, convert=convert, style="3d")
    for convert in ("top", "magic", "topasm", "asm"):
        for parts in (132, 176, 264):
            yield own(each=4, warps=1, parts=parts, convert=convert, style="unrolled")
    for parts in (132, 264):
        yield of("int8", "dp4a", designs.dp4a, warps=1, parts=parts)
    for convert in ("asm", "top"):
        for parts in (132, 264):
            yield own(each=4, warps=1, parts=parts, convert=convert, style="late")
    for each in (4, 2, 8):
        for parts in (132, 264, 88, 176):
            yield of("bf16", "owned", designs.owned, each=each, warps=1, parts=parts, convert="cast", style="3d")
    for parts in (132, 264):
        yield of("bf16", "owned", designs.owned, each=4, warps=1, parts=parts, convert="cast", style="late")

def repeated(function, query, cache, length):
    def again(_, carry):
        query, _ = carry
        out, lse = function(query, cache, length)
        return query + 0 * out, (out, lse)
    first = (jnp.zeros((HEADS, WIDTH), jnp.float32), jnp.zeros((HEADS,), jnp.float32))
    return jax.lax.fori_loop(0, LOOPS, again, (query, first))[1]

def main():
    say(jax.__version__, jax.devices()[0].device_kind)
    caches = dict(zip(("int8", "bf16"), make_cache(jax.random.key(0))))
    query = (jax.random.normal(jax.random.key(1), (HEADS, WIDTH)) / 2).astype(jnp.bfloat16).astype(jnp.float32)
    length = jnp.asarray([flags.length], jnp.int32)
    truths = {kind: jax.block_until_ready(truth(query, cache, length)) for kind, cache in caches.items()}
    say("truth: largest output", {k: float(jnp.abs(v[0]).max()) for k, v in truths.items()}, "log-sum-exp", float(truths["int8"][1].max()))
    size = {kind: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(c)) * flags.length / flags.rows for kind, c in caches.items()}
    say("bytes read", size)
    pool, jobs = concurrent.futures.ThreadPoolExecutor(flags.workers), []
    for kind, name, function in table():
        if flags.only and flags.only not in f"{kind} {name}":
            continue
        try:
            lowered = jax.jit(functools.partial(repeated, function)).lower(query, caches[kind], length)
            jobs.append((kind, name, pool.submit(lowered.compile)))
        except Exception as error:
            say(kind, name, "LOWERING", repr(error)[:300])
    say("lowered", len(jobs))
    records = []
    for kind, name, job in jobs:
        if time.perf_counter() - STARTED > flags.seconds:
            say("out of time before", kind, name); break
        try:
            run = job.result(timeout=60)
            arguments = query, caches[kind], length
            out, lse = jax.block_until_ready(run(*arguments))
            want, want_lse = truths[kind]
            wrong = float(jnp.abs(out - want).max() / jnp.abs(want).max()), float(jnp.abs(lse - want_lse).max())
            times = []
            for _ in range(5):
                before = time.perf_counter(); jax.block_until_ready(run(*arguments)); times.append((time.perf_counter() - before) / LOOPS)
            best, median = min(times), sorted(times)[2]
            records.append({"kind": kind, "name": name, "ms": median * 1e3, "best_ms": best * 1e3, "tb_s": size[kind] / median / 1e12, "relative_error": wrong[0], "lse_error": wrong[1]})
            say(f"{kind} {name}: {median * 1e3:.4f} ms (best {best * 1e3:.4f}), {size[kind] / median / 1e12:.2f} TB/s, error {wrong[0]:.1e} lse {wrong[1]:.1e}", "" if max(wrong) < 0.02 else "WRONG")
        except Exception as error:
            say(kind, name, "FAILED", repr(error)[:300])
        if os.environ.get("OUT"):
            with open(os.path.join(os.environ["OUT"], "micro.json"), "w") as f:
                json.dump(records, f, indent=1)
    say("sorted:")
    for r in sorted(records, key=lambda r: (r["kind"], r["ms"])):
        say(f"{r['ms']:.4f} {r['tb_s']:.2f} TB/s {r['kind']} {r['name']}")
    os._exit(0)

main()
