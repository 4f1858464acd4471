"""slide_final.py LABEL N DTYPE ...: times prefill and slide of the tlinformer_jax on the path, twice; compares with what `old` left."""
import concurrent.futures as cf, contextlib, dataclasses, json, os, pathlib, sys, time
START = time.time()
sys.path.append("/tmp/carry")
try: from alone import alone
except ImportError:
    @contextlib.contextmanager
    def alone(settle=0): yield
import jax, jax.numpy as jnp, numpy as np
from benchmarks.timing import time_calls
import tlinformer_jax
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding import windowed
from tlinformer_jax.decoding.cache import capacity_for, init_cache, history_of
from tlinformer_jax.decoding.decoder import step
from tlinformer_jax.decoding.params import decoder_params
from tlinformer_jax.models.model import build_model
LABEL = sys.argv[1]; CASES = [(int(a), b) for a, b in zip(sys.argv[2::2], sys.argv[3::2])]
SMALL = bool(os.environ.get("SMALL")); OUT = pathlib.Path(os.environ.get("OUT", "/tmp/so3")); OUT.mkdir(exist_ok=True, parents=True)
def say(*a): print(f"[{LABEL} {time.time()-START:6.1f}]", *a, flush=True)
say(jax.devices(), jax.__version__, tlinformer_jax.__file__)
config = ModelConfig(d_model=48, num_heads=4, vocab_size=60, history_window=16, generation_window=16, dtype="float32") if SMALL else ModelConfig()
W = config.generation_window
typed = build_model(config).apply(jax.jit(build_model(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)), method=build_model(config).parameters)
typed = jax.tree.map(lambda a: a * 5 if a.ndim > 1 else a, typed)
params = jax.jit(decoder_params, static_argnums=1)(typed, config)
step_jit = jax.jit(lambda p, c, t, a: step(p, config, c, t, a)[1])
def lower(N, dtype):
    shape = jax.eval_shape(lambda: init_cache(config, 1, capacity_for(config, N + 3 * W), cache_dtype=dtype))
    i = jax.ShapeDtypeStruct((), jnp.int32); tok = jax.ShapeDtypeStruct(shape.tokens.shape[1:], jnp.int32)
    return (jax.jit(lambda p, c, r, t, n, o: windowed.prefill(p, config, c, r, t, n, o), donate_argnums=1).lower(params, shape, i, tok, i, i),
            jax.jit(lambda p, c, r, o: windowed.slide(p, config, c, r, o), donate_argnums=1).lower(params, shape, i, i))
def timed(low): t = time.time(); return low.compile(), round(time.time() - t, 1)
lowered = [low for case in CASES for low in lower(*case)]
with cf.ThreadPoolExecutor(8) as pool: programs = list(pool.map(timed, lowered))
say("compiled", [t for _, t in programs]); open(OUT / f"compiled_{LABEL}", "w").close()
RES = {}
def measure(visit, number, N, dtype):
    (pre, t1), (sli, t2) = programs[2 * number:2 * number + 2]
    state = {"c": jax.jit(lambda: init_cache(config, 1, capacity_for(config, N + 3 * W), cache_dtype=dtype))()}
    padded = np.zeros(state["c"].tokens.shape[1], np.int32); padded[:N] = np.random.default_rng(0).integers(0, config.vocab_size, N); padded = jnp.asarray(padded)
    h = history_of(config, N); obs, obs2 = np.int32(config.observed_rows(h)), np.int32(config.observed_rows(history_of(config, h + W + 1)))
    picked = jax.jit(lambda history, context: [a[..., :h][..., ::max(1, N // 1024 + 1)].astype(jnp.float32) for a in jax.tree.leaves(history)] + [a.astype(jnp.float32) for a in jax.tree.leaves(context)])
    def prefill(): state["c"], state["logits"] = pre(params, state["c"], np.int32(0), padded, np.int32(N), obs); return state["c"], state["logits"]
    def rewind(): state["c"] = dataclasses.replace(state["c"], window_length=jnp.full((1,), W, jnp.int32), history_length=jnp.full((1,), h, jnp.int32)); return state["c"]
    def slide(): state["c"] = sli(params, state["c"], np.int32(0), obs2); return state["c"]
    prefill(); mine = [np.asarray(state["logits"])] + [np.asarray(a) for a in picked(state["c"].history, state["c"].context)]
    rewind(); slide(); mine += [np.asarray(a) for a in picked(state["c"].history, state["c"].context)]
    mine.insert(1, np.asarray(step_jit(params, state["c"], jnp.asarray([7], jnp.int32), jnp.asarray([True]))))
    kept, err = pathlib.Path(f"/tmp/slide_truth_{dtype}_{N}.npz"), None
    if LABEL == "old" and not visit: np.savez(kept.with_suffix(".part.npz"), *mine); os.replace(kept.with_suffix(".part.npz"), kept)
    if kept.exists():
        with np.load(kept) as file: err = [[float(np.abs(a - b).max()), float(np.abs(a - b).mean() / (np.abs(b).mean() + 1e-30))] for a, b in zip(mine, [file[f"arr_{i}"] for i in range(len(mine))])]
    with alone():
        p = time_calls(prefill, 0.4, compiled=True); q = time_calls(slide, 0.4, prepare=rewind, compiled=True)
    row = {"prefill_ms": p.median * 1e3, "slide_ms": q.median * 1e3, "best_ms": [p.best * 1e3, q.best * 1e3], "calls": [len(p.seconds), len(q.seconds)], "compile_s": [t1, t2], "temp_bytes": None if SMALL else [x.memory_analysis().temp_size_in_bytes for x in (pre, sli)], "logits_after_prefill": err and err[0], "logits_after_slide": err and err[1], "worst_of_the_cache": err and [max(e[0] for e in err[2:]), max(e[1] for e in err[2:])]}
    RES.setdefault(f"{N} {dtype}", []).append(row); (OUT / f"final_{LABEL}.json").write_text(json.dumps(RES, indent=1))
    say(f"N={N} {dtype} visit {visit}: prefill {row['prefill_ms']:.3f} ({p.best*1e3:.3f}) slide {row['slide_ms']:.3f} ({q.best*1e3:.3f}) temp {row['temp_bytes']} against old: {row['logits_after_prefill']} {row['logits_after_slide']} {row['worst_of_the_cache']}")
    jax.tree.map(lambda a: a.delete(), state.pop("c"))
other = {"old": "new", "new": "old"}[LABEL]
while not SMALL and not (OUT / f"compiled_{other}").exists() and time.time() - START < 200: time.sleep(0.2)
if LABEL == "new" and not SMALL:  # the old ones first
    while not all(pathlib.Path(f"/tmp/slide_truth_{d}_{n}.npz").exists() for n, d in CASES) and time.time() - START < 220: time.sleep(0.2)
for visit in (0, 1):
    for number, case in enumerate(CASES): measure(visit, number, *case)
say("done")
