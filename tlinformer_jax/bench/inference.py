"""Generation: `python -m tlinformer_jax.bench.inference --lengths=1024,8192x32,1000000 --out=DIR`.

Measures latency, throughput and memory of the decoder at growing prompt lengths, by the protocol of the paper's
Figure 9 and beside it what that leaves out: the device loop alone, a slide alone, a prefill alone, each as a multiple
of what this device could do at best. `--config` takes a config file as training does (it needs ml_collections);
without one the model is the 41M shape, as the shape flags change it.
"""

import dataclasses
import gc
import pathlib
import shlex
import sys
import time
from typing import TYPE_CHECKING, Any

from absl import flags

from tlinformer_jax import cli
from tlinformer_jax.errors import ConfigError, UserError
from tlinformer_jax.models.config import ARCHITECTURES as ALL_ARCHITECTURES
from tlinformer_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from tlinformer_jax.bench.limits import Ceilings
    from tlinformer_jax.bench.report import Report
    from tlinformer_jax.bench.rows import Plan
    from tlinformer_jax.decoding.decoder import Decoder

LENGTHS = flags.DEFINE_list("lengths", ["1024", "10000", "100000"], "Prompt lengths; NxB is a batch of B prompts.")
BATCH = flags.DEFINE_integer("batch", 1, "Sequences where --lengths does not say.", lower_bound=1)
ARCHITECTURES = flags.DEFINE_list("architectures", ["tlinformer", "transformer"], "Architectures, of equal fields.")
PARTS = flags.DEFINE_list("parts", ["figure9", "prefill", "windows", "sustained", "slide"], "What to measure.")
LONGEST = flags.DEFINE_list(
    "longest", ["8000000", "12000000", "16000000", "18000000", "20000000"], "Lengths that the part 'longest' tries."
)
WORKDIR = flags.DEFINE_string("workdir", "", "Run whose configuration and weights are taken.")
RANDOM_WEIGHTS = flags.DEFINE_bool("random_weights", False, "Draw the weights even where --workdir has some.")
WINDOW = flags.DEFINE_integer("window", None, "history_window and generation_window.", lower_bound=1)
SHAPE = {
    name: flags.DEFINE_integer(name, None, f"ModelConfig.{name}.", lower_bound=1)
    for name in ("d_model", "num_heads", "num_blocks", "vocab_size")
}
WINDOWS = flags.DEFINE_integer("windows", 3, "Generation windows of the part 'windows'.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 1.0, "Budget of each measurement, compilation apart.", lower_bound=0.0)
MAX_UNCACHED = flags.DEFINE_integer("max_uncached_length", 131072, "Longest prompt timed without a cache.")
MAX_QUADRATIC = flags.DEFINE_integer(
    "max_quadratic_prefill", 131072, "Longest prompt given to 'transformer'; above, its cache is filled randomly."
)
SEED = flags.DEFINE_integer("seed", 0, "Of weights and prompts.", lower_bound=0, upper_bound=2**32 - 1)
PROFILE = flags.DEFINE_string("profile", "", "Directory for traces of a hit loop and a slide at the largest length.")
OUT = flags.DEFINE_string("out", "", "Directory for inference.json, inference.csv and plots; none: print only.")


def main() -> None:
    """Checks all flags, then measures every architecture at every length."""
    from tlinformer_jax.bench.rows import PARTS as ALL_PARTS
    from tlinformer_jax.bench.rows import Plan

    lengths = sorted({_length(text) for text in LENGTHS.value}, key=lambda place: (place[0] * place[1], place))
    longest = sorted({_positive("--longest", text) for text in LONGEST.value})
    _check_names("--architectures", ARCHITECTURES.value, ALL_ARCHITECTURES)
    _check_names("--parts", PARTS.value, ALL_PARTS)
    base = _base_config()
    configs = [dataclasses.replace(base, architecture=name) for name in dict.fromkeys(ARCHITECTURES.value)]
    out = cli.writable_workdir(OUT.value, "--out") if OUT.value else None
    profile = cli.writable_workdir(PROFILE.value, "--profile") if PROFILE.value else None
    plan = Plan(tuple(PARTS.value), WINDOWS.value, SECONDS.value, MAX_UNCACHED.value, MAX_QUADRATIC.value, SEED.value)
    run_benchmark(plan, configs, lengths, longest if "longest" in plan.parts else [], out, profile)


def run_benchmark(
    plan: "Plan",
    configs: list[ModelConfig],
    lengths: list[tuple[int, int]],
    longest: list[int],
    out: pathlib.Path | None,
    profile: pathlib.Path | None,
) -> dict[str, Any]:
    """Measures, prints and writes.

    Args:
      plan: what to measure.
      configs: of the models, one after another; equal but for the architecture.
      lengths: (tokens of a prompt, sequences), in the order in which they are measured.
      longest: prompt lengths of the part 'longest', ascending.
      out: for the report and the plots; None prints only.
      profile: for traces; None makes none.

    Returns:
      what inference.json holds.
    """
    from tlinformer_jax.bench.limits import measure_ceilings
    from tlinformer_jax.bench.report import Report, table
    from tlinformer_jax.bench.timing import device_facts
    from tlinformer_jax.training.setup import use_compilation_cache

    use_compilation_cache()
    report = Report(
        out,
        device_facts()
        | {
            "command": shlex.join(["python", "-m", "tlinformer_jax.bench.inference", *sys.argv[1:]]),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
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
        decoder, origin = _decoder(config, plan.seed)
        report.values["weights"][config.architecture] = origin
        _measure(plan, decoder, lengths, longest, ceilings, report, profile)
        del decoder  # its weights would count as the next one's memory
        gc.collect()
    report.finish()
    print(table(report.values), flush=True)
    if out is not None:
        _write_plots(report.values, out)
    return report.values


def _measure(
    plan: "Plan",
    decoder: "Decoder",
    lengths: list[tuple[int, int]],
    longest: list[int],
    ceilings: "Ceilings",
    report: "Report",
    profile: pathlib.Path | None,
) -> None:
    """Measures one architecture."""
    from tlinformer_jax.bench import profiling, rows
    from tlinformer_jax.bench.report import add_cache_ratios

    def put(row: dict[str, Any]) -> None:
        add_cache_ratios(row)
        report.put("rows", row)
        print(_progress(row), flush=True)

    if set(plan.parts) - {"longest"}:
        for length, batch in lengths:
            rows.measure_row(plan, decoder, length, batch, ceilings, put)
    if profile is not None:
        session = rows.new_session(plan, decoder, *lengths[-1])
        rows.fill(plan, session)
        rows.enter_window(session)
        for name, kernels in profiling.profile(session, profile / decoder.config.architecture).items():
            print(f"{decoder.config.architecture}, {name} at N {session.length:,}\n{kernels}", flush=True)
        del session
        gc.collect()
    rows.measure_longest(plan, decoder, longest, lambda row: report.put("longest", row))


def _progress(row: dict[str, Any]) -> str:
    """A line for the row's newest part."""
    place = f"{row['architecture']}, N {row['length']:,}, batch {row['batch']}"
    if "error" in row:
        return f"{place}: {row['error']}"
    part, seconds = list(row["elapsed_seconds"].items())[-1]
    return f"{place}: {part} took {seconds:.1f} s"


def _write_plots(values: dict[str, Any], out: pathlib.Path) -> None:
    from tlinformer_jax.bench.plots import write_plots

    try:
        write_plots(values, out)
    except ImportError as error:
        print(f"no plots: {error}; pip install 'tlinformer-jax[bench]' has matplotlib", file=sys.stderr)


def _decoder(config: ModelConfig, seed: int) -> tuple["Decoder", str]:
    """A decoder, and where its weights are from: the working directory's if it has this architecture's."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from tlinformer_jax.decoding.decoder import Decoder
    from tlinformer_jax.models.model import build_model

    model, tokens = build_model(config), jnp.zeros((1, 1), jnp.int32)
    if _has_weights(config.architecture):
        from tlinformer_jax.training.checkpoint import restore_params

        here = SingleDeviceSharding(jax.devices()[0])
        shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes)
        workdir = pathlib.Path(WORKDIR.value).expanduser()
        step, params = restore_params(workdir, abstract)
        return Decoder(model, {"params": params}), f"{workdir}, step {step}"
    return Decoder(model, jax.jit(model.init)(jax.random.key(seed), tokens)), f"random, seed {seed}"


def _has_weights(architecture: str) -> bool:
    """Whether the working directory's weights are wanted and of this architecture."""
    if not WORKDIR.value or RANDOM_WEIGHTS.value:
        return False
    return _workdir_config().architecture == architecture


def _workdir_config() -> ModelConfig:
    from tlinformer_jax.config import load_config

    return load_config(pathlib.Path(WORKDIR.value).expanduser()).model


def _base_config() -> ModelConfig:
    """The model's configuration, its architecture aside.

    Raises:
      UserError: for flags that contradict each other, and for values that are not allowed.
    """
    changes: dict[str, Any] = {name: flag.value for name, flag in SHAPE.items() if flag.value is not None}
    configured = "config" in flags.FLAGS and flags.FLAGS.config is not None
    if configured and WORKDIR.value:
        raise UserError("--config: not together with --workdir, which has a configuration of its own")
    if WORKDIR.value:
        config = _workdir_config()
        if changes and not RANDOM_WEIGHTS.value:
            name = next(iter(changes))
            raise ConfigError(
                f"--{name}", changes[name], "cannot change the weights of --workdir; see --random_weights"
            )
    elif configured:
        from tlinformer_jax.config import run_config

        config = run_config(cli.config_values()).model
    else:
        config = ModelConfig()
    if WINDOW.value is not None:
        changes |= {"history_window": WINDOW.value, "generation_window": WINDOW.value}
    return dataclasses.replace(config, **changes)


def _length(text: str) -> tuple[int, int]:
    """(tokens, sequences) of an element of --lengths."""
    tokens, times, batch = text.partition("x")
    return _positive("--lengths", tokens, text), _positive("--lengths", batch, text) if times else BATCH.value


def _positive(flag: str, text: str, whole: str | None = None) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise ConfigError(flag, text if whole is None else whole, "must be positive integers, separated by commas")
    return int(text)


def _check_names(flag: str, names: list[str], allowed: tuple[str, ...]) -> None:
    if not names:
        raise ConfigError(flag, "", f"must name at least one of {', '.join(allowed)}")
    for name in names:
        if name not in allowed:
            raise ConfigError(flag, name, f"must be among {', '.join(allowed)}")


def _define_config_flag() -> None:
    """Defines --config where it is used: config files need ml_collections, which a bare machine may lack."""
    if not any(argument.lstrip("-").split("=")[0].split(".")[0] == "config" for argument in sys.argv[1:]):
        return
    try:
        from ml_collections import config_flags
    except ImportError:
        cli.fail("--config: config files need the package ml_collections, which is not installed")
    config_flags.DEFINE_config_file("config", None, "Config file; FILE:VARIANT picks a variant.", lock_config=True)


if __name__ == "__main__":
    _define_config_flag()
    cli.run(main)
