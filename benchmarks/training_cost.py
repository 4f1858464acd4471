"""Shows the cost of a trained token by sequence length: `python -m benchmarks.training_cost [--measure] --out=DIR`.

Compares a Transformer with TLinFormers of the 41M shape, and with other --architectures, by model FLOPs, which needs no
device. With --measure it also times whole training steps, all with the same number of tokens: the first of
--batch_tokens that fits in memory. It prints a Markdown table. DIR gets the record, training_cost.json, rewritten after
each row, and the figure, training_cost.png. --record=FILE,FILE draws old records; with --generation=FILE,FILE, records
of `benchmarks.inference`, the figure also shows the cost of a generated token and the cache.
"""

import dataclasses
import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags

from benchmarks.plots import log_axes
from benchmarks.steps import Case, TimingOptions, overrides, time_case
from benchmarks.token_cost import training_cost
from benchmarks.training_report import line
from tlinformer_jax.commands import cli
from tlinformer_jax.config.model import ARCHITECTURE_NAMES, WINDOWED, ModelConfig
from tlinformer_jax.config.model import ARCHITECTURES as ALL_ARCHITECTURES
from tlinformer_jax.config.run import run_config
from tlinformer_jax.errors import ConfigError, UserError
from tlinformer_jax.experiments.drawing import Curve, draw_curves, figure_of, save, styles
from tlinformer_jax.files import local_path, markdown, write_text

LENGTHS = flags.DEFINE_list("lengths", [str(1024 * 2**power) for power in range(8)], "Sequence lengths in tokens.")
WINDOWS = flags.DEFINE_list("windows", ["0", "256", "1024"], "W_oh and W_og of each TLinFormer; 0 is the Transformer.")
ARCHITECTURES = flags.DEFINE_list("architectures", [], "Other architectures to show.")
SET = flags.DEFINE_multi_string("set", [], "FIELD=VALUE[,FIELD=VALUE]: fields of all models.")
BATCH_TOKENS = flags.DEFINE_list("batch_tokens", ["131072"], "Tokens of a step; the first that fit in memory are used.")
STEPS = flags.DEFINE_integer("steps", 5, "Timed steps.", lower_bound=1)
WARMUP = flags.DEFINE_integer("warmup_steps", 1, "Steps before those that are timed.", lower_bound=0)
MEASURE = flags.DEFINE_bool("measure", False, "Time training steps on this machine's devices, too.")
RECORD = flags.DEFINE_list("record", [], "Files training_cost.json to draw, instead of counting and measuring.")
GENERATION = flags.DEFINE_list("generation", [], "Records of benchmarks.inference, inference.json, to draw beside it.")
OUT = flags.DEFINE_string("out", "", "Directory for the record and the figure; none: print only.")

Row = dict[str, Any]
# Figures per token that a row may have, with their units and factors.
FIGURES = {"seconds": ("µs", 1e6), "flops": ("MFLOP", 1e-6)}


def models(windows: Sequence[int], architectures: Sequence[str], fields: Row) -> dict[str, ModelConfig]:
    """Returns TLinFormers (the Transformer for window 0) and the other architectures, by the names of the figure."""
    base = ModelConfig(**{"dtype": "bfloat16", **fields})
    found = {}
    for size in windows:
        change = {"history_window": size, "generation_window": size} if size else {"architecture": "transformer"}
        config = dataclasses.replace(base, **change)
        found[model_name(config.architecture, size)] = config
    for name in architectures:
        config = dataclasses.replace(base, architecture=name)
        found[model_name(name, config.generation_window)] = config
    return found


def model_name(architecture: str, window: int) -> str:
    """Returns the model's name in the figure."""
    windows = f", windows of {window:,}" if architecture in WINDOWED else ""
    return ARCHITECTURE_NAMES[architecture] + windows


def by_kernels(configs: dict[str, ModelConfig]) -> dict[str, ModelConfig]:
    """Renames Gated DeltaNets that kernels of jax-linear-attention compute here."""
    from tlinformer_jax.kernels.delta import why_plain

    def named(name: str, config: ModelConfig) -> str:
        fast = config.recurrent and why_plain(config.compute_dtype, config.delta.width, False) is None
        return f"{name}, kernels" if fast else name

    return {named(name, config): config for name, config in configs.items()}


