"""The report on runs: tables, figures, commands and definitions in one Markdown document. Does not use JAX.

Equal records give equal text. Conclusions are written by people, elsewhere.
"""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from tlinformer_jax.experiments.figures import SWAPPED, plot_history, plot_lines, plot_sweep, shown
from tlinformer_jax.experiments.frame import (
    ARCHITECTURE,
    BY_RATE,
    CACHE,
    DEPTH,
    FORM,
    INTEGER,
    PERPLEXITY,
    SPEED,
    N,
    actions_of,
    counted,
    curves_of,
    frame_of,
    highest,
    joined,
    knee_of,
    legends,
    mean,
    mean_and_deviation,
    points_of,
    read_records,
    repeated,
    shortest,
    table_of,
)
from tlinformer_jax.experiments.job import Record
from tlinformer_jax.experiments.retrieval import (
    capacity_lines,
    length_lines,
    overview_lines,
    question_lines,
    retrieval_lines,
)
from tlinformer_jax.files import write_text, writing

# Heading -> heading and definitions, for the sections that have some; the text does not depend on the records.
TEXT = pathlib.Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
SECTIONS = {part.partition("\n")[0]: [*part.splitlines(), ""] for part in re.split(r"\n(?=##+ )", TEXT.strip())}
LOSS = "validation loss, nats per token"
# Columns of the table of groups: a column of the runs, and how it is aggregated over a group.
COLUMNS = {
    "model": ("label", "first"),
    "architecture": (ARCHITECTURE, "first"),
    "N": (N, mean(INTEGER)),
    "W_oh + W_og": ("windows", "first"),
    "W_oh / W_total": ("share", mean("{:.3f}")),
    "B x (H + 2)": (DEPTH, "first"),
    "seeds": ("seed", joined),
    "perplexity": (PERPLEXITY, mean_and_deviation("{:.2f}")),
    "bits per byte": ("validation.bits_per_byte", mean_and_deviation("{:.3f}")),
    "test perplexity": ("test.perplexity", mean_and_deviation("{:.2f}")),
    "test bits per byte": ("test.bits_per_byte", mean_and_deviation("{:.3f}")),
    "tokens/s": (SPEED, highest(INTEGER)),
    "MFU": ("speed.mfu", highest("{:.1f}%", 100)),
    "wall time": ("seconds.wall", shortest),
    "peak memory, GB": ("peak_bytes", mean("{:.1f}", 1e-9)),
    "cache, MB": (CACHE, mean("{:.2f}", 1e-6)),
    "device": ("device", joined),
}
# Likewise for evaluations by position.
POSITION_COLUMNS = {
    "model": ("label", "first"),
    "training": ("trained", "first"),
    "trained at N": (N, mean(INTEGER)),
    "evaluated at": ("done.length", mean(INTEGER)),
    "split": ("done.split", "first"),
    "tokens": ("done.tokens", mean(INTEGER)),
    "W_og": ("config.model.generation_window", mean(INTEGER)),
    "perplexity": ("perplexity", mean_and_deviation("{:.2f}")),
    "loss, first window": ("loss_first_window", mean_and_deviation("{:.3f}")),
    "loss, later windows": ("loss_later_windows", mean_and_deviation("{:.3f}")),
    "loss, start of later windows": ("start", mean_and_deviation("{:.3f}")),
    "tokens of the start": ("start_tokens", mean(INTEGER)),
}
# Columns of the tables of cuts and of all runs: a column of the frame, and its heading.
CUTS = {
    "label": "model",
    "distance": "rows of history left",
    "change": "change in loss",
    "affected_change": "of tokens with more",
    "done.share": "share by block",
}
RUN_COLUMNS = {name: name for name in ("name", "device", "jax", "parameters", "steps", "tokens", "seed")}
RUN_COLUMNS |= {"config.data.dataset": "corpus", "config.data.tokenizer": "tokenizer", "name": "run", "jax": "JAX"}


