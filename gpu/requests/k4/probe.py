"""Times the compilation of a training step: VARIANT LAYERS TOKENS [--hlo]."""
import dataclasses, sys, time, os, collections, re
import jax, jax.numpy as jnp
jax.config.update("jax_enable_compilation_cache", False)
variant, layers, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
from tlinformer_jax.models import delta
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.config.run import run_config
from benchmarks.training import random_batch, checked_mesh
if os.environ.get("PLAIN"):
    delta.delta_kernel.why_plain = lambda *a: "plain"

def wrap_custom(f):
    g = jax.custom_vjp(f)
    def fwd(lower):
        inv = f(lower); return inv, inv
    g.defvjp(fwd, delta._inverse_backward)
    return g

arch = "gated_deltanet"
parts = variant.split("+")
for part in parts:
    if part == "noinv":
        delta.unit_lower_inverse = lambda lower: jnp.eye(lower.shape[-1], dtype=lower.dtype) - lower
    elif part == "solve":
        def solve(lower):
            eye = jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape)
            return jax.lax.linalg.triangular_solve(lower + eye, eye, left_side=True, lower=True, unit_diagonal=True)
        delta.unit_lower_inverse = wrap_custom(solve)
    elif part == "levels":
        def levels(lower):
            size = lower.shape[-1]
            index = jnp.arange(size)
            def level(i, inverse):
                place = index >> i
                couples = (place[:, None] == place[None, :] + 1) & (place[:, None] % 2 == 1)
                return inverse - delta._exact(inverse, delta._exact(jnp.where(couples, lower, 0), inverse))
            eye = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
            return jax.lax.fori_loop(0, size.bit_length() - 1, level, eye)
        delta.unit_lower_inverse = wrap_custom(levels)
    elif part == "flat":  # one batch axis
        old = delta.unit_lower_inverse
        delta.unit_lower_inverse = lambda lower: old(lower.reshape(-1, *lower.shape[-2:])).reshape(lower.shape)
    elif part == "noconv":
        delta._convolved = lambda inputs, kernel: inputs[:, 3:] * kernel[0].astype(inputs.dtype)
    elif part == "nonorm":
        delta._gated_norm = lambda output, gate, scale: output * gate
    elif part == "norule":
        delta.delta_rows = lambda q, k, v, g, b, s: ((v * k + q) * (g * b).astype(v.dtype)[..., None], s)
    elif part == "barrier":
        old_chunked = delta._chunked
        def chunked(*args):
            return old_chunked(*jax.lax.optimization_barrier(args))
        delta._chunked = chunked
    elif part == "transformer":
        arch = "transformer"

base = run_config({"model": dataclasses.asdict(ModelConfig())}).to_dict()
values = {n: dict(base[n]) for n in ("model", "train", "data")}
values["model"] |= dict(architecture=arch, num_blocks=1 if layers < 8 else 2, hidden_depth=(layers if layers < 8 else 4) - 2, dropout=0.0)
values["data"] = {"sequence_length": 512}
values["train"] |= {"batch_size": max(1, tokens // 512), "accumulation": 1}
config = run_config(values)
from tlinformer_jax.models import build_model
from tlinformer_jax.parallel.sharding import batch_sharding, put_batch, tree_shardings
from tlinformer_jax.training.optimizer import Horizon
from tlinformer_jax.training.step import init_state, jit_train_step
train, model, mesh = config.train, build_model(config.model), checked_mesh(config)
horizon = Horizon(10, 10)
initial = lambda key: init_state(key, model, train, horizon)
with jax.set_mesh(mesh):
    shapes = jax.eval_shape(initial, jax.random.key(0))
    shardings = tree_shardings(shapes, mesh)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, random_batch(config)))
    step = jit_train_step(shardings, batch_sharding(mesh), model=model, config=train, horizon=horizon)
    t = time.perf_counter()
    lowered = step.lower(shapes, batch)
    text = lowered.as_text()
    kinds = collections.Counter(re.findall(r"= \"?(?:stablehlo|chlo)\.(\w+)", text))
    print(variant, layers, tokens, "lowered", round(time.perf_counter() - t, 1), "lines", text.count("\n"), kinds.most_common(8), flush=True)
    t, c = time.perf_counter(), time.process_time()
    print("compile begins", time.strftime("%H:%M:%S"), flush=True)
    import threading, shutil
    def maps():
        time.sleep(8)
        shutil.copy("/proc/self/maps", os.environ["SAMPLES"] + ".maps")
    if "SAMPLES" in os.environ:
        threading.Thread(target=maps, daemon=True).start()
    compiled = lowered.compile()
    print("RESULT", variant, layers, tokens, "compile %.1f s, cpu %.1f s" % (time.perf_counter() - t, time.process_time() - c), flush=True)
    if "--hlo" in sys.argv:
        open(f"hlo_{variant}_{layers}.txt", "w").write(compiled.as_text())