def rows(
    configs: dict[str, ModelConfig], lengths: Sequence[int], batches: Sequence[int], timing: TimingOptions | None
) -> Iterator[Row]:
    """Yields a row for each model and length: FLOPs of a token and, if it is timed, seconds and parts of `time_case`.

    A step has the first number of tokens in `batches` that fits in memory.
    """
    for name, config in configs.items():
        for length in lengths:
            row: Row = {"model": name, "length": length, "flops": training_cost(config, length), "seconds": None}
            for tokens in batches if timing is not None else ():
                sizes = {"batch_size": max(1, tokens // length)}
                values = {"model": dataclasses.asdict(config), "train": sizes, "data": {"sequence_length": length}}
                timed = time_case(Case(run_config(values), name), timing)
                print(line(timed), flush=True)
                row |= {
                    name: timed[name] for name in ("tokens", "step_seconds", "compile_seconds", "step_bytes", "error")
                }
                if timed["error"] is None:
                    row["seconds"] = timed["step_seconds"] / timed["tokens"]
                    break
            yield row


def table(found: Sequence[Row]) -> list[str]:
    """Returns Markdown lines with a row for each model and kind of figure, and a column for each length."""
    lengths = sorted({row["length"] for row in found})
    lines = []
    for kind, (unit, factor) in FIGURES.items():
        values = {(row["model"], row["length"]): row[kind] * factor for row in found if row[kind] is not None}
        for name in dict.fromkeys(name for name, _ in values):
            cells = [_number(values[name, length]) if (name, length) in values else "-" for length in lengths]
            lines.append((f"{name}, {unit}", *cells))
    return markdown(["training, for each token", *(f"{length:,}" for length in lengths)], lines)


def draw(record: Row, file: pathlib.Path, generated: Sequence[Row] = ()) -> pathlib.Path:
    """Draws the seconds of a trained token, else its FLOPs, and the cost of `generated` tokens."""
    found = record["rows"]
    kind = next(kind for kind in FIGURES if any(row[kind] is not None for row in found))
    unit, factor = FIGURES[kind]
    curves = curves_of(found, lambda row: None if row[kind] is None else row[kind] * factor)
    figure, (axes, *others) = figure_of(1, 3 if generated else 1, (5.6, 3.4))
    panels = generation_panels(generated)
    looks = styles(name for lines in (curves, *(lines for _, _, lines in panels)) for name, _, _ in lines)
    for panel, (title, label, lines) in zip(others, panels):
        draw_curves(panel, lines, looks)
        log_axes(panel)
        panel.set(xlabel="tokens before it", ylabel=label)
        panel.set_title(title, fontsize=10)
    draw_curves(axes, curves, looks)
    log_axes(axes)
    lengths = sorted({row["length"] for row in found})
    axes.set_xticks(lengths, [f"{length / 1024:g}K" if length >= 1024 else str(length) for length in lengths])
    axes.minorticks_off()
    axes.set(xlabel="tokens of a sequence", ylabel=f"{unit} for each trained token")
    measured = f"measured, {record['device']}" if kind == "seconds" else "counted"
    axes.set_title(f"Cost of training ({measured})", fontsize=10)
    return save(figure, file)


def curves_of(found: Sequence[Row], value: Callable[[Row], float | None]) -> list[Curve]:
    """Returns a curve by length for each model, without the rows whose value is None."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for row in found:
        lengths, values = curves.setdefault(row["model"], ([], []))
        if (number := value(row)) is not None:
            lengths.append(row["length"])
            values.append(number)
    return [(name, *axes) for name, axes in curves.items()]


def generation_panels(found: Sequence[Row]) -> list[tuple[str, str, list[Curve]]]:
    """Returns title, unit and curves for a generated token (mean over a window and its slide) and for the cache."""

    def milliseconds(row: Row) -> float | None:
        if "windows" in row:
            return row["windows"]["seconds"] / row["windows"]["tokens"] * 1e3
        if "sustained" not in row or (row["architecture"] in WINDOWED and "slide" not in row):
            return None
        slide = row["slide"]["seconds"] / row["generation_window"] if "slide" in row else 0.0
        return (row["sustained"]["seconds"] + slide) * 1e3

    return [
        ("Cost of generation (measured)", "ms for each generated token", curves_of(found, milliseconds)),
        ("Cache or state of one sequence", "MB", curves_of(found, lambda row: row["cache_bytes"] * 1e-6)),
    ]


def read_generation(names: Sequence[str]) -> list[Row]:
    """Reads the rows with one sequence from records of `benchmarks.inference`; of equal rows the first counts."""
    try:
        records = [json.loads(local_path(name, "--generation").read_text(encoding="utf-8")) for name in names]
        found = [
            row | {"model": model_name(row["architecture"], window), "generation_window": window}
            for record in records
            for window in [record["config"]["generation_window"]]
            for row in record["rows"]
            if row["batch"] == 1 and "cache_bytes" in row
        ]
        chosen = {(row["model"], row["length"]): row for row in found[::-1]}
        return [chosen[key] for key in sorted(chosen, key=_sort_key)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--generation={','.join(names)}: must be records of benchmarks.inference ({error})") from None


def main() -> None:
    """Counts, measures if asked to, prints and writes."""
    folder = cli.writable_workdir(OUT.value, "--out") if OUT.value else None
    generated = read_generation(GENERATION.value)
    record = _read(RECORD.value) if RECORD.value else _made(folder)
    print("\n".join(table(record["rows"])))
    if folder is not None and importlib.util.find_spec("matplotlib") is None:
        print("no figure: pip install 'tlinformer-jax[bench]' has matplotlib", file=sys.stderr)
    elif folder is not None:
        print(draw(record, folder / "training_cost.png", generated))


def _made(folder: pathlib.Path | None) -> Row:
    """Returns a new record; its file is written after each row."""
    windows = cli.integers(WINDOWS) if WINDOWS.value or not ARCHITECTURES.value else ()
    if unknown := set(ARCHITECTURES.value) - set(ALL_ARCHITECTURES):
        raise ConfigError("--architectures", ",".join(sorted(unknown)), f"must be among {', '.join(ALL_ARCHITECTURES)}")
    lengths, batches = cli.integers(LENGTHS, 1), cli.integers(BATCH_TOKENS, 1)
    configs = models(windows, ARCHITECTURES.value, _model_fields(SET.value))
    record: Row = {
        "command": " ".join(["python -m benchmarks.training_cost", *sys.argv[1:]]),
        "device": None,
        "rows": [],
    }
    timing = None
    if MEASURE.value:
        import jax

        jax.config.update("jax_enable_compilation_cache", False)  # cache hits would look like fast compilations
        record |= {"device": jax.devices()[0].device_kind, "devices": jax.device_count(), "jax": jax.__version__}
        timing, configs = TimingOptions(STEPS.value, WARMUP.value), by_kernels(configs)
    for row in rows(configs, sorted(lengths), batches, timing):
        record["rows"].append(row)
        if folder is not None:
            write_text(folder / "training_cost.json", json.dumps(record, indent=1) + "\n")
    return record


def _model_fields(texts: Sequence[str]) -> Row:
    """Returns the fields of --set; a ConfigError for a field of another section, which this table does not vary."""
    fields = {}
    for text in texts:
        for (section, field), value in overrides(text, "--set").items():
            if section != "model":
                raise ConfigError("--set", f"{section}.{field}={value}", "must be fields of the section model")
            fields[field] = value
    return fields


def _read(names: Sequence[str]) -> Row:
    """Returns one record from several files; if several have the same row, the first file counts."""
    try:
        records = [json.loads(local_path(name, "--record").read_text(encoding="utf-8")) for name in names]
        found = {(row["model"], row["length"]): row for record in records[::-1] for row in record["rows"]}
        if not found:
            raise ValueError("they have no rows")
        return records[0] | {"rows": [found[key] for key in sorted(found, key=_sort_key)]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--record={','.join(names)}: must be records of this command ({error})") from None


def _sort_key(model: tuple[str, int]) -> tuple[int, str, int]:
    """Returns a sort key, by the length of the name: the Transformer first, TLinFormers by their windows."""
    name, length = model
    return len(name), name, length


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    cli.run(main)
