"""plantime.py SEGMENTS,TOGETHER,CKPT [set...]: times a training step of causal-plus at N = 8,192 with a plan."""
import os, sys, json
sys.path[:0] = [os.getcwd(), os.path.dirname(os.path.abspath(__file__))]
from alone import alone
from benchmarks import steps
from tlinformer_jax.config.model import ExecutionPlan, ModelConfig
import tlinformer_jax.training.device_memory as dm
text, changes = sys.argv[1], sys.argv[2:]
segments, together, ckpt = map(int, text.split(","))
old = ModelConfig.plan
if segments:
    def plan(self, windows=1):
        p = old(self, windows)
        if windows <= 1: return p
        import dataclasses
        return dataclasses.replace(p, segments=segments, together=min(together, windows - 1), checkpointing=bool(ckpt), paired=False)
    ModelConfig.plan = plan
holds, inner = [], dm.program_bytes
def program_bytes(compiled):
    out = inner(compiled)
    if "compileonly" in changes: os._exit(0)
    if not holds:
        hold = alone(); hold.__enter__(); holds.append(hold)
    return out
dm.program_bytes = program_bytes
import dataclasses
tiny = "tiny" in changes
arch = [c[5:] for c in changes if c.startswith("arch=")] or ["tlinformer"]
base = steps.base_fields({"model": dataclasses.asdict(ModelConfig(token_shift=True, causal_history="plain" not in changes and arch == ["tlinformer"], dropout=0.0)), "train": {"steps": 20}}, 0, ["model.dropout=0.0"] + [c for c in changes if c.startswith("model.")])
if tiny: base["model"] |= dict(vocab_size=257, d_model=32, num_heads=2, d_ff=64, history_window=16, generation_window=16)
length = next((int(c[7:]) for c in changes if c.startswith("length=")), 256 if tiny else 8192)
(case,) = steps.cases(base, arch, [length], [""], [1024 if tiny else 65536])
try:
    row = steps.time_case(case, steps.TimingOptions(20, profile=os.environ["OUT"]+"/trace" if "profile" in changes else ""))
    if "kernels" in row: open(os.environ["OUT"] + "/kernels.csv", "w").write(str(row["kernels"]))
finally:
    for h in holds: h.__exit__(None, None, None)
print("PLAN", text, changes, json.dumps({k: row[k] for k in ("tokens_per_second", "step_seconds", "compile_seconds", "step_bytes", "first_loss", "last_loss", "hardware_flops", "model_flops", "error")}), flush=True)
