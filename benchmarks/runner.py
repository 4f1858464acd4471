"""Runs the whole inference benchmark: every architecture, one after another, at every length."""

import dataclasses
import gc
import pathlib
import shlex
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from benchmarks import profiling, rows
from benchmarks.limits import Ceilings, measure_ceilings
from benchmarks.plots import write_plots
from benchmarks.report import Report, add_cache_ratios, longest_line, table
from benchmarks.rows import Plan
from benchmarks.timing import device_facts
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.config.run import load_config
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.models.cached_attention import int8_readers
from tlinformer_jax.models.model import build_model


def run_benchmark(
    plan: Plan,
    configs: list[ModelConfig],
    *,
    workdir: pathlib.Path | None = None,
    out: pathlib.Path | None = None,
    profile: pathlib.Path | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Measures, prints and writes.

    Args:
      configs: of the models, measured one after another; they differ only in the architecture.
      workdir: of a run, whose weights are used for its architecture; other weights are random.
      out: folder for the report and the plots; None only prints.
      profile: folder for traces; None makes none.
      mesh: devices that the history is split over; None for one device.

    Returns:
      the content of inference.json.
    """
    report = Report(
        out,
        device_facts()
        | {
            "command": shlex.join(["python", "-m", "benchmarks.inference", *sys.argv[1:]]),
            "devices": 1 if mesh is None else mesh.size,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "architectures": [config.architecture for config in configs],
            "config": dataclasses.asdict(configs[0]) | {"compute_dtype": configs[0].compute_dtype.name},
            "plan": dataclasses.asdict(plan),
            "weights": {},
            "ceilings": None,
        },
    )
    ceilings = measure_ceilings(plan.seconds)
    report.values["ceilings"] = dataclasses.asdict(ceilings)
    print(
        f"{report.values['device']}: copy {ceilings.copy_bytes_per_second / 1e12:.3g} TB/s, "
        f"read {ceilings.read_bytes_per_second / 1e12:.3g} TB/s, matrix product of {ceilings.matmul_size} "
        f"{ceilings.matmul_flops_per_second / 1e12:.4g} TFLOP/s",
        flush=True,
    )
    for config in configs:
        decoder, origin = _decoder(config, plan.seed, workdir, mesh)
        report.values["weights"][config.architecture] = origin
        if plan.cache_dtype == "int8":
            print(f"{config.architecture}: {int8_readers(config)}", flush=True)
        _measure(plan, decoder, ceilings, report, profile)
        del decoder  # otherwise its weights count as memory of the next one
        gc.collect()
    report.finish()
    print(table(report.values), flush=True)
    if out is not None:
        _write_plots(report.values, out)
    return report.values


def _measure(
    plan: Plan,
    decoder: Decoder,
    ceilings: Ceilings,
    report: Report,
    profile: pathlib.Path | None,
) -> None:
    """Measures one architecture."""

    def put(row: dict[str, Any]) -> None:
        add_cache_ratios(row)
        report.put("rows", row)
        print(_progress(row), flush=True)

    def put_longest(row: dict[str, Any]) -> None:
        report.put("longest", row)
        print(longest_line(row), flush=True)

    if set(plan.parts) - {"longest"}:
        for length, batch in plan.lengths:
            rows.measure_row(plan, decoder, length, batch, ceilings, put)
    if profile is not None:
        session = rows.new_session(plan, decoder, *plan.lengths[-1])
        rows.fill(plan, session)
        rows.enter_window(session)
        for name, kernels in profiling.profile(session, profile / decoder.config.architecture).items():
            print(f"{decoder.config.architecture}, {name} at N {session.length:,}\n{kernels}", flush=True)
        del session
        gc.collect()
    if "longest" in plan.parts:
        rows.measure_longest(plan, decoder, put_longest)


def _progress(row: dict[str, Any]) -> str:
    """Returns a line for the row's newest part."""
    what = f"{row['architecture']}, N {row['length']:,}, batch {row['batch']}"
    if "error" in row:
        return f"{what}: {row['error']}"
    part, seconds = list(row["elapsed_seconds"].items())[-1]
    return f"{what}: {part} took {seconds:.1f} s"


def _write_plots(values: dict[str, Any], out: pathlib.Path) -> None:
    try:
        write_plots(values, out)
    except ImportError as error:
        print(f"no plots: {error}; pip install 'tlinformer-jax[bench]' has matplotlib", file=sys.stderr)


def _decoder(
    config: ModelConfig, seed: int, workdir: pathlib.Path | None, mesh: Mesh | None = None
) -> tuple[Decoder, str]:
    """Returns a decoder and the origin of its weights: the run in `workdir` if it has this architecture."""
    model = build_model(config)
    if workdir is None or load_config(workdir).model.architecture != config.architecture:
        return Decoder(
            model, jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32)), mesh
        ), f"random, seed {seed}"
    from tlinformer_jax.training.checkpoint import load_params  # the only use of Orbax here

    step, params = load_params(workdir, config)
    return Decoder(model, {"params": params}, mesh), f"{workdir}, step {step}"
