"""Times training steps of one variant, by the functions of `benchmarks.training`: `steps.py NUMBER variants.json`."""

import dataclasses
import fcntl
import json
import os
import pathlib
import statistics
import sys
import time

OUT = pathlib.Path(os.environ["OUT"])


def main() -> None:
    number, variants = int(sys.argv[1]), json.load(open(sys.argv[2]))
    variant = variants[number]
    try:
        run(number, variant)
    except BaseException as error:
        print(f"{variant['label']}: {type(error).__name__}: {str(error)[:1500]}", flush=True)
        os._exit(0)
    os._exit(0)  # frees the GPU's memory at once


def run(number: int, variant: dict) -> None:
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    from alone import alone

    from benchmarks.flops import hardware_flops
    from benchmarks.training import _bytes, overrides, random_batch
    from tlinformer_jax.analysis.flops import training_flops
    from tlinformer_jax.config.model import ExecutionPlan, ModelConfig
    from tlinformer_jax.config.run import run_config
    from tlinformer_jax.models import build_model
    from tlinformer_jax.models.windows import num_windows
    from tlinformer_jax.parallel.sharding import batch_sharding, build_mesh, put_batch, tree_shardings
    from tlinformer_jax.training.optimizer import Horizon
    from tlinformer_jax.training.step import init_state, jit_train_step

    length, tokens = variant["length"], variant["tokens"]
    values = {"model": dataclasses.asdict(ModelConfig()), "train": {}, "data": {"sequence_length": length}}
    values["train"] |= {"batch_size": tokens // length, "accumulation": 1}
    for (section, field), value in overrides(variant.get("set", "")).items():
        values[section][field] = value
    config = run_config(values)
    shape, plan = config.model, variant.get("plan")
    if plan:
        shape = dataclasses.replace(shape, memory=ExecutionPlan(**plan))
    config = dataclasses.replace(config, model=shape)
    train, model, mesh = config.train, build_model(shape), build_mesh(config.train.axes)
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
        outputs, groups = [], []
        with open(OUT / "turn", "w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)  # only one of these processes has its activations in memory

            def steps(count):
                nonlocal state
                started = time.perf_counter()
                for _ in range(count):
                    state, metrics = compiled(state, batch)
                    outputs.append(metrics)
                jax.block_until_ready(state)
                return (time.perf_counter() - started) / count

            steps(1)
            with alone():
                steps(1)
                for size in variant["groups"]:
                    groups.append(steps(size))
            seconds = statistics.median(groups)
            counted = (shape, length, train.batch_size, 0)
            row = {
                **variant,
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
                "executed": str(shape.plan(num_windows(shape, length))),
                "tokens_per_second": tokens / seconds,
                "step_ms": seconds * 1e3,
                "groups_ms": [group * 1e3 for group in groups],
                "step_gb": (_bytes(compiled) or 0) / 1e9,
                "trace_s": traced,
                "compile_s": compilation,
                "model_tflop": training_flops(*counted) / 1e12,
                "hardware_tflop": hardware_flops(*counted) / 1e12,
                "losses": [float(output["loss"]) for output in outputs],
                "norms": [float(output["grad_norm"]) for output in outputs],
            }
            print(
                f"{variant['label']:40s} {row['tokens_per_second']:10,.0f} tokens/s {row['step_ms']:8.2f} ms "
                f"({min(row['groups_ms']):.1f} to {max(row['groups_ms']):.1f}) {row['step_gb']:6.2f} GB "
                f"trace {traced:5.1f} compile {compilation:5.1f} s {row['hardware_tflop']:6.1f} TFLOP "
                f"loss {row['losses'][0]:.6f} {row['losses'][-1]:.5f} norm {row['norms'][0]:.5f} | {row['executed']}",
                flush=True,
            )
            (OUT / f"row_{number}.json").write_text(json.dumps(row, indent=1))


main()