def write_report(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Writes the report on all records in a directory, NAME.json, with its figures in the folder `figures`."""
    frame, figures = frame_of(read_records(folder)), out.parent / "figures"
    with writing(f"{out}:"):
        figures.mkdir(parents=True, exist_ok=True)
        write_text(out, "\n".join(report_lines(frame, figures)) + "\n")


def write_tables(records: Sequence[Record], out: pathlib.Path) -> None:
    """Writes the tables of a sweep's finished points: sweep.csv by run, sweep.json by group, sweep.md for reading."""
    texts = {"sweep.csv": "name\n", "sweep.json": "[]\n", "sweep.md": "\n"}
    if records:
        frame = frame_of(records)
        lines = retrieval_lines(frame) if records[0]["study"] == "retrieval" else group_lines(frame)
        keys = [column for column in frame if column.startswith("by.")]
        rows = frame.sort_index().drop(columns=["then", "history", "group", "base", "recipe", "trained", *keys])
        values = points_of(frame).to_json(orient="records", indent=1)
        texts = {"sweep.csv": rows.to_csv(index=False), "sweep.json": values, "sweep.md": "\n".join(lines) + "\n"}
    for name, text in texts.items():
        with writing(f"{out / name}:"):
            write_text(out / name, text)


def report_lines(frame: pd.DataFrame, figures: pathlib.Path) -> list[str]:
    """Returns the report on a frame of `frame_of`; draws its figures into a directory."""
    lines, studies = [*SECTIONS["# Results"]], dict(iter(frame.groupby("study")))
    if "architectures" in studies:
        for trained, part in studies["architectures"].groupby("trained", sort=False):
            lines += [f"## Architectures, {trained}", "", *group_lines(part), ""]
            lines += loss_figure(part, figures / f"results_history_{file_part(trained)}.png")
    if "windows" in studies:
        for sweep, part in studies["windows"].groupby("sweep", dropna=False):
            tokens = ", ".join(f"{count / 1e6:,.1f} M" for count in part["tokens"].unique())
            part = part.assign(again=repeated(part)).sort_values([N, DEPTH, "total", "share", "seed"])
            lines += [f"## Windows ({sweep}), {tokens} training tokens a point", "", *group_lines(part), ""]
            for file in plot_sweep(part, figures, f"results_{sweep}_"):
                lines += shown(file, titled(file.stem.removeprefix(f"results_{sweep}_")))
    if "retrieval" in studies:
        part = studies["retrieval"]
        lines += SECTIONS["## Retrieval"]
        lines += under("### Settings by success", overview_lines(part))
        lines += retrieval_lines(part)
        lines += under("### Capacity", capacity_lines(part, figures))
        lines += under("### By position of the question", question_lines(part))
        lines += under("### By length and depth", length_lines(part, figures))
    if "architectures" in studies:
        lines += position_lines(studies["architectures"], figures)
    return lines + history_lines(frame, figures) + sample_lines(frame) + run_lines(frame)


def file_part(trained: str) -> str:
    """Returns a recipe's part of a file name: '100.0M_763' for '100.0 M training tokens in 763 updates'."""
    millions, *others = re.findall(r"[\d.]+", trained.replace(",", ""))
    return "_".join([f"{millions}M", *others])


def under(heading: str, lines: list[str]) -> list[str]:
    """Returns lines under a heading of SECTIONS; nothing if there are no lines."""
    return [*SECTIONS[heading], *lines] if lines else []


def group_lines(frame: pd.DataFrame) -> list[str]:
    """Returns a table of models, each over its seeds, and a line for each curve of a W_total over shares of W_oh."""
    table = counted(frame).agg(**COLUMNS)
    table.insert(8, "against Base", against_base(frame).map("{:+.1f}%".format, na_action="ignore"))
    lines = table_of(table.loc[:, table.ne("").any() & table.notna().any()])
    for total, curve in curves_of(points_of(frame)).items():
        found, reason = knee_of(curve)
        result = (
            f"no knee: {reason}" if reason else "knee at {}, share {:.3f}".format(*found[["label", "share"]].iloc[0])
        )
        lines += ["", f"W_total = {total:,}, shares {', '.join(curve['share'].map(FORM))}: {result}."]
    return lines


def against_base(frame: pd.DataFrame) -> pd.Series:
    """Returns by how many percent a group's perplexity exceeds the Transformer's with equal rate, N, text and shape."""
    runs = counted(frame)
    means, base, ours = runs[PERPLEXITY].mean(), runs["base"].first(), runs["ours"].first()
    # astype: if all runs are Transformers, base[ours] is empty, and pandas would keep its dtype of text.
    of_base = base[ours].map(means[~ours].groupby(base[~ours]).first()).astype(float)
    return (means[ours] / of_base - 1) * 100


def loss_figure(frame: pd.DataFrame, file: pathlib.Path) -> list[str]:
    """Draws validation loss against trained tokens, minus that of the Transformer with the same N; returns its line."""
    points = frame[~frame["again"]].explode("history").dropna(subset="history")
    if points.empty:
        return []
    points["x"] = (points["history"].str[0] * (points["tokens"] / points["steps"]) / 1e6).round(6)
    points["y"] = points["history"].str[1].astype(float)
    parts = {f"N = {length:,}": part.assign(label=legends(part)) for length, part in points.groupby(N)}
    return draw_compared(parts, "training tokens, millions", "linear", file, "Validation loss while training")


def draw_compared(
    parts: dict[str, pd.DataFrame], x_name: str, x_scale: str, file: pathlib.Path, title: str
) -> list[str]:
    """Draws a panel for each part that has a reference curve, or for all if none has; returns the figure's line."""
    panels = {name: compared(part) for name, part in parts.items()}
    with_reference = {name: panel for name, panel in panels.items() if panel[1] != LOSS}
    plot_lines(with_reference or panels, x_name, file, x_scale)
    return shown(file, title)


def compared(points: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Averages curves over seeds and subtracts a Transformer's, else a sliding window's; returns them and y's name.

    This is the first of its kind in the table, at that of its learning rates with the lowest losses.
    """
    keys = ["group", "label", ARCHITECTURE, BY_RATE, "x"]
    points = points.groupby(keys, sort=False, as_index=False)["y"].mean()
    known = list(points[ARCHITECTURE].unique())
    reference = next((name for name in ("transformer", "sliding_window") if name in known), None)
    if reference is None or points["group"].nunique() == 1:
        return points, LOSS
    same = points[points[BY_RATE] == points.loc[points[ARCHITECTURE] == reference, BY_RATE].iloc[0]]
    group, label = same.groupby(["group", "label"], sort=False)["y"].mean().idxmin()
    both = points[points["group"] != group].merge(points[points["group"] == group][["x", "y"]], on="x")
    return both.assign(y=both["y_x"] - both["y_y"]), f"loss above that of the {label}, nats per token"


def position_lines(frame: pd.DataFrame, figures: pathlib.Path) -> list[str]:
    """Returns losses by position in the sample and in later windows, at every evaluated length, for each split.

    Figures are drawn of the test split, of the validation split only for runs without one.
    """
    parts = actions_of(frame[~frame["again"]], "evaluate", "by_position")
    if parts.empty:
        return []
    parts = parts.join(pd.json_normalize(parts["done.figures"])).sort_values("done.length", kind="stable")
    parts["done.split"] = [done.get("split", "validation") for done in parts["done"]]  # earlier records leave it out
    windows = parts["done.by_window_position"]
    parts["start"] = windows.map(lambda window: window.get("later", [None])[0]).astype(float)
    parts["start_tokens"] = windows.map(lambda window: window["edges"][1]).where(parts["start"].notna())
    table = parts.groupby(["done.length", "done.split", "group"], sort=False).agg(**POSITION_COLUMNS)
    if table["split"].eq("validation").all():
        table = table.drop(columns="split")
    lines = [*SECTIONS["## Loss by position"], *table_of(table), ""]
    tested = parts["done.split"].eq("test")
    drawn = parts[tested | ~tested.groupby([parts["name"], parts["done.length"]]).transform("any")]
    for (length, split, trained), members in drawn.groupby(["done.length", "done.split", "trained"], sort=False):
        members = members.assign(label=legends(members))
        points, title = _binned(members, "done.by_position", "loss"), f"samples of {length:,} tokens"
        name = f"{length}_{file_part(trained)}" + ("_test" if split == "test" else "")
        title += (", test split" if split == "test" else "") + f", {trained}"
        file = figures / f"results_positions_{name}.png"
        lines += draw_compared(
            {title: points}, "position in the sample", "linear", file, f"Loss by position in {title}"
        )
        members = members.dropna(subset="start")
        by_size = members.groupby("config.model.generation_window")
        windows = {
            f"{title}, windows of {size}": _binned(part, "done.by_window_position", "later") for size, part in by_size
        }
        if windows:
            file = figures / f"results_window_positions_{name}.png"
            lines += draw_compared(
                windows, "position in a later window", "symlog", file, f"Loss by position in the window, {title}"
            )
    return lines


def history_lines(frame: pd.DataFrame, figures: pathlib.Path) -> list[str]:
    """Returns what the history contributes, for the first measured seed of each group."""
    lines: list[str] = []
    measured = actions_of(frame, "history", "cuts").drop_duplicates(["group", "done.length"])
    for (length, trained), runs in measured.groupby(["done.length", "trained"], sort=False) if len(measured) else ():
        table = runs[["label", "done.share"]].assign(**{"done.cuts": runs["done"].map(_cuts_and_swap)})
        table = table.explode("done.cuts", ignore_index=True)
        table = table.join(pd.json_normalize(table.pop("done.cuts")))
        for change in ("change", "affected_change"):
            table[change] = table[change].map("{:+.4f}".format, na_action="ignore")
        table["done.share"] = table["done.share"].map(lambda shares: ", ".join(map("{:.2f}".format, shares)))
        table = table[list(CUTS)].set_axis(CUTS.values(), axis=1)
        lines += [f"Samples of {length:,} tokens, {trained}:", "", *table_of(table), ""]
        prefix = f"results_{length}_{file_part(trained)}_"
        for file in plot_history([*zip(legends(runs), runs["done"])], figures, prefix):
            title = titled(file.stem.removeprefix(prefix))
            lines += shown(file, f"{title}, samples of {length:,} tokens, {trained}")
    return under("## What the history contributes", lines)


def _cuts_and_swap(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the rows of a run in the table of cuts; records of other versions have no swapped history."""
    swapped = measured.get("swapped")
    return [*measured["cuts"], *([{"distance": SWAPPED} | swapped] if swapped else [])]


def sample_lines(frame: pd.DataFrame) -> list[str]:
    """Returns generated texts, for the first seed of each group."""
    lines: list[str] = []
    for _, run in actions_of(frame, "samples", "samples").drop_duplicates("group").iterrows():
        part = run["done"]
        options = ", ".join(f"{option} {value}" for option, value in part.items() if option != "samples")
        lines += [f"### {run['name']}", "", f"After {run['trained']}, drawn with {options}."]
        lines += ["The prompt is what stands before the bar.", ""]
        for sample in part["samples"]:
            lines += fenced(f"{sample['prompt']}|{sample['text']}")
    return ["## Samples", "", *lines] if lines else []


def run_lines(frame: pd.DataFrame) -> list[str]:
    """Returns a table of every run with its device, versions, tokens and seed, then the commands."""
    frame = frame.sort_index()
    table = frame[list(RUN_COLUMNS)].set_axis(RUN_COLUMNS.values(), axis=1)
    for name in ("parameters", "steps", "tokens"):
        table[name] = table[name].map("{:,}".format)
    commands = fenced("\n".join(frame["command"].unique()))
    return ["## Runs", "", *table_of(table), "", "Commands, with the options of their time:", "", *commands]


def fenced(text: str) -> list[str]:
    """Encloses text in a code block that the text cannot end; control characters are spelled out."""
    plain = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", plain)), default=0))
    return [f"{fence}text", plain, fence, ""]


def titled(name: str) -> str:
    """Makes a figure's title from its file name."""
    return name.replace("_", " ").capitalize()


def _binned(parts: pd.DataFrame, bins: str, losses: str) -> pd.DataFrame:
    """Returns the loss of each run in each bin, at the middle of the bin."""
    points = parts[["group", "label", ARCHITECTURE, BY_RATE]].assign(
        x=parts[bins].map(lambda part: (np.asarray(part["edges"][:-1]) + part["edges"][1:] - 1) / 2),
        y=parts[bins].map(lambda part: part[losses]),
    )
    return points.explode(["x", "y"]).astype({"x": float, "y": float})
