"""python k2_pkg.py LABEL [int8]: times and samples slide and prefill of the tlinformer_jax beside this file."""
import concurrent.futures as cf, dataclasses, json, os, pathlib, sys, time
START = time.time()
import jax, jax.numpy as jnp, numpy as np
from benchmarks.profiling import trace
import tlinformer_jax
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding import windowed
from tlinformer_jax.decoding.cache import capacity_for, init_cache, history_of
from tlinformer_jax.decoding.params import decoder_params
from tlinformer_jax.models.model import build_model
LABEL, DTYPE = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "auto"
SMALL = bool(os.environ.get("SMALL")); OUT = pathlib.Path(os.environ.get("OUT", "/tmp/k2out")); OUT.mkdir(exist_ok=True, parents=True)
def say(*a): print(f"[{LABEL} {time.time()-START:6.1f}]", *a, flush=True)
say(jax.devices(), jax.__version__, tlinformer_jax.__file__)
config = ModelConfig(d_model=48, num_heads=4, vocab_size=300, history_window=16, generation_window=16, dtype="float32") if SMALL else ModelConfig()
W = config.generation_window
LENGTHS = (3000, 500) if SMALL else tuple(int(n) for n in os.environ.get("LENGTHS", "1000000").split(","))
model = build_model(config)
typed = model.apply(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)), method=model.parameters)
typed = jax.tree.map(lambda a: a * 5 if a.ndim > 1 else a, typed)
params = jax.jit(decoder_params, static_argnums=1)(typed, config)
def lower(N):
    shape = jax.eval_shape(lambda: init_cache(config, 1, capacity_for(config, N + 3 * W), cache_dtype=DTYPE))
    i = jax.ShapeDtypeStruct((), jnp.int32); tok = jax.ShapeDtypeStruct(shape.tokens.shape[1:], jnp.int32)
    return (jax.jit(lambda p, c, r, t, n, o: windowed.prefill(p, config, c, r, t, n, o), donate_argnums=1).lower(params, shape, i, tok, i, i),
            jax.jit(lambda p, c, r, o: windowed.slide(p, config, c, r, o), donate_argnums=1).lower(params, shape, i, i))
lowered = [low for N in LENGTHS for low in lower(N)]
say("lowered")
with cf.ThreadPoolExecutor(8) as pool: programs = list(pool.map(lambda low: low.compile(), lowered))
say("compiled")
RES = {}
for number, N in enumerate(LENGTHS):
    pre, sli = programs[2 * number:2 * number + 2]
    cache = jax.jit(lambda: init_cache(config, 1, capacity_for(config, N + 3 * W), cache_dtype=DTYPE))()
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, N).astype(np.int32)
    padded = np.zeros(cache.tokens.shape[1], np.int32); padded[:N] = prompt; padded = jnp.asarray(padded)
    h = history_of(config, N); obs = np.int32(config.observed_rows(h)); obs2 = np.int32(config.observed_rows(history_of(config, h + W + 1)))
    picked = jax.jit(lambda history, context: [a[..., :h][..., ::max(1, N // 1024 + 1)].astype(jnp.float32) for a in jax.tree.leaves(history)] + [a.astype(jnp.float32) for a in jax.tree.leaves(context)])
    def prefill(cache): return pre(params, cache, np.int32(0), padded, np.int32(N), obs)
    def slide(cache): return sli(params, cache, np.int32(0), obs2)
    def rewound(cache): return jax.block_until_ready(dataclasses.replace(cache, window_length=jnp.full((1,), W, jnp.int32), history_length=jnp.full((1,), h, jnp.int32)))
    cache, logits = prefill(cache)
    mine = [np.asarray(logits)] + [np.asarray(a) for a in picked(cache.history, cache.context)]
    cache = slide(rewound(cache)); mine += [np.asarray(a) for a in picked(cache.history, cache.context)]
    kept = pathlib.Path(f"/tmp/k2truth_{DTYPE}_{N}.npz")
    if LABEL.startswith("old"): np.savez(kept, *mine)
    err = None
    if kept.exists():
        with np.load(kept) as file: truth = [file[f"arr_{i}"] for i in range(len(mine))]
        err = [[float(np.abs(a - b).max()), float(np.abs(a - b).mean() / (np.abs(b).mean() + 1e-30))] for a, b in zip(mine, truth)]
    pt, st = [], []
    many = 2 if SMALL else 12
    for _ in range(many):
        jax.block_until_ready(cache); t0 = time.perf_counter(); cache, logits = prefill(cache); jax.block_until_ready((cache, logits)); pt.append(time.perf_counter() - t0)
    for _ in range(many):
        cache = rewound(cache); t0 = time.perf_counter(); cache = slide(cache); jax.block_until_ready(cache); st.append(time.perf_counter() - t0)
    stats = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    RES[N] = {"prefill_ms": float(np.median(pt) * 1e3), "slide_ms": float(np.median(st) * 1e3), "best_ms": [min(pt) * 1e3, min(st) * 1e3], "temp_bytes": [p.memory_analysis().temp_size_in_bytes for p in (pre, sli)], "peak_bytes": stats, "max_and_relative_errors": err}
    say(f"{DTYPE} N={N} prefill {np.median(pt)*1e3:.3f} (best {min(pt)*1e3:.3f}) slide {np.median(st)*1e3:.3f} (best {min(st)*1e3:.3f}) temp {RES[N]['temp_bytes']} worst relative {max(e[1] for e in err) if err else None} logits {err[0] if err else None}")
    (OUT / f"{LABEL}_{DTYPE}.json").write_text(json.dumps(RES, indent=1))
    if os.environ.get("TABLES") and N >= 1_000_000:
        state = {"c": rewound(cache)}
        def one_slide(): state["c"] = slide(state["c"]); return state["c"]
        def one_prefill(): state["c"], l = prefill(state["c"]); return l
        for which, call in (("slide", one_slide), ("prefill", one_prefill)):
            table = trace(pathlib.Path(f"/tmp/k2trace/{LABEL}/{which}"), call, 30)
            print(f"--- {LABEL}: {which}\n{table}", flush=True)
            (OUT / f"profile_{LABEL}_{which}.txt").write_text(table)
        cache = state["c"]
    del cache
