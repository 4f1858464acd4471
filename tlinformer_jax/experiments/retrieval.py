"""The report's section on tasks with answers: how many runs found them, how soon, and accuracy by depth and length.

Whether a run finds the answers depends on chance too, so runs are counted and listed, not averaged.
"""

import hashlib
import itertools
import pathlib
import re
from typing import Any

import numpy as np
import pandas as pd

from tlinformer_jax.config.model import ARCHITECTURE_NAMES, RECURRENT
from tlinformer_jax.data.tasks import REGIONS
from tlinformer_jax.experiments.figures import plot_capacity, plot_heat_maps, shown
from tlinformer_jax.experiments.frame import (
    ACCURACIES,
    ARCHITECTURE,
    CAPACITY,
    FORM,
    FOUND,
    INTEGER,
    N,
    actions_of,
    counted,
    mean,
    median_update,
    table_of,
)

PARTS = 8  # bins of a sample in the table by position of the question
LEAST_POINTS = 3  # of a capacity curve
RUN = ["model", "learning rate", "seed"]
SHARES = ["answers right", "source in window", "in W_oh", "before W_oh"]
ACCURACY, FOUND_RUNS = "reported.accuracy", f"runs ≥ {FOUND}"


def overview_lines(frame: pd.DataFrame) -> list[str]:
    """Returns a table of the runs that found the answers, by setting, architecture and options; failures come first.

    Settings are sorted by the lower end of the Wilson interval of TLinFormer's best options; those without TLinFormer
    come last. Records of one seed from several sweeps count once.
    """
    same = ["setting", ARCHITECTURE, "options", "layers", "config.train.learning_rate", "seed"]
    runs = frame.sort_index().dropna(subset=ACCURACY).drop_duplicates(same).sort_values(["options", "layers"])
    rows, sort_keys = [], []
    for setting, part in _by_number(runs).groupby("setting", sort=False):
        row, sort_key, varied = {"setting": setting}, 1.0, (part["options"] != "").any()
        for architecture, models in part.groupby(ARCHITECTURE):
            cells, lowest = [], []
            several = models["layers"].nunique() > 1
            for (options, layers), group in models.groupby(["options", "layers"], sort=False):
                found, known = _found_of(group)
                notes = [options or ("no options" if varied else ""), f"{layers} layers" if several else ""]
                cells.append(", ".join([f"{found} of {known}", *filter(None, notes)]))
                lowest.append(_wilson(found, known)[0])
            row[ARCHITECTURE_NAMES[str(architecture)]] = "; ".join(cells)
            if architecture == "tlinformer":
                sort_key = max(lowest)
        rows.append(row)
        sort_keys.append(sort_key)
    if not rows:
        return []
    table = pd.DataFrame(rows).iloc[np.argsort(sort_keys, kind="stable")]
    return [*table_of(table[["setting", *(name for name in ARCHITECTURE_NAMES.values() if name in table)]]), ""]


def retrieval_lines(frame: pd.DataFrame) -> list[str]:
    """Returns two tables for each setting: runs that found the answers, by model and learning rate, and all runs."""
    lines: list[str] = []
    for setting, part in _by_setting(frame):
        runs = counted(part)
        table = runs[RUN[:2]].first().join(runs.apply(_finding))
        table["chance"] = runs["chance"].agg(mean("{:.3f}"))
        table["parameters"] = runs["parameters"].agg(mean(INTEGER))
        shares = part[[f"reported.{name}" for name in ACCURACIES]].set_axis(SHARES, axis=1)
        listed = part[RUN].join(shares.map(FORM, na_action="ignore"))
        listed["split"], listed["tokens"] = part["split"], (part["tokens"] / 1e6).map("{:.1f} M".format)
        listed["found at"] = [median_update(part.loc[[index]]) for index in part.index]
        reached = part["target.accuracy"].map("{:.0%} reached".format)
        listed["end"] = reached.where(part["target.reached"].eq(True), "all updates")
        lines += [f"### {setting}", "", *_known_columns(table), "", *_known_columns(listed), ""]
    return lines


def _finding(runs: pd.DataFrame) -> pd.Series:
    """Returns how many of a group's runs found the answers, and when."""
    found, known = _found_of(runs)
    cells = [f"{found} of {known}", wilson_interval(found, known), median_update(runs)]
    return pd.Series(cells, [FOUND_RUNS, "95% interval", "median update"])


