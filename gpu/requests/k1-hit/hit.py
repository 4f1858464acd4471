"""Times a hit in the device loop as benchmarks.inference does, for variants of `kernels.decode.attend`, on one cache."""
import argparse, dataclasses, importlib.util, json, os, sys, time
import jax, jax.numpy as jnp, numpy as np
from benchmarks import limits, parts, rows
from benchmarks.limits import Ceilings
from benchmarks.runner import _decoder
from benchmarks.session import Session
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.kernels import decode

flags = argparse.ArgumentParser()
flags.add_argument("--lengths", default="1000000,1024")
flags.add_argument("--kinds", default="int8,auto")
flags.add_argument("--seconds", type=float, default=80)
flags.add_argument("--budget", type=float, default=0.3)
flags.add_argument("--tiny", action="store_true")
flags = flags.parse_args()
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
    if variant.get("old"):
        decode.attend = old.attend
    for name in ("PROGRAMS", "CONVERT"):
        if name in variant:
            setattr(decode, name, variant[name])
    jax.clear_caches()

INT8 = [{"old": 1}] + [{"CONVERT": c, "PROGRAMS": p} for c, p in (("asm", 1584), ("top", 1584), ("asm", 3168), ("top", 2112), ("magic", 1584), ("top", 3168), ("cast", 1584))]
AUTO = [{"old": 1}, {"PROGRAMS": 1584}, {"PROGRAMS": 3168}, {"PROGRAMS": 2112}]

def main():
    say(jax.__version__, jax.devices()[0].device_kind)
    config = dataclasses.replace(ModelConfig(), architecture="tlinformer")
    if flags.tiny:
        config = dataclasses.replace(config, d_model=24, num_heads=2, vocab_size=101, history_window=32, generation_window=32)
    decoder, _ = _decoder(config, 0, None)
    weights = limits.weights_of(decoder.params)
    ceilings = Ceilings(4.3e12, 4.04e12, 7.6e14, 8192)
    records = []
    for length in map(int, flags.lengths.split(",")):
        for kind in flags.kinds.split(","):
            if length < 10000 and kind == "int8" and "auto" in flags.kinds:
                continue
            if time.perf_counter() - STARTED > flags.seconds - 25: say("out of time before", kind, length); continue
            plan = rows.Plan(((length, 1),), (), ("sustained",), 1, flags.budget, 0, 0, 0, kind)
            use({"old": 1})
            session = rows.new_session(plan, decoder, length, 1)
            rows.fill(plan, session); rows.enter_window(session)
            say("filled", kind, length)
            first = None
            for variant in INT8 if kind == "int8" else AUTO:
                if time.perf_counter() - STARTED > flags.seconds - 8: say("out of time before", variant); break
                try:
                    use(variant)
                    # The same token again: the logits of both kernels, before anything is timed.
                    session.rewind(session.history, session.overlap)
                    session.cache, logits = decoder.step(session.cache, jnp.asarray([7]), session.sequences.active)
                    logits = np.asarray(logits, np.float64)
                    first = logits if first is None else first
                    session.rewind(session.history, session.overlap)
                    row = parts.sustained(session, weights, ceilings, flags.budget)
                    session.rewind(session.history, session.overlap)
                    records.append({"kind": kind, "length": length, "variant": variant, "ms": row["seconds"] * 1e3, "best_ms": row["best_seconds"] * 1e3, "calls": row["calls"], "logits_difference": float(np.abs(logits - first).max()), "logits_std": float(first.std())})
                    say(kind, length, variant, f"{row['seconds'] * 1e3:.4f} ms a token (best {row['best_seconds'] * 1e3:.4f}, {row['calls']} calls), logits differ by {np.abs(logits - first).max():.4f} of std {first.std():.3f}")
                except Exception as error:
                    say(kind, variant, "FAILED", repr(error)[:400])
                if os.environ.get("OUT"):
                    with open(os.path.join(os.environ["OUT"], "hit.json"), "w") as f:
                        json.dump(records, f, indent=1)
            session = None

main()
