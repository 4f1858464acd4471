import concurrent.futures as cf, json, os, pathlib, sys, time
START = time.time()
import jax, jax.numpy as jnp, numpy as np, functools
import k2_variants as v
from tlinformer_jax.kernels import history as base
from tlinformer_jax.kernels.key_value import KeyValue
from tlinformer_jax.models.rope import rope_table, rotate
SMALL = bool(os.environ.get("SMALL")); OUT = pathlib.Path(os.environ.get("OUT", "/tmp/k2out")); OUT.mkdir(exist_ok=True, parents=True)
I = SMALL
RES = {}
def say(*a): print(f"[{time.time()-START:6.1f}]", *a, flush=True)
say(jax.devices(), jax.__version__)
dt = jnp.float32 if SMALL else jnp.bfloat16
ROOM, V = (2048, 500) if SMALL else (1_048_576, 50257)
N = 256 if SMALL else 131072
H, d, w = (2, 12, 16) if SMALL else (12, 36, 40)
D, F = (48, 256) if SMALL else (432, 1280)
key = iter(jax.random.split(jax.random.key(0), 40))
def rnd(*shape, s=1.0, t=None): return jax.jit(lambda k: (jax.random.normal(k, shape, jnp.bfloat16 if not SMALL else jnp.float32) * s).astype(t or dt))(next(key))
cache = KeyValue(rnd(1, H, d, ROOM), rnd(1, H, d, ROOM))
q256, q512 = rnd(256, H, w), rnd(512, H, w)
zero, length = jnp.int32(0), jnp.int32(ROOM - 70)
kz, vz = rnd(H, d, 256), rnd(H, d, 256)
table, tableu = rnd(V, H, w), None
tableu = table[..., :d]
tokens = jax.random.randint(next(key), (N,), 0, V)
rope = jax.jit(lambda: rope_table(500_000 + jnp.arange(N), d))()
tabs, tabsT = (rope.cos, rope.sin), (rope.cos.T, rope.sin.T)
qn = jax.jit(lambda t, k: rotate(jnp.take(t, k, axis=0, mode="clip")[None], rope)[0])(table, tokens)
kv_words, kv_rows, kv_t = rnd(V, 2, H, w), rnd(N, 2, H, w), None
kv_wordsu = kv_words[..., :d]
kv_t = jnp.moveaxis(kv_rows[..., :d], 0, -1)
bias = rnd(2, H, w)
x, gu = rnd(N, D), rnd(D, 2, F, s=0.05)
SC = 1 / 6
start = jnp.int32(ROOM // 2)
CASES = {}   # name -> (function, args, donated cache?)
for tag, q in (("256", q256), ("512", q512)):
    CASES[f"compress{tag} base"] = (lambda q, c, r, l: base.attend(q, c, r, l, SC, interpret=I), (q, cache, zero, length))
    for qt, rt, wp, st, ftz, pr, sub in ((64,64,4,3,False,1056,1),(64,64,4,3,True,1056,1),(64,64,4,2,True,1056,1),(128,64,8,3,True,1056,1),(64,128,4,2,True,1056,1),(64,64,4,3,True,2112,1),(64,64,4,2,True,1056,2)):
        CASES[f"compress{tag} qt{qt} rt{rt} w{wp} s{st} ftz{int(ftz)} p{pr} sub{sub}"] = (functools.partial(
            lambda q, c, r, l, **k: v.attend(q, c, r, l, SC, interpret=I, **k), qt=qt, rt=rt, warps=wp, stages=st, ftz=ftz, programs=pr, sub=sub), (q, cache, zero, length))
n256 = jnp.int32(256)
for tag, q in (("256", q256), ("512", q512)):
    for qt, rt, wp, st in ((64,64,4,3),(64,64,4,2),(64,128,4,2),(128,64,8,3)):
        CASES[f"compress{tag} pipe qt{qt} rt{rt} w{wp} s{st}"] = (functools.partial(lambda q, c, r, l, **k: v.attend(q, c, r, l, SC, pipe=True, interpret=I, **k), qt=qt, rt=rt, warps=wp, stages=st), (q, cache, zero, length))
CASES["few base"] = (lambda q, k, val, n: base.attend_few(q, k, val, n, SC, interpret=I), (qn, kz, vz, n256))
for qt, wp, st, bl, ftz, kt, on in ((64,4,3,64,True,64,False),(64,4,3,64,False,256,False),(64,4,3,512,True,256,False),(64,4,3,512,True,256,True),(64,4,1,1024,True,256,True),(64,4,3,256,True,256,True),(128,8,2,1024,True,256,True),(64,4,2,512,True,128,True),(64,4,2,512,True,64,True),(128,8,2,512,True,64,True)):
    CASES[f"few qt{qt} w{wp} s{st} b{bl} ftz{int(ftz)} kt{kt} ones{int(on)}"] = (functools.partial(lambda q, k, val, n, **o: v.few(q, k, val, n, SC, interpret=I, **o), qt=qt, warps=wp, stages=st, block=bl, ftz=ftz, kt=kt, ones=on), (qn, kz, vz, n256))
CASES["few lookup by xla alone"] = (lambda t, k: rotate(jnp.take(t, k, axis=0, mode="clip")[None], rope)[0], (table, tokens))
for qt, wp, st, bl, kt in ((64,4,2,512,256),(64,4,1,512,256),(128,8,2,1024,256),(64,4,2,512,64)):
    CASES[f"few+lookup qt{qt} w{wp} s{st} b{bl} kt{kt} ones1"] = (functools.partial(lambda q, k, val, n, tok, **o: v.few(q, k, val, n, SC, tokens=tok, tables=tabs, ones=True, interpret=I, **o), qt=qt, warps=wp, stages=st, block=bl, kt=kt), (table, kz, vz, n256, tokens))
DON = {"store rows base": (lambda c, p: base.store(c, p, bias, tabs, zero, start, interpret=I), (kv_rows,)),
       "store words base": (lambda c, p, t: base.store(c, p, bias, tabs, zero, start, t, interpret=I), (kv_words, tokens)),
       "store T xla": (lambda c, p: v.store_xla(c, p, bias[..., :d], tabsT, zero, start), (kv_t,)),
       "store T pallas": (lambda c, p: v.store_t(c, p, bias[..., :d], tabsT, zero, start, rt=128 if I else 1024, interpret=I), (kv_t,))}
for ft, rt, wp in ((64,64,4),(128,64,4),(128,128,8),(64,128,4),(32,64,4),(128,32,4)):
    DON[f"store rows flat ft{ft} rt{rt} w{wp}"] = (functools.partial(lambda c, p, **o: v.store_flat(c, p, bias, tabs, zero, start, interpret=I, **o), ft=ft, rt=rt, warps=wp), (kv_rows,))
    DON[f"store words flat ft{ft} rt{rt} w{wp}"] = (functools.partial(lambda c, p, t, **o: v.store_flat(c, p, bias, tabs, zero, start, t, interpret=I, **o), ft=ft, rt=rt, warps=wp), (kv_wordsu, tokens))
def plain_gated(x, k):
    g = jnp.einsum("ld,dpf->lpf", x, k); return jax.nn.silu(g[:, 0]) * g[:, 1]
CASES["gate_up xla"] = (plain_gated, (x, gu))
CASES["gate_up product only"] = (lambda x, k: jnp.einsum("ld,dpf->lpf", x, k), (x, gu))
if not SMALL:
    for bm, bn, bk, wp, st, od in ((128,128,64,8,3,0),(128,128,64,8,4,1),(128,64,64,4,4,1),(128,64,64,4,3,0),(128,128,32,8,4,1),(256,64,64,8,3,1)):
        CASES[f"gate_up triton bm{bm} bn{bn} bk{bk} w{wp} s{st} o{od}"] = (functools.partial(lambda x, k, **o: v.gated(x, k, **o), bm=bm, bn=bn, bk=bk, warps=wp, stages=st, order=od), (x, gu))
else:
    CASES["gate_up triton"] = (lambda x, k: v.gated(x, k, bm=64, bn=64, bk=32, interpret=True), (x, gu))
kvw, kvwu = rnd(D, 2, H, w, s=0.05), None
kvwu = kvw[..., :d]
CASES["kv product padded"] = (lambda x, k: jnp.einsum("ld,dphk->lphk", x, k), (x, kvw))
CASES["kv product T"] = (lambda x, k: jnp.einsum("dphk,ld->phkl", k, x), (x, kvwu))
CASES["down product"] = (lambda h, k: h @ k, (rnd(N, F), rnd(F, D, s=0.05)))
CASES["out product padded"] = (lambda h, k: h @ k, (rnd(N, H * w), rnd(H * w, D, s=0.05)))
CASES["out product unpadded"] = (lambda h, k: h @ k, (rnd(N, H * d), rnd(H * d, D, s=0.05)))
jax.block_until_ready((x, gu, kv_t, qn))
only = os.environ.get("ONLY")
say("cases", len(CASES) + len(DON))
def build(item):
    name, (fn, args), donated = item
    t0 = time.time()
    try:
        if donated: c = jax.jit(fn, donate_argnums=0).lower(cache, *args).compile()
        else: c = jax.jit(fn).lower(*args).compile()
        return name, c, time.time() - t0
    except Exception as e:
        return name, f"{type(e).__name__}: {str(e)[:160]}", time.time() - t0
jobs = [(n, c, False) for n, c in CASES.items()] + [(n, c, True) for n, c in DON.items()]
if only: jobs = [j for j in jobs if only in j[0]]
if SMALL and "ONLY" not in os.environ: pass
with cf.ThreadPoolExecutor(1 if SMALL else 14) as pool: built = list(pool.map(build, jobs))
say("compiled")
ref = {}
def close(kind, out):
    out = [np.asarray(a, np.float32) for a in jax.tree.leaves(out)]
    out = [a[..., :d] if a.shape[-1:] == (w,) else a for a in out]
    if kind not in ref: ref[kind] = out; return 0.0
    return max(float(np.nanmax(np.abs(a - b) / (1 + np.abs(b)))) for a, b in zip(ref[kind], out)) if all(a.shape == b.shape for a, b in zip(ref[kind], out)) else "shape"
for (name, (fn, args), donated), (_, c, took) in zip(jobs, built):
    if isinstance(c, str): say(f"{name:50s} FAILED {c}"); RES[name] = c; continue
    try:
        reps = 1 if SMALL else 10
        if donated:
            cache = c(cache, *args)
            kind = "store rows" if "words" not in name else "store words"
            lo = int(start); err = close(kind, [a[..., lo:lo + N:97] for a in jax.tree.leaves(cache)])
            best = 1e9
            for _ in range(3):
                t0 = time.perf_counter()
                for _ in range(reps): cache = c(cache, *args)
                jax.block_until_ready(cache); best = min(best, (time.perf_counter() - t0) / reps)
        else:
            out = c(*args); kind = name.split()[0].replace("+lookup", "")
            if "product" in name or "lookup by" in name: kind = name
            err = close(kind, [a[::37] if a.shape[0] > 4096 else a for a in jax.tree.leaves(out)])
            best = 1e9
            for _ in range(3):
                t0 = time.perf_counter()
                for _ in range(reps): out = c(*args)
                jax.block_until_ready(out); best = min(best, (time.perf_counter() - t0) / reps)
        RES[name] = [best * 1e3, err]
        say(f"{name:50s} {best*1e3:8.3f} ms  err {err}  (compile {took:.1f} s)")
    except Exception as e:
        say(f"{name:50s} RUN FAILED {str(e)[:200]}"); RES[name] = str(e)[:200]
    (OUT / "micro.json").write_text(json.dumps(RES, indent=1))
