"""Times training steps of several variants: each process compiles one, then they take turns."""

import dataclasses
import json
import os
import statistics
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
OUT = os.environ["OUT"]


def wait(path, seconds=75):
    until = time.time() + seconds
    while not os.path.exists(path) and time.time() < until:
        time.sleep(0.05)


def mark(name):
    open(os.path.join(OUT, name), "w").close()


def main():
    number, variants = int(sys.argv[1]), json.load(open(sys.argv[2]))
    variant = variants[number]
    try:
        run(number, len(variants), variant)
    except Exception as error:
        print(f"{variant['label']}: {type(error).__name__}: {str(error)[:2000]}", flush=True)
        raise
    finally:
        mark(f"ready.{number}")
        mark(f"done.{number}")


def run(number, count, variant):
    for name, value in variant.get("patch", {}).items():
        os.environ[name] = value
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    from benchmarks.training import overrides, random_batch, _bytes
    from tlinformer_jax.config.model import ExecutionPlan, ModelConfig
    from tlinformer_jax.config.run import run_config
    from tlinformer_jax.models import build_model
    from tlinformer_jax.parallel.sharding import batch_sharding, build_mesh, put_batch, tree_shardings
    from tlinformer_jax.training.optimizer import Horizon
    from tlinformer_jax.training.step import init_state, jit_train_step

    length, tokens = variant["length"], variant["tokens"]
    values = {"model": dataclasses.asdict(ModelConfig()), "train": {}, "data": {"sequence_length": length}}
    values["train"] |= {"batch_size": tokens // length, "accumulation": 1}
    for (section, field), value in overrides(variant.get("set", "")).items():
        values[section][field] = value
    config = run_config(values)
    shape = config.model
    if variant.get("plan"):
        shape = dataclasses.replace(shape, memory=ExecutionPlan(**variant["plan"]))
    train, model, mesh = config.train, build_model(shape), build_mesh(config.train.axes)
    steps = variant.get("steps", 20)
    horizon = Horizon(40, 40)

    def initial(key):
        return init_state(key, model, train, horizon)

    with jax.set_mesh(mesh):
        shardings = tree_shardings(jax.eval_shape(initial, jax.random.key(0)), mesh)
        state = jax.jit(initial, out_shardings=shardings)(jax.random.key(0))
        batch = put_batch(random_batch(config), mesh)
        step = jit_train_step(shardings, batch_sharding(mesh), model=model, config=train, horizon=horizon)
        started = time.perf_counter()
        lowered = step.lower(state, batch)
        traced = time.perf_counter() - started
        started = time.perf_counter()
        compiled = lowered.compile()
        compilation = time.perf_counter() - started
        mark(f"ready.{number}")
        for other in range(count):
            wait(os.path.join(OUT, f"ready.{other}"))
        if number:
            wait(os.path.join(OUT, f"done.{number - 1}"))
        outputs, groups = [], []
        for size in (3, *(5,) * max(1, steps // 5)):
            started = time.perf_counter()
            for _ in range(size):
                state, metrics = compiled(state, batch)
                outputs.append(metrics)
            jax.block_until_ready(state)
            groups.append((time.perf_counter() - started) / size)
        if variant.get("profile"):
            from benchmarks.profiling import trace
            from benchmarks.training import _three_steps
            import functools, pathlib, tempfile

            table = trace(pathlib.Path(tempfile.mkdtemp()), functools.partial(_three_steps, compiled, state, batch), most=70)
            with open(os.path.join(OUT, f"profile_{variant['label'].replace(' ', '_')}.txt"), "w") as file:
                file.write(table)
    seconds = statistics.median(groups[1:])
    row = {
        **variant, "tokens_per_second": tokens / seconds, "step_ms": seconds * 1e3,
        "groups_ms": [group * 1e3 for group in groups[1:]], "step_gb": (_bytes(compiled) or 0) / 1e9,
        "trace_s": traced, "compile_s": compilation,
        "losses": [float(output["loss"]) for output in outputs[:12]], "norms": [float(output["grad_norm"]) for output in outputs[:12]],
    }
    print(f"{variant['label']:44s} {row['tokens_per_second']:10,.0f} tokens/s  {row['step_ms']:8.2f} ms  {row['step_gb']:6.2f} GB  trace {traced:5.1f}  compile {compilation:5.1f} s  "
          f"loss {row['losses'][0]:.5f} {row['losses'][-1]:.5f} norm {row['norms'][0]:.5f} {row['norms'][-1]:.5f}", flush=True)
    with open(os.path.join(OUT, f"row_{number}.json"), "w") as file:
        json.dump(row, file, indent=1)


main()
