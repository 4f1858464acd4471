"""The tables of a sweep: sweep.csv, sweep.json and sweep.md. Without JAX."""

import csv
import io
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tlinformer_jax.config import run_config
from tlinformer_jax.errors import DataError
from tlinformer_jax.experiments.curves import (
    Group,
    Mean,
    Result,
    cache_bytes,
    groups_of,
    knee_of,
    observed_share,
    perplexity,
    share_curves,
    tokens_per_second,
    wall_seconds,
    why_no_knee,
)
from tlinformer_jax.files import write_text

ACCURACIES = ("accuracy", "accuracy_own", "accuracy_observed", "accuracy_history", "chance")


def row_of(result: Result) -> dict[str, Any]:
    """A run as one flat row."""
    config = run_config(result["config"])
    model, validation = config.model, result["validation"]
    return {
        "name": result["name"],
        "point": result.get("point"),
        "seed": result["seed"],
        "architecture": model.architecture,
        "sequence_length": config.data.sequence_length,
        "history_window": model.history_window,
        "generation_window": model.generation_window,
        "share": observed_share(config),
        "num_blocks": model.num_blocks,
        "hidden_depth": model.hidden_depth,
        "parameters": result["parameters"],
        "steps": result["steps"],
        "tokens": result["tokens"],
        "loss": validation.get("loss"),
        "perplexity": perplexity(result),
        "bits_per_byte": validation.get("bits_per_byte"),
        "loss_first_window": validation.get("loss_first_window"),
        "loss_later_windows": validation.get("loss_later_windows"),
        "learning_rate": config.train.learning_rate,
        **{name: validation.get(name) for name in ACCURACIES},
        "target_reached": (result.get("target") or {}).get("reached"),
        "best_loss": result["best"].get("loss"),
        "tokens_per_second": tokens_per_second(result),
        "mfu": result["speed"].get("mfu"),
        "peak_bytes": result.get("peak_bytes"),
        "cache_bytes": cache_bytes(result),
        "train_seconds": result["seconds"].get("train"),
        "wall_seconds": wall_seconds(result),
        "device": device(result),
        "jax": result["jax"],
    }


def aggregate(group: Group) -> dict[str, Any]:
    """A point over its seeds, as sweep.json has it: each figure as [mean, spread or None, number of runs]."""
    figures = {
        "perplexity": perplexity,
        "tokens_per_second": tokens_per_second,
        "cache_bytes": cache_bytes,
        "wall_seconds": wall_seconds,
    }
    means = {name: group.mean(figure) for name, figure in figures.items()}
    return {"point": group.label, "seeds": group.seeds, "share": observed_share(group.config)} | {
        name: None if mean is None else [mean.value, mean.spread, mean.count] for name, mean in means.items()
    }


def write_tables(results: Sequence[Result], out: pathlib.Path, shown: Sequence[str] | None = None) -> None:
    """Writes sweep.csv, sweep.json and sweep.md, each whole.

    Args:
      results: of the finished points.
      out: the directory.
      shown: lines of sweep.md; None for a table by windows.

    Raises:
      DataError: if one cannot be written.
    """
    rows, groups = [row_of(result) for result in results], groups_of(results)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(rows[0]) if rows else ["name"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    values = {"points": [aggregate(group) for group in groups], "knees": knees(groups), "runs": rows}
    texts = {
        "sweep.csv": table.getvalue(),
        "sweep.json": json.dumps(values, indent=1) + "\n",
        "sweep.md": "\n".join(windows_table(groups) + knee_lines(groups) if shown is None else shown) + "\n",
    }
    for name, text in texts.items():
        try:
            write_text(out / name, text)
        except OSError as error:
            raise DataError(f"{out / name}: cannot be written ({error.strerror})") from None


def knees(groups: Sequence[Group]) -> dict[str, str | None]:
    """W_total -> the point at the knee of its curve; see `curves.knee`."""
    found = {total: knee_of(curve) for total, curve in share_curves(groups).items()}
    return {str(total): None if group is None else group.label for total, group in found.items()}


def windows_table(groups: Sequence[Group]) -> list[str]:
    """A Markdown table of a sweep's points."""
    columns = ["point", "N", "W_oh + W_og", "W_oh / W_total", "B x (H + 2)", "perplexity", "tokens/s", "cache, MB"]
    columns += ["wall time", "seeds"]
    rows = []
    for group in groups:
        model, share = group.config.model, observed_share(group.config)
        windows = "" if share is None else f"{model.history_window} + {model.generation_window}"
        rows.append(
            (
                group.label,
                f"{group.config.data.sequence_length:,}",
                windows,
                "" if share is None else f"{share:.3f}",
                f"{model.num_blocks} x {model.layers_per_block}",
                with_spread(group.mean(perplexity), "{:.2f}"),
                with_spread(group.mean(tokens_per_second), "{:,.0f}"),
                scaled(group.mean(cache_bytes), 1e-6, "{:.2f}"),
                duration(group.mean(wall_seconds)),
                numbers(group.seeds),
            )
        )
    return markdown(columns, rows)


def knee_lines(groups: Sequence[Group]) -> list[str]:
    """A sentence for each W_total that has a curve."""
    lines = []
    for total, curve in share_curves(groups).items():
        labels = ", ".join(f"{observed_share(group.config):.3f}" for group in curve)
        found, reason = knee_of(curve), why_no_knee(curve)
        if found is not None:
            told = f"the knee is {found.label}, at a share of {observed_share(found.config):.3f}"
        else:
            told = f"no knee is told: {reason}" if reason else "no point lies below the chord; there is no knee"
        lines.append(f"W_total = {total:,}, shares {labels}: {told}.")
    return ["", *lines] if lines else []


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table's lines."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def with_spread(mean: Mean | None, form: str) -> str:
    """'mean ± spread', the mean alone of one run, nothing of none."""
    if mean is None:
        return ""
    return form.format(mean.value) + ("" if mean.spread is None else f" ± {form.format(mean.spread)}")


def scaled(mean: Mean | None, unit: float, form: str) -> str:
    """The mean in another unit; nothing of none."""
    return "" if mean is None else form.format(mean.value * unit)


def duration(mean: Mean | None) -> str:
    """A mean of seconds as minutes and seconds, m:ss."""
    if mean is None:
        return ""
    seconds = round(mean.value)
    return f"{seconds // 60}:{seconds % 60:02d}"


def numbers(values: Iterable[int]) -> str:
    """Numbers as '0, 1, 2'."""
    return ", ".join(map(str, values))


def device(result: Mapping[str, Any]) -> str:
    """The devices of a run, as '1 x NVIDIA H100'."""
    return f"{result['device'].get('count')} x {result['device'].get('kind')}"
