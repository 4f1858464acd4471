"""Times recall cells: TREE MODEL [child]. TREE is old or new; the package comes from PYTHONPATH."""
import contextlib, dataclasses, functools, json, os, pathlib, statistics, sys, time
from concurrent.futures import ThreadPoolExecutor
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
import jax, jax.numpy as jnp, numpy as np
sys.path.append("/tmp/carry")
try:
    from alone import alone
except ImportError:
    import fcntl

    @contextlib.contextmanager
    def alone():
        with open("/tmp/answers.lock", "w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            print("no alone.py: own lock only", flush=True)
            yield
from benchmarks.profiling import device_kernels, kernel_table
from tlinformer_jax.config.run import run_config
from tlinformer_jax.data.tokenizers import build_tokenizer
from tlinformer_jax.experiments import together
from tlinformer_jax.experiments.recipes import package_config, set_model
from tlinformer_jax.parallel.sharding import put_batch
from tlinformer_jax.training.step import compiler_options

TREE, MODEL, CHILD = sys.argv[1], sys.argv[2], "child" in sys.argv[3:]
TINY = bool(os.environ.get("TINY"))
OUT = pathlib.Path(os.environ["OUT"])
SEEDS, STEPS = 3, 1 if TINY else 20
import importlib.util
from tlinformer_jax.kernels import delta as delta_kernel
note = lambda *parts: print(TREE, MODEL, *parts, flush=True)

base = package_config("recall")("256-32-tight-plus")
set_model(base, MODEL)
if TINY:
    base.train.batch_size, base.model.vocab_size = 2, 8192
config = run_config(base)
jobs = [dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed)) for seed in range(SEEDS)]
run, splits = together._prepared(config)
options = compiler_options(config.train)
note(delta_kernel.serving(config.model.compute_dtype, 64, False))
streams = [together.training_batches(one, splits["train"]) for one in jobs]
stacked = lambda step: jax.tree.map(lambda *rows: np.stack(rows), *(each.batch(step) for each in streams))


@dataclasses.dataclass
class Seed:
    config: object


def programs():
    """Name -> (state, function of state and batch, batch)."""
    with jax.set_mesh(run.mesh):
        found = {}
        copies = lambda: together.first_copies(run, [Seed(one) for one in jobs])
        many = jax.tree.map(jnp.asarray, stacked(0))
        update = functools.partial(together.update_copies, run=run)

        def mapped(*given):
            real = jax.vmap
            def once(function):
                jax.vmap = real
                return lambda *rows: jax.lax.map(lambda row: function(*row), rows)
            jax.vmap = once
            try:
                return update(*given)
            finally:
                jax.vmap = real

        def lower(function):
            return jax.jit(function, donate_argnums=0, compiler_options=options).lower(copies(), many, jnp.int32(0))

        def called(compiled):
            return lambda state, batch: compiled(state, batch, jnp.int32(0))

        lowered = {"vmap3": lower(update)}
        if False:
            lowered["map3"] = lower(lambda *given: mapped(*given))
        single = None if CHILD else (run.initial_state(), put_batch(streams[0].batch(0), run.mesh))
        if single:
            lowered["single"] = run.train_step.lower(*single)
        started = time.perf_counter()
        def compile_one(item):
            name, low = item
            with jax.set_mesh(run.mesh):
                return name, low.compile()
        with ThreadPoolExecutor(3) as pool:
            compiled = dict(pool.map(compile_one, lowered.items()))
        note(f"compiled {list(compiled)} in {time.perf_counter() - started:.1f} s")
        for name, one in compiled.items():
            found[name] = (*single, one) if name == "single" else (copies(), many, called(one))
            found[name] = (found[name][0], found[name][2], found[name][1])
        return found


def reader():
    if hasattr(together, "prefetched"):
        return together.prefetched(streams)
    readers = [each.prefetched(0) for each in streams]
    return iter(lambda: jax.tree.map(lambda *rows: np.stack(rows), *(next(one) for one in readers)), None)


def child(found):
    """Makes real updates while the file 'go' says so."""
    state, step, batch = found["vmap3"]
    batches = reader()
    for _ in range(3):
        state, loss = step(state, next(batches))
    jax.block_until_ready(loss)
    (OUT / f"ready-{MODEL}").touch()
    waited = time.perf_counter()
    while not (OUT / "go").exists() and time.perf_counter() - waited < 100:
        time.sleep(0.01)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < 5:
        for _ in range(5):
            state, loss = step(state, next(batches))
        jax.block_until_ready(loss)
        done += 5
    took = time.perf_counter() - started
    note(f"SIDE {done} updates of {SEEDS} seeds in {took:.2f} s: {1e3 * took / done:.2f} ms an update")
    os._exit(0)


