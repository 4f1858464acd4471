"""Measures training speed: `python -m benchmarks.training --lengths=512,8192 --batch_tokens=32768,65536 --out=DIR`.

Times whole training steps (forward, backward, AdamW) on random tokens, by default of the 41M shape with dropout 0. Each
architecture, length, setting (`--try`) and batch (`--batch_tokens`) is a row; rows that do not fit in memory say so.
Compilation is timed separately, without the persistent cache; `benchmarks.steps` says how steps are timed.

    --config=FILE                     another base configuration; its sections `model` and `train` are used
    --set=model.d_model=512           a field for all rows, except those that the rows set themselves
    --try=model.memory=low            a setting to time instead of the configuration as it is; --try= adds the latter
    --try=data.document_masking=True  samples of separate documents, 70 tokens long on average

--init_scale=3 multiplies the initial weights by 3.

DIR receives training.json (with device, JAX version and command), training.md with the best row of every architecture
and length, and plots if matplotlib is installed.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from benchmarks.flags import define_config_flag
from benchmarks.steps import Case, TimingOptions, base_fields, cases, checked_mesh, time_case
from benchmarks.training_report import best_rows, line, plot_training, table, write_results
from tlinformer_jax.commands import cli
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.config.run import run_config
from tlinformer_jax.errors import ConfigError

ARCHITECTURES = flags.DEFINE_list("architectures", ["tlinformer", "transformer"], "Architectures to time.")
LENGTHS = flags.DEFINE_list("lengths", ["512"], "Sequence lengths in tokens.")
BATCH_TOKENS = flags.DEFINE_list("batch_tokens", ["32768"], "Tokens of a step, each of which is tried.")
STEPS = flags.DEFINE_integer("steps", 50, "Timed steps.", lower_bound=1)
WARMUP = flags.DEFINE_integer("warmup_steps", 3, "Steps before those that are timed.", lower_bound=0)
INIT_SCALE = flags.DEFINE_float("init_scale", 1.0, "Factor of the initial weights.", lower_bound=0.0)
SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE[,FIELD=VALUE]: fields for all rows.")
TRY = flags.DEFINE_multi_string("try", [], "FIELD=VALUE[,FIELD=VALUE]: a setting to time; repeatable.")
WINDOW = flags.DEFINE_integer("window", 0, "history_window and generation_window; 0: as configured.", lower_bound=0)
PROFILE = flags.DEFINE_string(
    "profile", "", "Directory for an xprof trace of three steps of each row, whose kernels are printed."
)
OUT = flags.DEFINE_string("out", "", "Directory for the results; none: print only.")


def _results(plan: Sequence[Case]) -> Iterator[dict[str, Any]]:
    for case in plan:
        row = time_case(case, TimingOptions(STEPS.value, WARMUP.value, INIT_SCALE.value, PROFILE.value))
        print(line(row), flush=True)
        if "kernels" in row:
            print(row["kernels"], flush=True)
        yield row


def _configured() -> dict[str, Any]:
    """Returns the configuration of --config, or the 41M shape's."""
    if cli.config_given():
        return cli.config_values().to_dict()
    return run_config({"model": dataclasses.asdict(ModelConfig())}).to_dict()


def main() -> None:
    """Times every row and writes the results after each."""
    import jax

    lengths, sizes = cli.integers(LENGTHS, 1), cli.integers(BATCH_TOKENS, 1)
    if not ARCHITECTURES.value:
        raise ConfigError("--architectures", "", "must name at least one architecture")
    base = base_fields(_configured(), WINDOW.value, SET.value)
    plan = cases(base, ARCHITECTURES.value, lengths, TRY.value or [""], sizes)
    for case in plan:
        checked_mesh(case.config)
    folder = cli.writable_workdir(OUT.value, "--out") if OUT.value else None
    jax.config.update("jax_enable_compilation_cache", False)  # cache hits would look like fast compilations
    device = jax.devices()[0].device_kind
    print(f"{jax.device_count()} x {device}, JAX {jax.__version__}", flush=True)
    command = ["python -m benchmarks.training", *sys.argv[1:]]
    report = {"device": device, "devices": jax.device_count(), "jax": jax.__version__, "command": " ".join(command)}
    rows: list[dict[str, Any]] = []
    for row in _results(plan):
        rows.append(row)
        if folder is not None:
            write_results(folder, report | {"rows": rows})
    print(table(rows), flush=True)
    if folder is not None:
        plot_training(best_rows(rows), f"{report['devices']} x {device}", folder)


if __name__ == "__main__":
    define_config_flag()
    cli.run(main)
