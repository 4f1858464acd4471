import concurrent.futures as cf, dataclasses, functools, json, os, pathlib, sys, time
START = time.time()
import jax, jax.numpy as jnp, numpy as np
import k2_patch as patch
from benchmarks.profiling import trace
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding import windowed
from tlinformer_jax.decoding.cache import capacity_for, init_cache, history_of
from tlinformer_jax.decoding.params import decoder_params
from tlinformer_jax.models.model import build_model
SMALL = bool(os.environ.get("SMALL")); OUT = pathlib.Path(os.environ.get("OUT", "/tmp/k2out")); OUT.mkdir(exist_ok=True, parents=True)
def say(*a): print(f"[{time.time()-START:6.1f}]", *a, flush=True)
say(jax.devices(), jax.__version__)
NAMES = [n for n in os.environ.get("DESIGNS", ";".join(patch.DESIGNS)).split(";")]
PROFILED = os.environ.get("PROFILED", "base;all").split(";")
config = ModelConfig(d_model=48, num_heads=4, vocab_size=300, history_window=16, generation_window=16, dtype="float32") if SMALL else ModelConfig()
N = 3000 if SMALL else 1_000_000
W = config.generation_window
model = build_model(config)
typed = model.apply(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)), method=model.parameters)
# Weights ten times as large as at the start of training, so that attention is not uniform.
typed = jax.tree.map(lambda a: a * 5 if a.ndim > 1 else a, typed)
params = jax.jit(decoder_params, static_argnums=1)(typed, config)
prompt = np.random.default_rng(0).integers(0, config.vocab_size, N).astype(np.int32)
RES = {}
def write(): (OUT / "e2e.json").write_text(json.dumps(RES, indent=1))
capacity = None
lowered = {}
for name in NAMES:
    patch.use(name)
    capacity = capacity_for(config, N + 3 * W)
    shape = jax.eval_shape(lambda: init_cache(config, 1, capacity))
    i = jax.ShapeDtypeStruct((), jnp.int32)
    tok = jax.ShapeDtypeStruct(shape.tokens.shape[1:], jnp.int32)
    pre = jax.jit(lambda p, c, r, t, n, o: windowed.prefill(p, config, c, r, t, n, o), donate_argnums=1).lower(params, shape, i, tok, i, i)
    sli = jax.jit(lambda p, c, r, o: windowed.slide(p, config, c, r, o), donate_argnums=1).lower(params, shape, i, i)
    lowered[name] = pre, sli, capacity
    say("lowered", name)
patch.reset()
def compiled(item):
    name, which = item
    t0 = time.time()
    try: return lowered[name][which].compile(), time.time() - t0
    except Exception as e: return f"{type(e).__name__}: {str(e)[:300]}", time.time() - t0
programs = {}
def compile_all(names):
    items = [(n, w) for n in names for w in (0, 1)]
    with cf.ThreadPoolExecutor(10) as pool: programs.update(zip(items, pool.map(compiled, items)))
    say("compiled", {f"{n} {w}": round(programs[n, w][1], 1) for n, w in items})
picked = jax.jit(lambda history, context: [a[..., :N // W * W - W][..., ::977].astype(jnp.float32) for a in jax.tree.leaves(history)] + [a.astype(jnp.float32) for a in jax.tree.leaves(context)])
def sample(cache): return [np.asarray(a) for a in picked(cache.history, cache.context)]
def errors(found, expected):
    return [[float(np.abs(a - b).max()), float(np.abs(a - b).mean() / np.abs(b).mean())] for a, b in zip(found, expected)]
truth = None
run = {}
def fresh(n): return jax.jit(lambda: init_cache(config, 1, lowered[n][2]))()
TOGETHER = int(os.environ.get("TOGETHER", "2"))
for number, name in enumerate(NAMES):
    if number % TOGETHER == 0: compile_all(NAMES[number:number + TOGETHER])
    (pre, _), (sli, _) = programs[name, 0], programs[name, 1]
    if isinstance(pre, str) or isinstance(sli, str):
        say(name, "FAILED", pre if isinstance(pre, str) else sli); continue
    cache = fresh(name)
    padded = np.zeros(cache.tokens.shape[1], np.int32); padded[:N] = prompt; padded = jnp.asarray(padded)
    h = history_of(config, N); obs = np.int32(config.observed_rows(h))
    def prefill(cache): return pre(params, cache, np.int32(0), padded, np.int32(N), obs)
    cache, logits = prefill(cache)
    say(name, "prefilled")
    mine = [np.asarray(logits)] + sample(cache)
    def rewound(cache): return jax.block_until_ready(dataclasses.replace(cache, window_length=jnp.full((1,), W, jnp.int32), history_length=jnp.full((1,), h, jnp.int32)))
    obs2 = np.int32(config.observed_rows(history_of(config, h + W + 1)))
    def slide(cache): return sli(params, cache, np.int32(0), obs2)
    cache = slide(rewound(cache))
    mine += sample(cache)
    if truth is None: truth = mine
    err = errors(mine, truth)
    pt, st = [], []
    for _ in range(2 if SMALL else 10):
        jax.block_until_ready(cache); t0 = time.perf_counter(); cache, logits = prefill(cache); jax.block_until_ready((cache, logits)); pt.append(time.perf_counter() - t0)
    for _ in range(2 if SMALL else 14):
        cache = rewound(cache); t0 = time.perf_counter(); cache = slide(cache); jax.block_until_ready(cache); st.append(time.perf_counter() - t0)
    RES[name] = {"prefill_ms": float(np.median(pt) * 1e3), "slide_ms": float(np.median(st) * 1e3), "best": [min(pt) * 1e3, min(st) * 1e3], "max_and_relative_errors": err}
    say(f"{name:30s} prefill {np.median(pt)*1e3:.3f} (best {min(pt)*1e3:.3f})  slide {np.median(st)*1e3:.3f} (best {min(st)*1e3:.3f})  worst relative error {max(e[1] for e in err):.2e}, logits {err[0]}")
    if name in PROFILED:
        state = {"c": rewound(cache)}
        def one_slide(): state["c"] = slide(state["c"]); return state["c"]
        def one_prefill(): state["c"], l = prefill(state["c"]); return l
        for which, call in (("slide", one_slide), ("prefill", one_prefill)):
            table = trace(pathlib.Path(f"/tmp/k2trace/{name}/{which}"), call, 34)
            print(f"--- {name}: {which}\n{table}", flush=True)
            (OUT / f"profile_{name.split(',')[0]}_{which}.txt").write_text(table)
        cache = state["c"]
    write()
    jax.tree.map(lambda a: a.delete(), cache)
    for a in jax.tree.leaves(cache): pass
say("done")