def _found_of(runs: pd.DataFrame) -> tuple[int, int]:
    """Returns how many runs found the answers, and how many have an accuracy."""
    right = runs[ACCURACY].dropna()
    return int((right >= FOUND).sum()), len(right)


def _known_columns(table: pd.DataFrame) -> list[str]:
    """Returns the table as Markdown, without the columns of updates if no record has them."""
    unknown = [name for name in ("median update", "found at") if name in table and table[name].eq("").all()]
    return table_of(table.drop(columns=unknown))


def wilson_interval(found: int, runs: int) -> str:
    """Returns the 95% Wilson interval for the fraction of runs that find the answers; '' if there are no runs."""
    return "{:.2f} to {:.2f}".format(*_wilson(found, runs)) if runs else ""


def _wilson(found: int, runs: int) -> tuple[float, float]:
    """Returns the ends of that interval; `runs` is at least 1."""
    from scipy.stats import binomtest  # its import takes as long as that of pandas

    low, high = binomtest(found, runs).proportion_ci(0.95, "wilson")
    return float(low), float(high)


def median_interval(shares: pd.Series) -> tuple[float, float]:
    """Returns the 95% bootstrap interval of the median over seeds, NaN for a single seed; it is deterministic."""
    from scipy.stats import bootstrap  # see `_wilson`

    if len(shares) < 2:
        return np.nan, np.nan
    sample = (shares.to_numpy(float),)
    found = bootstrap(sample, np.median, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return float(found.low), float(found.high)


def capacity_lines(frame: pd.DataFrame, figures: pathlib.Path) -> list[str]:
    """Returns accuracy by pairs, and by W_oh, for models that differ in nothing else and have three points or more."""
    lines, drawn = [], {}
    for field, x_name in CAPACITY.items():
        points = _capacity_points(frame, field)
        if points.empty:
            continue
        drawn[x_name] = points
        table = points[["label"]].set_axis(["model"], axis=1)
        table[x_name] = points["x"].map(INTEGER.format)
        table = table.join(points[[FOUND_RUNS, "95% interval", "median update"]])
        table["median"] = points["median"].map(FORM)
        pairs = zip(points["low"], points["high"])
        table["its 95% interval"] = ["" if np.isnan(low) else f"{low:.3f} to {high:.3f}" for low, high in pairs]
        table["every run"] = points["runs"].map(lambda runs: ", ".join(map(FORM, runs)))
        lines += [f"Against {x_name}:", "", *_known_columns(table), ""]
    if drawn:
        file = figures / "results_capacity.png"
        plot_capacity(drawn, file)
        lines += shown(file, "Right answers against pairs and W_oh")
    return lines


def _capacity_points(frame: pd.DataFrame, field: str) -> pd.DataFrame:
    """Makes a row of each point of the curves along a field, for `plot_capacity`, with the columns of `_finding`."""
    x, known = f"at.{field}", frame[~frame["again"]].dropna(subset=ACCURACY)
    if field.startswith("model."):
        known = known[~known[ARCHITECTURE].isin(("transformer", *RECURRENT)) & known[x].ne("auto")]
    long = known.groupby(f"by.{field}")[x].transform("nunique") >= LEAST_POINTS
    rows = []
    for key, curve in known[long].groupby(f"by.{field}", sort=False):
        for value, runs in curve.groupby(curve[x].astype(int)):
            low, high = median_interval(runs[ACCURACY])
            row = {"key": key, "setting": runs["setting"].iloc[0], "label": runs["model"].iloc[0], "x": value}
            row |= {"median": runs[ACCURACY].median(), "low": low, "high": high, "runs": sorted(runs[ACCURACY])}
            rows.append(row | _finding(runs).to_dict())
    points = pd.DataFrame(rows)
    if len(points):  # name the first point of each curve if one model has curves in several settings
        several = points.groupby("label")["key"].transform("nunique") > 1
        firsts = points.groupby("key")["setting"].transform("first")
        points["label"] = points["label"].where(~several, points["label"] + "; first " + firsts)
    return points


def question_lines(frame: pd.DataFrame) -> list[str]:
    """Returns accuracies by position of the question, for every run with questions in several bins."""
    lines: list[str] = []
    for setting, part in _by_setting(frame):
        bounds = [part[N].iloc[0] * number // PARTS for number in range(PARTS + 1)]
        rows = []
        for _, run in actions_of(part, "evaluate", "accuracy_by_position").iterrows():
            found = run["done.accuracy_by_position"]
            bins = pd.DataFrame(found | {"edges": found["edges"][:-1]})
            if run["done.length"] == run[N] and bins["answers"].gt(0).sum() > 1:
                bins["part"] = np.searchsorted(bounds, bins["edges"], side="right") - 1
                rows.append([*run[RUN], *_shares(bins, "part").reindex(range(PARTS)).map(FORM, na_action="ignore")])
        if rows:
            heads = [f"{low:,} to {high - 1:,}" for low, high in itertools.pairwise(bounds)]
            lines += [f"{setting}:", "", *table_of(pd.DataFrame(rows, columns=[*RUN, *heads])), ""]
    return lines


def length_lines(frame: pd.DataFrame, figures: pathlib.Path) -> list[str]:
    """Returns accuracies by length and depth, for every run that was evaluated at several lengths."""
    lines: list[str] = []
    for setting, part in _by_setting(frame):
        tables, maps = [], {}
        for _, evaluations in actions_of(part, "evaluate", "answers").groupby("name", sort=False):
            run = evaluations.iloc[0]
            answers = {
                (evaluation["done.length"], region): pd.DataFrame(found)
                for _, evaluation in evaluations.iterrows()
                for region, found in evaluation["done.answers"].items()
            }
            counts = pd.concat(answers, names=["length", "region", "depth"])
            if counts.index.unique("length").size < 2:
                continue
            regions = _shares(counts, ["length", "region"]).unstack()[list(REGIONS)]
            regions.insert(0, "all", _shares(counts, "length"))
            table = regions.set_axis(SHARES, axis=1).map(FORM, na_action="ignore")
            table.insert(0, "evaluated at", table.index.map("{:,}".format))
            tables.append(pd.DataFrame([run[RUN]] * len(table), index=table.index).join(table))
            if counts["answers"].groupby("depth").sum().gt(0).sum() > 1:
                depths = _shares(counts.xs("history", level="region"), ["length", "depth"]).unstack()
                depths["near"] = _shares(counts.drop("history", level="region"), "length")
                maps[f"{run['model']}\nlearning rate {run['learning rate']}, seed {run['seed']}"] = depths
        if tables:
            lines += [f"Trained on {setting}:", "", *table_of(pd.concat(tables)), ""]
        if maps:
            # A hash, so that new settings do not rename the figures of others.
            name = hashlib.sha256(setting.encode()).hexdigest()[:8]
            file = figures / f"results_lengths_{part['config.data.dataset'].iloc[0]}_{part[N].iloc[0]}_{name}.png"
            plot_heat_maps(maps, setting, file)
            lines += shown(file, f"Answers right by length and depth: {setting}")
    return lines


def _by_setting(frame: pd.DataFrame) -> Any:
    """Groups runs by setting, sorted by model, learning rate and seed, with these in the report's format."""
    rate = "config.train.learning_rate"
    frame = _by_number(frame.sort_values(["model", rate, "seed", "again"]))
    seeds = frame["seed"].astype(str) + frame["again"].map({True: ", again", False: ""})
    frame = frame.assign(**{"learning rate": frame[rate].map("{:g}".format), "seed": seeds})
    return frame.groupby("setting", sort=False)


def _by_number(frame: pd.DataFrame) -> pd.DataFrame:
    """Sorts runs by setting, numbers in it by value; keeps the order of runs of one setting."""

    def padded(setting: str) -> str:
        return re.sub("[0-9]+", lambda number: number[0].zfill(9), setting.replace(",", ""))

    return frame.sort_values("setting", kind="stable", key=lambda settings: settings.map(padded))


def _shares(counts: pd.DataFrame, by: str | list[str]) -> pd.Series:
    """Returns correct answers over all answers, NaN if there are none."""
    sums = counts.groupby(by)[["right", "answers"]].sum()
    return sums["right"] / sums["answers"]