def main():
    found = programs()
    if CHILD:
        with jax.set_mesh(run.mesh):
            child(found)
    result, losses = {}, {}
    traced = OUT / f"trace-{TREE}-{MODEL}"
    with jax.set_mesh(run.mesh), alone():
        for name, (state, step, batch) in found.items():
            groups, first = [], None
            for count in (3, STEPS, STEPS, STEPS):
                started = time.perf_counter()
                for _ in range(count):
                    state, out = step(state, batch)
                    first = out if first is None else first
                jax.block_until_ready((state, out))
                groups.append((time.perf_counter() - started) / count * 1e3)
            dispatched = time.perf_counter()
            state, out = step(state, batch)
            dispatched = (time.perf_counter() - dispatched) * 1e3
            jax.block_until_ready(state)
            value = first["loss"] if name == "single" else first
            last = out["loss"] if name == "single" else out
            result[name] = {"ms": statistics.median(groups[1:]), "groups": groups, "host_ms": dispatched,
                            "host_per": 0, "first": np.asarray(value).tolist(), "last": np.asarray(last).tolist()}
            note(name, {key: np.round(value, 4).tolist() for key, value in result[name].items()})
            found[name] = (state, step, batch)
        # The real loop: data and transfer too.
        state, step, batch = found["vmap3"]
        batches, count = reader(), STEPS if TREE == "old" else 3 * STEPS
        for _ in range(6):
            state, out = step(state, next(batches))
        jax.block_until_ready(out)
        started = time.perf_counter()
        for _ in range(count):
            state, out = step(state, next(batches))
        jax.block_until_ready(out)
        result["real loop ms"] = (time.perf_counter() - started) / count * 1e3
        note("real loop, 3 seeds:", round(result["real loop ms"], 2), "ms an update")
        (OUT / f"{TREE}-{MODEL}.json").write_text(json.dumps(result))
        names = ["vmap3", "single"]
        states = {name: found[name] for name in names} | {"vmap3": (state, step, batch)}
        jax.profiler.start_trace(str(traced))
        for name, (state, step, batch) in states.items():
            for _ in range(4):
                with jax.profiler.TraceAnnotation(name):
                    state, out = step(state, batch)
            jax.block_until_ready((state, out))
            time.sleep(0.02)
    jax.profiler.stop_trace()
    tables(traced, states, result)
    os._exit(0)


def tables(folder, states, result):
    """Prints each program's kernels of the trace; programs are told apart by the pauses between them."""
    files = sorted(folder.glob("**/*.xplane.pb"))
    planes = [plane for plane in jax.profiler.ProfileData.from_file(str(files[-1])).planes if plane.name.startswith("/device")]
    events = sorted((event.start_ns, event.duration_ns, event.name) for plane in planes for line in plane.lines
                    if line.name.startswith("Stream") for event in line.events)
    groups, last = [[]], None
    for start, duration, name in events:
        if last is not None and start - last > 1.2e7:
            groups.append([])
        groups[-1].append((start, duration, name))
        last = start + duration
    note("groups of events", [len(group) for group in groups])
    groups = [group for group in groups if len(group) > 50]
    for name, group in zip(states, groups):
        kernels = {}
        for start, duration, kernel in group:
            count, total = kernels.get(kernel, (0, 0.0))
            kernels[kernel] = (count + 1, total + duration)
        busy = sum(duration for _, duration, _ in group) / 1e6
        span = (group[-1][0] + group[-1][1] - group[0][0]) / 1e6
        short = sum(duration < 4000 for _, duration, _ in group)
        note(f"TRACE {name}: {len(group) / 4:.0f} kernels a step ({short / 4:.0f} shorter than 4 us), busy {busy / 4:.3f} ms a step, span {span / 4:.3f} ms a step, busy share {busy / span:.2f}")
        (OUT / f"kernels-{TREE}-{MODEL}-{name}.txt").write_text(kernel_table(kernels, 70))
        print("\n".join(kernel_table(kernels, 14).splitlines()), flush=True)
    import shutil
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
