"""Shows the cost of a trained token by sequence length: `python -m benchmarks.training_cost [--measure] --out=DIR`.

Compares a Transformer with TLinFormers of the 41M shape by model FLOPs, which needs no device. With --measure it also
times whole training steps of --batch_tokens tokens. It prints a Markdown table. DIR gets the record,
training_cost.json, rewritten after each row, and the figure, training_cost.png. --record=FILE,FILE draws old records.
"""

import dataclasses
import importlib.util
import json
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from benchmarks.cost import training_cost
from benchmarks.plots import log_axes
from benchmarks.training import (
    BATCH_TOKENS,
    LENGTHS,
    OUT,
    SET,
    STEPS,
    WARMUP,
    Job,
    Timing,
    integers,
    line,
    overrides,
    time_job,
)
from tlinformer_jax.commands import cli
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.config.run import run_config
from tlinformer_jax.errors import UserError
from tlinformer_jax.experiments.drawing import draw_curves, figure_of, save
from tlinformer_jax.files import local_path, markdown, write_text

WINDOWS = flags.DEFINE_list("windows", ["0", "256", "1024"], "W_oh and W_og of each TLinFormer; 0 is the Transformer.")
MEASURE = flags.DEFINE_bool("measure", False, "Time training steps on this machine's devices, too.")
RECORD = flags.DEFINE_list("record", [], "Files training_cost.json to draw, instead of counting and measuring.")

Row = dict[str, Any]
# Figures per token that a row may have, with their units and factors.
FIGURES = {"seconds": ("µs", 1e6), "flops": ("MFLOP", 1e-6)}


def models(windows: Sequence[int], fields: Row) -> dict[str, ModelConfig]:
    """Returns a TLinFormer for each size of both windows, and the Transformer for 0, by the names of the figure."""
    base = ModelConfig(**{"dtype": "bfloat16", **fields})
    found = {}
    for size in windows:
        name = f"TLinFormer, windows of {size:,}" if size else "Transformer"
        change = {"history_window": size, "generation_window": size} if size else {"architecture": "transformer"}
        found[name] = dataclasses.replace(base, **change)
    return found


def rows(configs: dict[str, ModelConfig], lengths: Sequence[int], tokens: int, timing: Timing | None) -> Iterator[Row]:
    """Yields a row for each model and length: FLOPs of a token and, if it is timed, seconds and parts of `time_job`."""
    for name, config in configs.items():
        for length in lengths:
            row: Row = {"model": name, "length": length, "flops": training_cost(config, length), "seconds": None}
            if timing is not None:
                sizes = {"batch_size": max(1, tokens // length)}
                values = {"model": dataclasses.asdict(config), "train": sizes, "data": {"sequence_length": length}}
                timed = time_job(Job(run_config(values), name), timing)
                print(line(timed), flush=True)
                if timed["error"] is None:
                    row["seconds"] = timed["step_seconds"] / timed["tokens"]
                row |= {
                    name: timed[name] for name in ("tokens", "step_seconds", "compile_seconds", "step_bytes", "error")
                }
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


def draw(record: Row, file: pathlib.Path) -> pathlib.Path:
    """Draws the seconds of a token if they were measured, else its FLOPs."""
    found = record["rows"]
    kind = next(kind for kind in FIGURES if any(row[kind] is not None for row in found))
    unit, factor = FIGURES[kind]
    curves = []
    for name in dict.fromkeys(row["model"] for row in found):
        own = [row for row in found if row["model"] == name and row[kind] is not None]
        curves.append((name, [row["length"] for row in own], [row[kind] * factor for row in own]))
    figure, (axes,) = figure_of(panel=(5.6, 3.4))
    draw_curves(axes, curves)
    log_axes(axes)
    lengths = sorted({row["length"] for row in found})
    axes.set_xticks(lengths, [f"{length / 1024:g}K" if length >= 1024 else str(length) for length in lengths])
    axes.minorticks_off()
    axes.set(xlabel="tokens of a sequence", ylabel=f"{unit} for each trained token")
    measured = f"measured, {record['device']}" if kind == "seconds" else "counted"
    axes.set_title(f"Cost of training ({measured})", fontsize=10)
    return save(figure, file)


def main() -> None:
    """Counts, measures if asked to, prints and writes."""
    folder = cli.writable_workdir(OUT.value, "--out") if OUT.value else None
    record = _read(RECORD.value) if RECORD.value else _made(folder)
    print("\n".join(table(record["rows"])))
    if folder is not None and importlib.util.find_spec("matplotlib") is not None:
        print(draw(record, folder / "training_cost.png"))


def _made(folder: pathlib.Path | None) -> Row:
    """Returns a new record; its file is written after each row."""
    if not WINDOWS.value or not all(text.isdecimal() for text in WINDOWS.value):
        raise UserError(f"--windows={','.join(WINDOWS.value)}: must be integers of 0 or more with commas between")
    lengths, (tokens, *_) = integers("--lengths", LENGTHS.value), integers("--batch_tokens", BATCH_TOKENS.value)
    fields = {field: value for text in SET.value for (_, field), value in overrides(text).items()}
    configs = models([int(text) for text in WINDOWS.value], fields)
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
        timing = Timing(STEPS.value, WARMUP.value)
    for row in rows(configs, sorted(lengths), tokens, timing):
        record["rows"].append(row)
        if folder is not None:
            write_text(folder / "training_cost.json", json.dumps(record, indent=1) + "\n")
    return record


def _read(names: Sequence[str]) -> Row:
    """Returns one record from several files; if several have the same row, the first file counts."""
    try:
        records = [json.loads(local_path(name, "--record").read_text(encoding="utf-8")) for name in names]
        found = {(row["model"], row["length"]): row for record in records[::-1] for row in record["rows"]}
        return records[0] | {"rows": [found[place] for place in sorted(found, key=_place)]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--record={','.join(names)}: must be records of this command ({error})") from None


def _place(model: tuple[str, int]) -> tuple[int, str, int]:
    """Returns a sort key: the Transformer first, then TLinFormers by their windows."""
    name, length = model
    return len(name), name, length


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    for flag, value in (("lengths", [str(1024 * 2**power) for power in range(8)]), ("steps", 5), ("warmup_steps", 1)):
        flags.FLAGS.set_default(flag, value)
    flags.FLAGS.set_default("batch_tokens", ["131072"])
    cli.run(main)
