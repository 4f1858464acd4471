"""Measures generation: `python -m benchmarks.inference --lengths=1024,8192x32,1000000 --out=DIR`.

Measures latency, throughput and memory of the decoder for growing prompts, by the protocol of the paper's Figure 9. It
also measures the device loop, a slide and a prefill alone, each as a multiple of the shortest time that this device
could need. `--config` takes a config file as training does (it needs ml_collections); without one the model has the 41M
shape, changed by the shape flags.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from absl import flags

from benchmarks.flags import define_config_flag
from tlinformer_jax.commands import cli
from tlinformer_jax.config.model import ARCHITECTURES as ALL_ARCHITECTURES
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.config.train import NUM_SEEDS
from tlinformer_jax.errors import ConfigError, UserError
from tlinformer_jax.files import local_path

LENGTHS = flags.DEFINE_list("lengths", ["1024", "10000", "100000"], "Prompt lengths; NxB is a batch of B prompts.")
BATCH = flags.DEFINE_integer("batch", 1, "Sequences where --lengths does not say.", lower_bound=1)
ARCHITECTURES = flags.DEFINE_list(
    "architectures", ["tlinformer", "transformer"], "Architectures; all other fields are equal."
)
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
MAX_UNCACHED = flags.DEFINE_integer(
    "max_uncached_length", 131072, "Longest prompt timed without a cache.", lower_bound=0
)
MAX_QUADRATIC = flags.DEFINE_integer(
    "max_quadratic_prefill",
    131072,
    "Longest prompt given to 'transformer'; above, its cache is filled randomly.",
    lower_bound=0,
)
CONTEXT = flags.DEFINE_integer("context", 1, "Devices that the history is split over.")
CACHE_DTYPE = flags.DEFINE_string("cache_dtype", "auto", "Of keys and values that grow with a sequence: auto or int8.")
SEED = flags.DEFINE_integer("seed", 0, "Of weights and prompts.", lower_bound=0, upper_bound=NUM_SEEDS - 1)
PROFILE = flags.DEFINE_string("profile", "", "Directory for traces of a hit loop and a slide at the largest length.")
OUT = flags.DEFINE_string("out", "", "Directory for inference.json and plots; none: print only.")


def main() -> None:
    """Checks all flags, then measures every architecture at every length."""
    from benchmarks.rows import PARTS as ALL_PARTS
    from benchmarks.rows import Plan
    from benchmarks.runner import run_benchmark
    from tlinformer_jax.training.setup import use_compilation_cache

    lengths = sorted(set(_lengths()), key=lambda size: (size[0] * size[1], size))
    longest = sorted(set(cli.integers(LONGEST, 1))) if LONGEST.value or "longest" in PARTS.value else []
    if not math.isfinite(SECONDS.value):
        raise ConfigError("--seconds", SECONDS.value, "must be a finite number >= 0")
    _check_names("--architectures", ARCHITECTURES.value, ALL_ARCHITECTURES)
    _check_names("--parts", PARTS.value, ALL_PARTS)
    base = _base_config()
    configs = [dataclasses.replace(base, architecture=name) for name in dict.fromkeys(ARCHITECTURES.value)]
    mesh = _mesh(configs)
    _check_cache_dtype(configs)
    out = cli.writable_workdir(OUT.value, "--out") if OUT.value else None
    profile = cli.writable_workdir(PROFILE.value, "--profile") if PROFILE.value else None
    plan = Plan(
        lengths=tuple(lengths),
        longest=tuple(longest),
        parts=tuple(PARTS.value),
        windows=WINDOWS.value,
        seconds=SECONDS.value,
        max_uncached_length=MAX_UNCACHED.value,
        max_quadratic_prefill=MAX_QUADRATIC.value,
        seed=SEED.value,
        cache_dtype=CACHE_DTYPE.value,
    )
    workdir = local_path(WORKDIR.value, "--workdir") if WORKDIR.value and not RANDOM_WEIGHTS.value else None
    use_compilation_cache()
    run_benchmark(plan, configs, workdir=workdir, out=out, profile=profile, mesh=mesh)


def _mesh(configs: list[ModelConfig]) -> Any:
    """Returns the mesh of the devices that the history is split over, None for one device.

    Raises:
      ConfigError: if there are too few devices, or a model has no history to split.
    """
    from tlinformer_jax.decoding.context_parallel import context_mesh, split_of

    try:
        mesh = context_mesh(CONTEXT.value)
        for config in configs:
            split_of(mesh, config)
    except ConfigError as error:
        raise ConfigError("--context", error.value, error.allowed) from None
    return mesh


def _check_cache_dtype(configs: list[ModelConfig]) -> None:
    """Refuses a cache dtype that does not exist or that a model's cache does not support."""
    from tlinformer_jax.decoding.cache import check_cache_dtype
    from tlinformer_jax.decoding.sampling import GenerationConfig

    try:
        GenerationConfig(cache_dtype=CACHE_DTYPE.value)
        for config in configs:
            check_cache_dtype(config, CACHE_DTYPE.value)
    except ConfigError as error:
        raise ConfigError("--cache_dtype", error.value, error.allowed) from None


def _workdir_config() -> ModelConfig:
    from tlinformer_jax.config.run import load_config

    return load_config(local_path(WORKDIR.value, "--workdir")).model


def _base_config() -> ModelConfig:
    """Returns the model's configuration; the architecture is set later.

    Raises:
      UserError: for flags that contradict each other, and for values that are not allowed.
    """
    changes: dict[str, Any] = {name: flag.value for name, flag in SHAPE.items() if flag.value is not None}
    configured = cli.config_given()
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
        from tlinformer_jax.config.run import run_config

        config = run_config(cli.config_values()).model
    else:
        config = ModelConfig()
    if WINDOW.value is not None:
        changes |= {"history_window": WINDOW.value, "generation_window": WINDOW.value}
    return dataclasses.replace(config, **changes)


def _lengths() -> Iterator[tuple[int, int]]:
    """Yields (tokens, sequences) of each element of --lengths."""
    for text in LENGTHS.value or [""]:
        tokens, times, batch = text.partition("x")
        length, *sequences = cli.integers(LENGTHS, 1, parts=[tokens, batch] if times else [tokens])
        yield length, sequences[0] if sequences else BATCH.value


def _check_names(flag: str, names: list[str], allowed: tuple[str, ...]) -> None:
    if not names:
        raise ConfigError(flag, "", f"must name at least one of {', '.join(allowed)}")
    for name in names:
        if name not in allowed:
            raise ConfigError(flag, name, f"must be among {', '.join(allowed)}")


if __name__ == "__main__":
    define_config_flag()
    cli.run(main)
