"""Compares `decode.attend` on this device with float64-like plain JAX, for widths, dtypes and lengths."""
import concurrent.futures, functools, json, os, sys, time
import jax, jax.numpy as jnp, numpy as np
from tlinformer_jax.kernels import decode
from tlinformer_jax.kernels.key_value import KeyValue, quantised
from tlinformer_jax.models.cached_rows import CachedRows, _softmax_sum
from tlinformer_jax.models.rope import rope_table, rotate
INTERPRET = "--interpret" in sys.argv
START = time.perf_counter()
def say(*w): print(f"[{time.perf_counter() - START:5.1f}]", *w, flush=True)
BATCH, HEADS = 3, 2
def case(width, kind, rows):
    k = jax.random.split(jax.random.key(width + rows), 8)
    dtype = {"int8": jnp.bfloat16}.get(kind, jnp.dtype(kind) if kind != "int8" else None)
    normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float32).astype(dtype)
    window = KeyValue(normal(k[0], 2, BATCH, HEADS, width, 256), normal(k[1], 2, BATCH, HEADS, width, 256))
    history = KeyValue(normal(k[2], BATCH, HEADS, width, rows), normal(k[3], BATCH, HEADS, width, rows))
    if kind == "int8":
        (a, b), (c, d) = quantised(history.key), quantised(history.value)
        history = KeyValue(a, c, b, d)
    return normal(k[4], BATCH, 3, HEADS, width), window, history
def run(interpret, width, projected, window, history, lengths, long):
    rope = rope_table(jnp.arange(BATCH) * 1000 + 7, width)
    return decode.attend(projected, (rope.cos, rope.sin), [(window, lengths, 1), (history, long, None)], width**-0.5, interpret)
def plain(width, projected, window, history, lengths, long):
    rope = rope_table(jnp.arange(BATCH) * 1000 + 7, width)
    tables = jax.tree.map(lambda t: t[:, None], rope)
    query, key = (rotate(projected[:, None, i], tables)[:, 0] for i in range(2))
    own = KeyValue(*(x.astype(jnp.float32) for x in (key, projected[:, 2])))
    wide = lambda c: KeyValue(*(x.astype(jnp.float32) for x in (c.key, c.value))) if c.key_scale is None else c.widened(jnp.float32)
    q = query.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        out = [_softmax_sum(q, CachedRows(wide(window), lengths, 1), own, width**-0.5), _softmax_sum(q, CachedRows(wide(history), long), None, width**-0.5)]
    return jnp.stack([o for o, _ in out]), jnp.stack([l for _, l in out]), key
def main():
    say(jax.__version__, jax.devices()[0].device_kind)
    pool, jobs = concurrent.futures.ThreadPoolExecutor(14), []
    combos = [(w, k, r) for w in (36, 12, 64, 128, 80, 256) for k in ("int8", "bfloat16", "float32", "float16") for r in (128, 40960) if not (w in (80, 256) and k in ("float32", "float16"))]
    for w, k, r in combos:
        args = *case(w, k, r), jnp.asarray([0, 255, 130], jnp.int32), jnp.asarray([r, 0, min(r - 27, 1001)], jnp.int32)
        lowered = jax.jit(functools.partial(run, INTERPRET, w)).lower(*args)
        jobs.append((w, k, r, args, pool.submit(lowered.compile)))
    say("lowered", len(jobs))
    bad = 0
    for w, k, r, args, job in jobs:
        try:
            out, lse, key = job.result()(*args)
            o2, l2, k2 = jax.jit(functools.partial(plain, w))(*args)
            empty = np.isneginf(np.asarray(l2))
            same = (np.isneginf(np.asarray(lse)) == empty).all()
            errors = float(jnp.abs(out - o2).max()), float(np.abs(np.where(empty, 0, np.asarray(lse) - np.where(empty, 0, np.asarray(l2)))).max()) if same else float("nan"), float(jnp.abs(key.astype(jnp.float32) - k2.astype(jnp.float32)).max())
            ok = errors[0] < 1e-4 and errors[1] < 1e-4 and errors[2] < 0.04
            bad += not ok
            say(w, k, r, "output %.1e lse %.1e own key %.1e" % errors, "" if ok else "WRONG")
        except Exception as error:
            bad += 1; say(w, k, r, "FAILED", repr(error)[:300])
    say("bad:", bad); os._exit(0)
main()
