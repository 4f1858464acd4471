import concurrent.futures as cf, contextlib, dataclasses, functools, json, os, pathlib, sys, time
START = time.time()
sys.path.append("/tmp/carry")
try: from alone import alone
except ImportError:
    @contextlib.contextmanager
    def alone(settle=0): yield
import jax, jax.numpy as jnp, numpy as np
import k2_variants as v, slide_patch as patch, slide_variants as s
from benchmarks.timing import time_calls
from benchmarks.profiling import trace
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding import windowed
from tlinformer_jax.decoding.cache import capacity_for, init_cache, history_of
from tlinformer_jax.decoding.decoder import step
from tlinformer_jax.decoding.params import decoder_params
from tlinformer_jax.kernels import history as base
from tlinformer_jax.kernels.key_value import KeyValue
from tlinformer_jax.models.layers import layer_norm
from tlinformer_jax.models.model import build_model
from tlinformer_jax.models.rope import rope_table, rotate
SMALL = bool(os.environ.get("SMALL")); OUT = pathlib.Path(os.environ.get("OUT", "/tmp/slideout")); OUT.mkdir(exist_ok=True, parents=True)
HELD = [0.0]
@contextlib.contextmanager
def held():
    with alone():
        t = time.time()
        try: yield
        finally: HELD[0] += time.time() - t
def say(*a): print(f"[{time.time()-START:6.1f}]", *a, flush=True)
say(jax.devices(), jax.__version__)
patch.INTERPRET = SMALL
RES = {"micro_us_for_32768_rows_or_call": {}, "designs": {}}
def write(): (OUT / "slide.json").write_text(json.dumps(RES, indent=1))
POOL = cf.ThreadPoolExecutor(1 if SMALL else 15)

# ---- e2e: lowering of a design
config = ModelConfig(d_model=48, num_heads=4, vocab_size=60, history_window=16, generation_window=16, dtype="float32") if SMALL else ModelConfig()
LENGTHS = (1500, 90, 1700) if SMALL else (1_000_000, 100_000, 1_050_000)
W = config.generation_window
model = build_model(config)
typed = model.apply(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)), method=model.parameters)
typed = jax.tree.map(lambda a: a * 5 if a.ndim > 1 else a, typed)  # so that attention is not uniform
params = jax.jit(decoder_params, static_argnums=1)(typed, config)
if SMALL: # all sizes of tiles at the tiny shape
    patch.OPTIONS.update(project=dict(pt=8, rt=16, kt=16), aligned=dict(rt=16, unit=1), pairs=dict(pt=8, rt=16, unit=1), few=dict(block=16, qt=16, ones=True, kt=64), norm=dict(rows=4, warps=4), gated=dict(bm=16, bn=16, bk=16))
PROGRAMS, CAPACITY = {}, {}
def compiled(low, options=None):
    t = time.time()
    try: return low.compile(compiler_options=None if SMALL else options), time.time() - t
    except Exception as e: return f"{type(e).__name__}: {str(e)[:300]}", time.time() - t
def idle():
    """Waits for all compilations, which also use the GPU."""
    cf.wait([f for pair in PROGRAMS.values() for f in pair]); say("nothing compiles")
def submit(name, N):
    try:
        patch.use(name)
        shape = jax.eval_shape(lambda: init_cache(config, 1, capacity_for(config, N + 3 * W)))
        i = jax.ShapeDtypeStruct((), jnp.int32); tok = jax.ShapeDtypeStruct(shape.tokens.shape[1:], jnp.int32)
        pre = jax.jit(lambda p, c, r, t, n, o: windowed.prefill(p, config, c, r, t, n, o), donate_argnums=1).lower(params, shape, i, tok, i, i)
        sli = jax.jit(lambda p, c, r, o: windowed.slide(p, config, c, r, o), donate_argnums=1).lower(params, shape, i, i)
        PROGRAMS[name, N] = POOL.submit(compiled, pre, patch.COMPILER.get(name)), POOL.submit(compiled, sli, patch.COMPILER.get(name))
        CAPACITY[name, N] = capacity_for(config, N + 3 * W)
        say("lowered", name, N)
    except Exception as e:
        say("LOWERING FAILED", name, N, f"{type(e).__name__}: {str(e)[:400]}")
        if SMALL: raise
    finally: patch.reset()
