"""genbench.py LENGTH [plain] [profile] [FIELD=VALUE...]: times prefill, slide and 256 tokens of causal-plus, batch 1, bfloat16, random weights; the GPU alone."""
import os, sys, json, time, pathlib, contextlib
sys.path[:0] = [os.getcwd(), os.path.dirname(os.path.abspath(__file__))]
import jax, jax.numpy as jnp, numpy as np
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.models.model import LanguageModel
from tlinformer_jax.training.setup import use_compilation_cache
from benchmarks import profiling
from benchmarks.session import Session
from alone import alone
args = sys.argv[1:]; length = int(args[0])
tiny = "tiny" in args
if tiny: alone = contextlib.nullcontext
use_compilation_cache()
fields = dict(token_shift=True, causal_history="plain" not in args)
if tiny: fields |= dict(vocab_size=257, d_model=32, num_heads=2, d_ff=64, history_window=16, generation_window=16)
import dataclasses
for a in args[1:]:
    if "=" in a: k, v = a.split("=", 1); fields[k] = json.loads(v)
config = ModelConfig(**fields)
model = LanguageModel(config)
variables = model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
decoder = Decoder(model, variables)
s = Session(decoder, 1, length, 1024, 0)
w = config.generation_window
def timed(call, n, prepare=None):
    out = []
    for _ in range(n):
        if prepare: prepare()
        jax.block_until_ready(s.cache); t = time.perf_counter(); jax.block_until_ready((call(), s.cache)); out.append((time.perf_counter() - t) * 1e3)
    return sorted(out)
prompt = s.prompts()
hist = (length - 1) // w * w
def pre(): s.fill(prompt)
def full(): s.rewind(hist, w)
def begin(): s.rewind(hist, 0)
def slide(): s.slide_row(0)
def hit(): s.loop(w)
pre(); full(); slide(); begin(); hit()
row = {}
with alone():
    for name, call, prepare, n in (("prefill", pre, None, 8), ("slide", slide, full, 16), ("hit256", hit, begin, 6)):
        t = timed(call, n, prepare); row[name] = {"best": round(t[0], 3), "median": round(t[len(t) // 2], 3), "n": n}
    print("GEN", " ".join(args), json.dumps(row), flush=True)
    if "profile" in args:
        out = pathlib.Path(os.environ["OUT"]); text = ""
        for name, call, prepare in (("prefill", pre, None), ("slide", slide, full), ("hit256", hit, begin)):
            if prepare: prepare()
            text += f"== {name}\n" + profiling.trace(out / name, call, most=45) + "\n"
        (out / "kernels.csv").write_text(text); print(text, flush=True)
stats = jax.devices()[0].memory_stats() or {}
print("PEAK", " ".join(args), stats.get("peak_bytes_in_use"), flush=True)
