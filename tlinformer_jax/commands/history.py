"""Measures what the history contributes to a trained model: `python -m tlinformer_jax history --workdir=DIR`.

Reports the change in loss if history beyond a distance is cut or if the history is another text's, the loss by length
of the history, and attention to it by distance; `tlinformer_jax.evaluation.history` defines them. Nothing is trained.
Writes history.json, and a CSV file and a figure of each measure that the model has, to --out=DIR. `--then=history`
measures the same directly after a training.
"""

import pathlib
import sys
from typing import Any

from absl import flags

from tlinformer_jax.commands import cli
from tlinformer_jax.files import writing

WORKDIR, STEP = cli.run_flags()
OUT = flags.DEFINE_string("out", "", "Directory for history.json, CSV files and figures; created if it is missing.")
SPLIT = flags.DEFINE_enum("split", "validation", ["train", "validation", "test"], "Split to measure on.")
SAMPLES = flags.DEFINE_integer("samples", 64, "Samples, spread evenly over the split.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", None, "Tokens per sample; as in training if not given.", lower_bound=1)
DISTANCES = flags.DEFINE_list("distances", [], "Distances at which to cut; 0 and powers of 4 from 16 if not given.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Samples at a time.", lower_bound=1)


def main() -> None:
    """Measures, prints a table of the cuts, and writes the files of --out."""
    from tlinformer_jax.evaluation.history import measure_history
    from tlinformer_jax.evaluation.report import describe
    from tlinformer_jax.training.checkpoint import load_run
    from tlinformer_jax.training.device_memory import EVALUATION_ADVICE, memory_advice
    from tlinformer_jax.training.setup import use_compilation_cache

    workdir = cli.given_path(WORKDIR, "the directory of a run")
    out = cli.writable_workdir(OUT.value, "--out") if OUT.value else None
    distances = sorted(set(cli.integers(DISTANCES))) if DISTANCES.value else ()
    use_compilation_cache()
    trained = load_run(workdir, STEP.value)
    stream = trained.run.split(SPLIT.value, LENGTH.value)
    with memory_advice(EVALUATION_ADVICE):
        measured = measure_history(
            trained, stream, LENGTH.value, samples=SAMPLES.value, distances=distances, batch_size=BATCH_SIZE.value
        )
    if out is not None:
        command = ["tlinformer_jax history", *sys.argv[1:]]
        _write(describe(trained, command) | {"split": SPLIT.value} | measured, out)
    cli.print_result("\n".join(lines(measured)))  # last: a full disk behind stdout must not cost the file


def lines(measured: dict[str, Any]) -> list[str]:
    """Formats the cuts, the swap and the shares; '-' if no token counts."""
    from tlinformer_jax.files import markdown

    measures = [(f"{cut['distance']:,}", cut) for cut in measured["cuts"]]
    if measured["swapped"]:
        measures.append(("another text's", measured["swapped"]))
    rows = []
    for name, found in measures:
        values = (found[value] for value in ("loss", "change", "affected_change"))
        rows.append((name, *("-" if value is None else f"{value:.4f}" for value in values)))
    text = markdown(("rows of history left", "loss", "change", "change of tokens with more"), rows)
    if measured["share"]:
        shares = ", ".join(f"{share:.3f}" for share in measured["share"])
        text.append(f"share of the history in what x reads, by block: {shares}")
    return text


def _write(report: dict[str, Any], out: pathlib.Path) -> None:
    """Writes history.json, and CSV files and figures if pandas and matplotlib are installed."""
    from tlinformer_jax.evaluation.report import write_report
    from tlinformer_jax.files import finite

    write_report(finite(report), out / "history.json")
    try:
        from tlinformer_jax.experiments.figures import history_tables, plot_history

        with writing(f"--out={out}:"):
            for name, table in history_tables(report).items():
                table.to_csv(out / f"{name}.csv", index=False)
            plot_history([("", report)], out)
    except ImportError as error:
        print(f"no CSV files or figures: {error}; pip install 'tlinformer-jax[report]'", file=sys.stderr)
