"""Times a hit in the device loop for variants of `kernels.decode.attend`; all compiled side by side, caches with random rows."""
import argparse, concurrent.futures, dataclasses, functools, importlib.util, json, os, time
import jax, jax.numpy as jnp, numpy as np
from benchmarks.runner import _decoder
from benchmarks.session import GREEDY
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import history_of
from tlinformer_jax.decoding.decoder import Sequences, run_steps
from tlinformer_jax.decoding.sampling import sequence_keys
from tlinformer_jax.decoding.spread import on_devices
from tlinformer_jax.kernels import decode

flags = argparse.ArgumentParser()
flags.add_argument("--seconds", type=float, default=80)
flags.add_argument("--lengths", default="1000000,100000,1024")
flags.add_argument("--workers", type=int, default=14)
flags.add_argument("--tiny", action="store_true")
flags.add_argument("--few", action="store_true")
flags = flags.parse_args()
LONG, MIDDLE, SHORT = map(int, flags.lengths.split(","))
STARTED = time.perf_counter()
HERE = os.path.dirname(os.path.abspath(__file__))
spec = importlib.util.spec_from_file_location("tlinformer_jax.kernels.old_decode", os.path.join(HERE, "old_decode.py"))
old = importlib.util.module_from_spec(spec); spec.loader.exec_module(old)
NEW = {name: getattr(decode, name) for name in ("attend", "PROGRAMS", "CONVERT")}

def say(*words):
    print(f"[{time.perf_counter() - STARTED:5.1f}]", *words, flush=True)

def use(variant):
    for name, value in NEW.items():
        setattr(decode, name, value)
    if variant == "old":
        decode.attend = old.attend
    else:
        decode.CONVERT, decode.PROGRAMS = variant
    jax.clear_caches()

PLAN = [
    (LONG, "int8", ["old", ("asm", 3168), ("top", 3168), ("asm", 6336), ("asm", 1584), ("magic", 3168), ("top", 6336)]),
    (LONG, "auto", ["old", ("cast", 1584), ("cast", 3168), ("cast", 2112)]),
    (SHORT, "auto", ["old", ("cast", 1584)]),
    (MIDDLE, "int8", ["old", ("asm", 3168), ("asm", 1584), ("top", 3168)]),
    (MIDDLE, "auto", ["old", ("cast", 1584), ("cast", 3168)]),
]

if flags.few:
    PLAN = [(LONG, "int8", ["old", ("asm", 3168)])]

@functools.partial(jax.jit, donate_argnums=0)
def scatter(history, key):
    def one(array, key):
        if array.dtype == jnp.int8:
            return jax.random.randint(key, array.shape, -127, 128, jnp.int8)
        return ((jax.random.uniform(key, array.shape, jnp.float32) + 0.5) / 73).astype(array.dtype) if array.ndim == 3 else jax.random.normal(key, array.shape, array.dtype)
    leaves, tree = jax.tree.flatten(history)
    return jax.tree.unflatten(tree, [one(a, k) for a, k in zip(leaves, jax.random.split(key, len(leaves)))])

def main():
    say(jax.__version__, jax.devices()[0].device_kind)
    config = dataclasses.replace(ModelConfig(), architecture="tlinformer")
    if flags.tiny:
        config = dataclasses.replace(config, d_model=24, num_heads=2, vocab_size=101, history_window=32, generation_window=32)
    decoder, _ = _decoder(config, 0, None)
    size = config.generation_window
    def sequences():
        return Sequences(jnp.asarray([7], jnp.int32), sequence_keys(0, 1), jnp.ones((1,), bool), seen=None)
    stop = jnp.full((1,), -1, jnp.int32)
    pool, jobs, caches = concurrent.futures.ThreadPoolExecutor(flags.workers), [], {}
    for length, kind, variants in PLAN:
        cache = decoder.init_cache(1, length + 3 * size, kind)
        history = scatter(cache.history, jax.random.key(0))
        def full(n): return jnp.full((1,), n, jnp.int32)
        n = history_of(config, length)
        caches[length, kind] = [dataclasses.replace(cache, history=history, history_length=full(n), observed_length=full(config.observed_rows(n)), window_length=full(0))]
        for variant in variants:
            use(variant)
            lowered = on_devices.lower(run_steps, None, decoder.params, config, caches[length, kind][0], sequences(), GREEDY, stop, np.int32(size))
            jobs.append((length, kind, variant, pool.submit(lowered.compile)))
    say("lowered", len(jobs))
    records, first = [], {}
    for length, kind, variant, job in jobs:
        if time.perf_counter() - STARTED > flags.seconds:
            say("out of time before", length, kind, variant); break
        try:
            run, held, times = job.result(timeout=90), caches[length, kind], []
            for turn in range(6):
                cache = held.pop()
                cache = dataclasses.replace(cache, window_length=jnp.zeros((1,), jnp.int32))
                arguments = jax.block_until_ready((cache, sequences()))
                before = time.perf_counter()
                cache, _, tokens, _ = jax.block_until_ready(run(decoder.params, arguments[0], arguments[1], GREEDY, stop, np.int32(size)) if False else run(decoder.params, *arguments, GREEDY, stop, np.int32(size)))
                times.append((time.perf_counter() - before) / size * 1e3)
                held.append(cache)
            tokens = np.asarray(tokens)[:size, 0]
            first.setdefault((length, kind), tokens)
            same = int((tokens == first[length, kind]).sum())
            records.append({"length": length, "kind": kind, "variant": variant, "ms": float(np.median(times[1:])), "best_ms": min(times), "same_tokens": same, "of": size})
            say(length, kind, variant, f"{np.median(times[1:]):.4f} ms a token (best {min(times):.4f}), {same} of {size} tokens as the first variant")
        except Exception as error:
            say(length, kind, variant, "FAILED", repr(error)[:500])
        if os.environ.get("OUT"):
            with open(os.path.join(os.environ["OUT"], "hit2.json"), "w") as f:
                json.dump(records, f, indent=1)
    os._exit(0)

main()