patch.kernel_chunk = None
if SMALL:
    import tlinformer_jax.decoding.cache as cm
    cm.CHUNK_ROWS = patch.ORIGINAL[12] ; patch.ORIGINAL[12] = 64; patch.reset()
for N in LENGTHS:
    for name in ("base", "plain") if N == LENGTHS[0] else ("base",): submit(name, N)

# ---- kernels alone
def micro():
    H, d, w, D, F, V, ROOM, n = (4, 12, 16, 48, 64, 60, 1024, 256) if SMALL else (12, 36, 40, 432, 1280, 50257, 1_048_576, 65536)
    dt = jnp.float32 if SMALL else jnp.bfloat16
    key = iter(jax.random.split(jax.random.key(0), 60))
    def rnd(*shape, t=dt, scale=1.0): return jax.jit(lambda k: (jax.random.normal(k, shape, jnp.float32) * scale).astype(t))(next(key))
    hold = {"cache": KeyValue(rnd(1, H, d, ROOM), rnd(1, H, d, ROOM))}
    x, kernel, bias = rnd(n, D), rnd(D, 2, H, w, scale=0.05), rnd(2, H, w)
    weights, wbias = jax.jit(s.prepared, static_argnums=2)(kernel, bias, d)
    kT = jax.jit(lambda k: jnp.moveaxis(k[..., :d], 0, -1))(kernel)
    table = rnd(V, D)
    words = jax.jit(lambda t: jnp.einsum("nd,dphk->nphk", t, kernel))(table)
    pairs = jax.jit(v.pairs_table, static_argnums=2)(words, bias, d)
    tokens = jax.random.randint(next(key), (n,), 0, V)
    rope = jax.jit(lambda: rope_table(500_000 + jnp.arange(n), d))(); tT = (rope.cos.T, rope.sin.T); tabs = (rope.cos, rope.sin)
    kvt = jax.jit(lambda x: jnp.einsum("phkd,nd->phkn", kT, x))(x)
    zero, start = jnp.int32(0), jnp.int32(ROOM // 2)
    gu = rnd(D, 2, F, scale=0.05)
    q256, q512 = rnd(256, H, w), rnd(512, H, w); length = jnp.int32(ROOM - 70); SC = d ** -0.5
    kz, vz, qn = rnd(H, d, 256), rnd(H, d, 256), rnd(n if SMALL else 32768, H, w)
    I = {"interpret": True} if SMALL else {}
    J = []  # kind, name, function, args, donated, options
    def add(kind, name, fn, args, donated=False, **o): J.append((kind, name, functools.partial(fn, **o), args, donated, o))
    bd = bias[..., :d]
    def by_xla(c, x, k): return v.store_xla(c, jnp.einsum("phkd,nd->phkn", k, x), bd, tT, zero, start)
    add("store", "store by XLA", lambda c, p: v.store_xla(c, p, bd, tT, zero, start), (kvt,), True)
    for rt, wp, un in ((128, 4, 1),) if SMALL else ((1024,4,0),(1024,4,1),(512,4,1),(2048,4,1),(1024,8,1),(512,2,1)):
        add("store", f"aligned rt{rt} w{wp} u{un}", lambda c, p, **o: s.store_aligned(c, p, bd, tT, zero, start, **o, **I), (kvt,), True, rt=rt, warps=wp, unit=un)
    add("words", "store of the package", lambda c, t, k: base.store(c, t, bias, tabs, zero, start, k, **I), (words, tokens), True)
    for pt, rt, wp, od, un in ((8, 64, 4, 0, 1),) if SMALL else ((128,32,4,0,0),(128,32,4,0,1),(128,32,4,1,1),(128,32,8,0,1),(128,64,8,0,1),(256,32,8,0,1),(256,16,4,0,1),(128,16,4,0,1),(256,16,8,0,1),(256,32,4,0,1),(64,32,4,0,1)):
        add("words", f"pairs pt{pt} rt{rt} w{wp} o{od} u{un}", lambda c, t, k, **o: s.store_pairs(c, t, tT, zero, start, k, **o, **I), (pairs, tokens), True, pt=pt, rt=rt, warps=wp, order=od, unit=un)
    def arguments(job): return ((hold["cache"], *job[3]) if job[4] else (job[3][0], hold["cache"], *job[3][1:]) if job[0].startswith("attend") else job[3])
    def build(job):
        try: return (jax.jit(job[2], donate_argnums=0) if job[4] else jax.jit(job[2])).lower(*arguments(job)).compile()
        except Exception as e: return f"{type(e).__name__} {str(e)[:200]}"
    futures = [POOL.submit(build, job) for job in J]
    built = [f.result() for f in futures]
    say("compiled", len(J), "kernels")
    truth, best = {}, {}
    def run(kind, name, args, donated, program, o, timed):
        if donated:
            hold["cache"] = program(hold["cache"], *args)
            out = [np.asarray(a[..., int(start):int(start) + n:97], np.float32) for a in jax.tree.leaves(hold["cache"])]
        else: out = [np.asarray(a[..., :d] if kind == "few" else a, np.float32)[:: 37 if a.shape[0] > 4096 else 1] for a in jax.tree.leaves(program(*arguments(("few" if kind == "few" else kind, name, None, args, donated))))]
        key = {"store": "project"}.get(kind, kind)
        errors = [float(np.abs(a - b).max()) for a, b in zip(out, truth.setdefault(key, out))]
        return errors
    ok = []
    for (kind, name, _, args, donated, o), program in zip(J, built):
        if isinstance(program, str): say(name, "FAILED", program); RES["micro_us_for_32768_rows_or_call"][name] = program; continue
        try:
            errors = run(kind, name, args, donated, program, o, False)
            top = max(float(np.abs(a).max()) for a in truth[{"store": "project"}.get(kind, kind)])
            if not all(np.isfinite(errors)) or max(errors) > 0.05 * top: say(name, "WRONG", errors, top); RES["micro_us_for_32768_rows_or_call"][name] = ["wrong", errors]; continue
            ok.append((kind, name, args, donated, o, program, errors))
        except Exception as e: say(name, "RUN FAILED", str(e)[:200])
    idle()
    with held():
        for kind, name, args, donated, o, program, errors in ok:
            shortest = 1e9
            for _ in range(1 if SMALL else 4):
                jax.block_until_ready(hold["cache"]); t0 = time.perf_counter(); reps = 1 if SMALL else (4 if kind.startswith("attend") else 10)
                for _ in range(reps):
                    if donated: hold["cache"] = program(hold["cache"], *args)
                    else: y = program(*arguments((kind, name, None, args, donated)))
                jax.block_until_ready(hold["cache"] if donated else y); shortest = min(shortest, (time.perf_counter() - t0) / reps)
            us = shortest * 1e6 / (1 if kind == "few" or kind.startswith("attend") else n / 32768)
            RES["micro_us_for_32768_rows_or_call"][name] = [round(us, 2), errors]
            say(f"{name:45s} {us:9.2f} us  err {[round(e, 5) for e in errors]}")
            if o and us < best.get(kind, (1e9,))[0]: best[kind] = (us, o, name)
    write()
    return best
best = micro()
say("best", {k: (round(b[0], 1), b[2]) for k, b in best.items()})
if not SMALL:
    M = RES["micro_us_for_32768_rows_or_call"]
    def chosen(prefix, names):
        found = {k: b[0] for k, b in M.items() if k.startswith(prefix) and k.endswith("u1") and isinstance(b[0], float)}
        return dict(zip(names, (int(p.lstrip("ptrwou")) for p in min(found, key=found.get).split()[1:])))
    patch.OPTIONS["aligned"] = chosen("aligned", ("rt", "warps", "unit"))
    patch.OPTIONS["pairs"] = chosen("pairs", ("pt", "rt", "warps", "order", "unit"))
say("options", patch.OPTIONS); RES["options"] = {k: str(o) for k, o in patch.OPTIONS.items()}
# ---- designs
NAMES = os.environ.get("DESIGNS", "store;store, tail;store, tail, norms;store, tail, graphs;store, graphs;store, loops in graphs;store, ones, loops in graphs;base, loops in graphs").split(";")
for name in NAMES: submit(name, LENGTHS[0])
LAST = "store, tail"
for N in LENGTHS[1:]: submit(LAST, N)
step_jit = jax.jit(lambda p, c, t, a: step(p, config, c, t, a)[1])

def measure(name, N, truth, budget=0.35):
    (pre, t1), (sli, t2) = (f.result() for f in PROGRAMS[name, N])
    if isinstance(pre, str) or isinstance(sli, str): say(name, "FAILED", pre if isinstance(pre, str) else sli); return None
    state = {"c": jax.jit(lambda: init_cache(config, 1, CAPACITY[name, N]))()}
    padded = np.zeros(state["c"].tokens.shape[1], np.int32); padded[:N] = np.random.default_rng(0).integers(0, config.vocab_size, N); padded = jnp.asarray(padded)
    h = history_of(config, N); obs, obs2 = np.int32(config.observed_rows(h)), np.int32(config.observed_rows(history_of(config, h + W + 1)))
    picked = jax.jit(lambda history, context: [a[..., :h][..., ::max(1, N // 1024 + 1)].astype(jnp.float32) for a in jax.tree.leaves(history)] + [a.astype(jnp.float32) for a in jax.tree.leaves(context)])
    def prefill():
        state["c"], state["logits"] = pre(params, state["c"], np.int32(0), padded, np.int32(N), obs); return state["c"], state["logits"]
    def rewind():
        state["c"] = dataclasses.replace(state["c"], window_length=jnp.full((1,), W, jnp.int32), history_length=jnp.full((1,), h, jnp.int32)); return state["c"]
    def slide():
        state["c"] = sli(params, state["c"], np.int32(0), obs2); return state["c"]
    prefill(); mine = [np.asarray(state["logits"])] + [np.asarray(a) for a in picked(state["c"].history, state["c"].context)]
    rewind(); slide(); mine += [np.asarray(a) for a in picked(state["c"].history, state["c"].context)]
    after = np.asarray(step_jit(params, state["c"], jnp.asarray([7], jnp.int32), jnp.asarray([True])))
    mine = [mine[0], after] + mine[1:]
    errors = [[float(np.abs(a - b).max()), float(np.abs(a - b).mean() / (np.abs(b).mean() + 1e-30))] for a, b in zip(mine, truth or mine)]
    with held():
        p = time_calls(prefill, budget if not SMALL else 0, compiled=True); q = time_calls(slide, budget if not SMALL else 0, prepare=rewind, compiled=True)
    row = {"prefill_ms": p.median * 1e3, "slide_ms": q.median * 1e3, "best_ms": [p.best * 1e3, q.best * 1e3], "calls": [len(p.seconds), len(q.seconds)], "temp_bytes": [x.memory_analysis().temp_size_in_bytes for x in (pre, sli)] if not SMALL else None, "compile_s": [round(t1, 1), round(t2, 1)], "logits_after_prefill": errors[0], "logits_after_slide": errors[1], "worst_relative": max(e[1] for e in errors), "worst_max": max(e[0] for e in errors[2:])}
    say(f"{name} N={N}: prefill {row['prefill_ms']:.3f} (best {p.best*1e3:.3f}) slide {row['slide_ms']:.3f} (best {q.best*1e3:.3f}) against plain: logits {errors[0]} {errors[1]} worst {row['worst_relative']:.4f} {row['worst_max']:.4f} temp {row['temp_bytes']} held {HELD[0]:.1f}")
    RES["designs"].setdefault(f"{name} {N}", []).append(row); write()
    if N == LENGTHS[0] and name in os.environ.get("PROFILED", "store, tail, norms").split(";") and not SMALL:
        rewind()
        with held():
            for which, call in (("slide", slide), ("prefill", lambda: prefill()[1])):
                table = trace(pathlib.Path(f"/tmp/slidetrace/{which}"), call, 34)
                print(f"--- {name}: {which}\n{table}", flush=True); (OUT / f"profile_{which}.txt").write_text(table)
    jax.tree.map(lambda a: a.delete(), state.pop("c"))
    return mine
idle()
truth = {}
truth[LENGTHS[0]] = measure("plain", LENGTHS[0], None, 0.1)
RISKY = [name for name in NAMES if "graphs" in name]
for name in ["base", *[n for n in NAMES if n not in RISKY], "base"]:
    if (name, LENGTHS[0]) in PROGRAMS:
        try: measure(name, LENGTHS[0], truth[LENGTHS[0]])
        except Exception as e: say(name, "RUN FAILED", f"{type(e).__name__}: {str(e)[:400]}")
        if SMALL and name not in ("base",): pass
for N in LENGTHS[1:]:
    truth[N] = measure("base", N, None, 0.25)
    for name in (LAST, "base"):
        if (name, N) in PROGRAMS: measure(name, N, truth[N], 0.25)
for name in [*RISKY, "store, tail"]:
    try: measure(name, LENGTHS[0], truth[LENGTHS[0]])
    except Exception as e: say(name, "RUN FAILED", f"{type(e).__name__}: {str(e)[:400]}")
say("done, held", HELD[0])
