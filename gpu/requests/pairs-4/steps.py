"""Times training steps by the functions of `benchmarks.training`: `steps.py compile NUMBER`, or `steps.py time`."""

import dataclasses
import itertools
import json
import os
import pathlib
import statistics
import sys
import time

import jax

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)

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

OUT, HERE = pathlib.Path(os.environ["OUT"]), pathlib.Path(__file__).parent
VARIANTS = json.load(open(HERE / "variants.json"))


class Program:
    def __init__(self, variant: dict):
        self.variant = variant
        length, tokens = variant["length"], variant["tokens"]
        values = {"model": dataclasses.asdict(ModelConfig()), "train": {}, "data": {"sequence_length": length}}
        values["train"] |= {"batch_size": tokens // length, "accumulation": 1}
        for (section, field), value in overrides(variant.get("set", "")).items():
            values[section][field] = value
        config = run_config(values)
        shape, plan = config.model, variant.get("plan")
        if plan:
            shape = dataclasses.replace(shape, memory=ExecutionPlan(**plan))
        self.config, self.shape = dataclasses.replace(config, model=shape), shape
        self.model, self.mesh, self.horizon = build_model(shape), build_mesh(config.train.axes), Horizon(40, 40)
        self.outputs, self.groups = [], []

    def initial(self, key):
        return init_state(key, self.model, self.config.train, self.horizon)

    def compile(self) -> None:
        with jax.set_mesh(self.mesh):
            state = jax.eval_shape(self.initial, jax.random.key(0))
            self.shardings = tree_shardings(state, self.mesh)
            rows = batch_sharding(self.mesh)
            batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), random_batch(self.config))
            step = jit_train_step(self.shardings, rows, model=self.model, config=self.config.train, horizon=self.horizon)
            started = time.perf_counter()
            lowered = step.lower(state, batch)
            self.traced = time.perf_counter() - started
            started = time.perf_counter()
            self.compiled = lowered.compile()
            self.seconds = time.perf_counter() - started

    def prepare(self) -> None:
        with jax.set_mesh(self.mesh):
            self.state = jax.jit(self.initial, out_shardings=self.shardings)(jax.random.key(0))
            self.batch = put_batch(random_batch(self.config), self.mesh)

    def steps(self, count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            self.state, metrics = self.compiled(self.state, self.batch)
            self.outputs.append(metrics)
        jax.block_until_ready(self.state)
        return (time.perf_counter() - started) / count

    def row(self) -> dict:
        seconds, variant, shape = statistics.median(self.groups), self.variant, self.shape
        counted = (shape, variant["length"], self.config.train.batch_size, 0)
        seen = OUT / f"compile_{VARIANTS.index(variant)}.json"
        return {
            **variant,
            **(json.loads(seen.read_text()) if seen.exists() else {}),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "executed": str(shape.plan(num_windows(shape, variant["length"]))),
            "tokens_per_second": variant["tokens"] / seconds,
            "step_ms": seconds * 1e3,
            "least_ms": min(self.groups) * 1e3,
            "groups_ms": [group * 1e3 for group in self.groups],
            "step_gb": (_bytes(self.compiled) or 0) / 1e9,
            "model_tflop": training_flops(*counted) / 1e12,
            "hardware_tflop": hardware_flops(*counted) / 1e12,
            "losses": [float(output["loss"]) for output in self.outputs],
            "norms": [float(output["grad_norm"]) for output in self.outputs],
        }


def key(variant: dict) -> tuple:
    return variant["length"], variant["tokens"], variant.get("set", "")


def time_group(variants: list[dict]) -> None:
    from alone import alone

    programs = [Program(variant) for variant in variants]
    for program in programs:
        program.compile()
        if program.seconds > 20:
            print(f"miss: {program.variant['label']} compiled again in {program.seconds:.0f} s", flush=True)
    for program in programs:
        program.prepare()
        program.steps(1)
    with alone():
        for _ in range(variants[0]["rounds"]):
            for program in programs:
                program.steps(1)  # the first after another program's
                program.groups.append(program.steps(variants[0]["count"]))
    first = None
    for program in programs:
        row = program.row()
        (OUT / f"row_{VARIANTS.index(program.variant)}.json").write_text(json.dumps(row, indent=1))
        first = first or row
        loss, norm = (abs(row[name][0] / first[name][0] - 1) for name in ("losses", "norms"))
        print(
            f"{row['label']:38s} {row['tokens_per_second']:10,.0f} tokens/s ({row['tokens_per_second'] / first['tokens_per_second'] - 1:+.2%}, "
            f"best {first['least_ms'] / row['least_ms'] - 1:+.2%}) {row['step_ms']:8.2f} ms ({row['least_ms']:.2f} to {max(row['groups_ms']):.2f}) "
            f"{row['step_gb']:6.2f} GB compile {row.get('compile_s', 0):5.1f} s {row['hardware_tflop']:6.1f} TFLOP loss {row['losses'][0]:.6f} "
            f"{loss:.1e} norm {row['norms'][0]:.5f} {norm:.1e} {'agree' if loss < 1e-4 and norm < 0.01 else 'DIFFER'}",
            flush=True,
        )


def main() -> None:
    if sys.argv[1] == "compile":
        number = int(sys.argv[2])
        for attempt in range(3):
            try:
                program = Program(VARIANTS[number])
                program.compile()
                figures = {"trace_s": program.traced, "compile_s": program.seconds}
                (OUT / f"compile_{number}.json").write_text(json.dumps(figures))
                print(f"compiled {VARIANTS[number]['label']} in {program.seconds:.1f} s", flush=True)
                os._exit(0)
            except Exception as error:
                print(f"{VARIANTS[number]['label']}: {type(error).__name__}: {str(error)[:200]}".replace("\n", " "), flush=True)
                time.sleep(8)
        os._exit(0)
    for _, group in itertools.groupby(VARIANTS, key):
        variants = list(group)
        while not all((OUT / f"compiled.{VARIANTS.index(variant)}").exists() for variant in variants):
            time.sleep(0.5)
        variants = [v for v in variants if (OUT / f"compile_{VARIANTS.index(v)}.json").exists()]
        if not variants:
            continue
        # A process of its own, so that its memory is freed, also after a failure.
        for attempt in range(4):
            child = os.fork()
            if not child:
                code = 1
                try:
                    time_group(variants)
                    code = 0
                except Exception as error:
                    print(f"{variants[0]['label']}: {type(error).__name__}: {str(error)[:300]}".replace("\n", " "), flush=True)
                os._exit(code)
            if not os.waitpid(child, 0)[1]:
                break
            time.sleep(10)


main()
