"""Records of runs as one table, and statistics over seeds. Does not use JAX.

`frame_of` makes a row of each record: its parts as columns such as 'config.model.d_model' or 'validation.loss', and the
columns of `_derived`. Runs of one `group` differ only in their seeds. A repeated seed counts once.
"""

import json
import math
import pathlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from tlinformer_jax.config.data import NEEDLES, PAIR_SIZES
from tlinformer_jax.config.model import ARCHITECTURE_NAMES, RECURRENT, ModelConfig
from tlinformer_jax.data.tasks import chance_by_elimination
from tlinformer_jax.errors import DataError, file_errors_as
from tlinformer_jax.experiments.job import RESULT_FILE, Record, completed, essence, read_result
from tlinformer_jax.experiments.schema import ACTIONS, misfit
from tlinformer_jax.files import markdown

N, ARCHITECTURE, DEPTH = "config.data.sequence_length", "config.model.architecture", "depth"
RATE, BY_RATE = "config.train.learning_rate", "by.train.learning_rate"
# Fields of a recipe.
TEXT_FIELDS = tuple(f"data.{field}" for field in ("dataset", "tokenizer", "train_files", "validation_files"))
PERPLEXITY, SPEED, CACHE = "validation.perplexity", "speed.tokens_per_second", "cache.used"
ACCURACIES = ("accuracy", "accuracy_own", "accuracy_observed", "accuracy_history")
# Fields that are the x axis of a capacity curve, and the axis's title.
CAPACITY = {"data.num_items": "pairs in a sample", "model.history_window": "W_oh, rows of the observation window"}
# Numeric columns, which some records may lack.
NUMBERS = (
    *(PERPLEXITY, SPEED, CACHE, "validation.bits_per_byte", "speed.mfu", "seconds.wall", "peak_bytes"),
    *("test.perplexity", "test.bits_per_byte"),
    *("total", "share", "chance", "found", "target.accuracy", *(f"reported.{name}" for name in ACCURACIES)),
)
# How tables show shares and counts.
FORM, INTEGER = "{:.3f}".format, "{:,.0f}"
FOUND = 0.9  # accuracy from which a run counts as having found the answers
ENDS = (0.125, 0.875)  # shares of W_oh that a curve must cover before its chord can show a knee


def read_records(folder: pathlib.Path) -> list[Record]:
    """Reads all records of a directory in order of file names, or the one record of a run's own directory."""
    own = folder / RESULT_FILE
    with file_errors_as(f"{folder}: cannot be read"):
        paths = [own] if own.exists() else sorted(folder.glob("*.json"))
    if not paths:
        raise DataError(f"{folder}: must be a directory that holds at least one record of a run, NAME.json")
    return [_with_whole_actions(path, read_result(path)) for path in paths]


def _with_whole_actions(path: pathlib.Path, record: Record) -> Record:
    """Returns the record; a DataError names its file and the first damaged part of an action's result."""
    for name, done in record["then"].items():
        if wrong := misfit(done, ACTIONS.get(name.partition("@")[0], {}), f"then.{name}"):
            raise DataError(f"{path}: {wrong}")
    return record


def frame_of(records: Sequence[Record]) -> pd.DataFrame:
    """Makes a row of each record, in the order of the report; the index is the position in `records`."""
    flat = pd.json_normalize([record | {"then": None, "overrides": None, "device": None} for record in records])
    derived = pd.DataFrame([_checked(record) for record in records])
    frame = pd.concat([flat.drop(columns=["then", "overrides", "device"]), derived], axis=1)
    frame = frame.reindex(columns=list(dict.fromkeys([*frame, *NUMBERS, "sweep", "target.reached"])))
    frame[list(NUMBERS)] = frame[list(NUMBERS)].apply(pd.to_numeric)
    frame["again"] = repeated(frame)
    frame["trained"] = _trained(frame)
    # pandas stores each text column separately, but all columns of objects together, from which rows are selected
    # faster. It saves a quarter of a report's time.
    texts = [name for name, dtype in frame.dtypes.items() if isinstance(dtype, pd.StringDtype)]
    frame = frame.astype(dict.fromkeys(texts, object)).copy()
    return frame.sort_values(["tokens", "steps", N, "ours", "label", "seed"])


def repeated(frame: pd.DataFrame) -> pd.Series:
    """Returns whether each run repeats the seed of an earlier one with the same configuration, by the index."""
    return frame.sort_index().duplicated(["group", "seed"])


def _trained(frame: pd.DataFrame) -> pd.Series:
    """Returns each run's recipe in words: its training tokens and updates, and a number if two recipes share these."""
    sizes = (frame["tokens"] / 1e6).map("{:,.1f} M training tokens in ".format) + frame["steps"].map("{:,}".format)
    numbers = frame.groupby(sizes)["recipe"].transform(lambda recipes: pd.factorize(recipes)[0] + 1)
    return sizes + " updates" + numbers.map(" ({})".format).where(numbers > 1, "")


def _checked(record: Record) -> dict[str, Any]:
    """Returns `_derived`; a DataError names a record with a part that is damaged or that this version does not know."""
    try:
        return _derived(record)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"record {record['name']}: has a part that this version cannot read ({reason})") from error


def _derived(record: Record) -> dict[str, Any]:
    """Computes columns from several parts of a record.

    label: the point's name in its sweep, else the run's; words, setting, options, layers, model: for legends, headings
    and tables; ours: whether it is not the Transformer; total: W_oh + W_og; share: W_oh / total; reported.*: accuracies
    on the split `split`; test.*: figures of a text's own test split; recipe: equal for runs on the same text with
    equally many tokens and updates; group: equal for runs that differ only in their seeds; by.FIELD: equal for runs
    that may also differ in that field; at.FIELD: an x axis of CAPACITY; base: equal for a model and the Transformer to
    compare it with.
    """
    config, fields = completed(record["config"]), essence(record["config"])
    model, data = config["model"], config["data"]
    fields.pop("train.seed")
    total, share = _windows(model, data["sequence_length"])
    # Grouping ignores which sweep trained a run. A run that stops at an accuracy may have any number of tokens.
    tokens = None if record.get("target") else record["tokens"]
    shape = [model[field] for field in ("vocab_size", "d_model", "num_heads", "d_ff", "dropout")]
    text = {field: value for field, value in fields.items() if field.startswith("data.")}
    layers = model["num_blocks"] * (model["hidden_depth"] + 2)
    evaluations = [record["then"].get(name, {}) for name in ("evaluate", f"evaluate@{data['sequence_length']}")]
    evaluation: dict[str, Any] = next(filter(None, evaluations), {})
    tested = evaluation.get("split") == "test"
    figures = evaluation["figures"] if tested else record["validation"]
    own_test = evaluation.get("test", {}).get("figures", {})
    chance = chance_by_elimination(_items(data)) if data["dataset"] == "recall" else record["validation"].get("chance")
    return {
        "device": f"{record['device'].get('count')} x {record['device'].get('kind')}",
        "label": record.get("point") or record["name"].removesuffix(f"-seed{record['seed']}"),
        "words": _words(model),
        "ours": model["architecture"] != "transformer",
        "setting": _setting(model, data),
        "options": _options(model).removeprefix(", "),
        "layers": layers,
        "model": _model_name(model, layers),
        "windows": None if share is None else f"{model['history_window']} + {model['generation_window']}",
        DEPTH: f"{model['num_blocks']} x {model['hidden_depth'] + 2}",
        "total": total,
        "share": share,
        "chance": chance,
        "split": "test" if tested else "validation",
        **{f"test.{field}": own_test.get(field) for field in ("perplexity", "bits_per_byte")},
        **{f"reported.{field}": figures.get(field) for field in ACCURACIES},
        "found": _found_at(record["history"]),
        "recipe": json.dumps([record["tokens"], record["steps"], *map(fields.get, TEXT_FIELDS)]),
        "group": json.dumps([record["study"], tokens, fields], sort_keys=True),
        **{
            f"by.{field}": json.dumps([tokens, fields | {field: None, "data.examples": None}], sort_keys=True)
            for field in (*CAPACITY, "train.learning_rate")
        },
        "at.data.num_items": _items(data),
        "at.model.history_window": model["history_window"],
        "base": json.dumps([record["tokens"], config["train"]["learning_rate"], text, shape, layers], sort_keys=True),
        "then": record["then"],
    }


def _found_at(history: Sequence[Sequence[Any]]) -> float:
    """Returns the first update with an accuracy of FOUND; infinite if there is none, NaN if it was not recorded."""
    known = [(step, accuracy[0] or 0.0) for step, _, *accuracy in history if accuracy]
    found = [step for step, accuracy in known if accuracy >= FOUND]
    return min(found, default=math.inf) if known else math.nan


def _windows(model: Mapping[str, Any], length: int) -> tuple[int | None, float | None]:
    """Returns W_total (None without windows or with 'auto'), and W_oh / W_total (with 'auto', at the last window)."""
    size, rows = model["generation_window"], model["history_window"]
    if model["architecture"] in ("transformer", *RECURRENT):
        return None, None
    if rows != "auto":
        return rows + size, rows / (rows + size)
    rows = ModelConfig(history_window="auto").observed_rows((length - 1) // size * size)
    return None, rows / (rows + size)


def _items(data: Mapping[str, Any]) -> int:
    """Returns the pairs or passkeys of a sample, under the field's present or former name."""
    old = "pairs" if data["dataset"] == "recall" else "passkeys"
    return int(data[old] if old in data else data["num_items"])


def _setting(model: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    """Describes the task, its sizes, both windows, and the lengths of a curriculum."""
    kind = "pairs" if data["dataset"] in PAIR_SIZES else "hidden" if data["dataset"] in NEEDLES else None
    items = f", {_items(data):,} {kind}" if kind else ""
    windows = f"W_oh = {model['history_window']}, W_og = {model['generation_window']}, width {model['d_model']}"
    name = f"{data['dataset']}, N = {data['sequence_length']:,}{items}, {windows}"
    return name + (f", curriculum {data['curriculum']}" if data["curriculum"] else "")


def _model_name(model: Mapping[str, Any], layers: int) -> str:
    """Describes architecture, depth, and deviations from the published model."""
    name = f"{ARCHITECTURE_NAMES[model['architecture']]}, {layers} layers"
    if model["architecture"] in ("tlinformer", "tconstformer"):
        name += f" (B = {model['num_blocks']}, H = {model['hidden_depth']})"
    return name + _options(model)


def _options(model: Mapping[str, Any]) -> str:
    """Describes the model's deviations from the published one; for an earlier version also which rows were observed."""
    options = ["token shift"] * bool(model.get("token_shift")) + ["causal history"] * bool(model.get("causal_history"))
    if taps := model.get("key_taps"):
        options.append(f"{taps} key tap{'s' if taps > 1 else ''}")
    if overlap := model.get("window_overlap"):
        options.append(f"overlap {overlap}")
    if longest := model.get("longest_wavelength"):
        options.append(f"wavelengths to {longest:,}")
    if (selection := model.get("observed_selection", "recent")) != "recent":
        options.append(f"{selection} rows")
    return "".join(f", {option}" for option in options)


def _words(model: Mapping[str, Any]) -> str:
    """Describes architecture and windows for a legend."""
    size, rows, architecture = model["generation_window"], model["history_window"], model["architecture"]
    words = ARCHITECTURE_NAMES[architecture]
    if architecture == "sliding_window":
        words += f", {rows + size:,} tokens"
    elif architecture in ("tlinformer", "tconstformer"):
        words += f", W_og {size:,}, W_oh {rows}"
    return words + _options(model)


def legends(frame: pd.DataFrame) -> pd.Series:
    """Returns each run's legend: its words, differing rates, and what tells it from other groups with these words."""
    labels = frame["words"]
    if frame[RATE].nunique() > 1:
        labels = labels + frame[RATE].map(", rate {:g}".format)
    for column, form in {N: "{}, trained at N = {:,}", DEPTH: "{}, {} layers", "label": "{} ({})"}.items():
        same_words = frame.groupby(labels)
        ambiguous = (same_words["group"].transform("nunique") > 1) & (same_words[column].transform("nunique") > 1)
        detailed = pd.Series([form.format(*pair) for pair in zip(labels, frame[column])], index=frame.index)
        labels = labels.where(~ambiguous, detailed)
    return labels.groupby(frame["group"]).transform("first")


def counted(frame: pd.DataFrame) -> Any:
    """Groups the runs of a frame, each seed once, in the frame's order."""
    return frame[~frame["again"]].groupby("group", sort=False)


def actions_of(frame: pd.DataFrame, kind: str, part: str) -> pd.DataFrame:
    """Makes a row of each action of a kind, 'evaluate' or 'evaluate@8192', whose result, in 'done', has `part`.

    A text's evaluation on the test split is a row of its own.
    """
    found = [
        (index, result)
        for index, then in frame["then"].items()
        for name, done in then.items()
        for result in (done, done.get("test", {}))
        if name.partition("@")[0] == kind and part in result
    ]
    indices, results = zip(*found) if found else ((), ())
    parts = pd.DataFrame(results).add_prefix("done.").assign(done=results)
    return frame.loc[list(indices)].reset_index(drop=True).join(parts)


def mean_and_deviation(form: str) -> Callable[[pd.Series], str]:
    """Formats a group's values as 'mean ± sample standard deviation', one value as itself; '' if there are none."""
    return lambda values: " ± ".join(map(form.format, pd.Series([values.mean(), values.std()]).dropna()))


def mean(form: str, unit: float = 1.0) -> Callable[[pd.Series], str]:
    """Formats a group's mean; '' if there are no values."""
    return lambda values: "" if values.isna().all() else form.format(values.mean() * unit)


def highest(form: str, unit: float = 1.0) -> Callable[[pd.Series], str]:
    """Formats a group's highest figure, for speeds: a run is slower if it shares its device; '' if there are none."""
    return lambda values: "" if values.isna().all() else form.format(values.max() * unit)


def median_update(runs: pd.DataFrame) -> str:
    """Returns the median update at which runs found the answers; '' if it was not recorded.

    A run that has not found them might do so at any later update, so the median may be open: '> 500'.
    """
    runs = runs.dropna(subset="found")
    if runs.empty:
        return ""
    least, most = np.median(np.minimum(runs["found"], runs["steps"])), np.median(runs["found"])
    return f"{most:,.0f}" if np.isfinite(most) else f"> {least:,.0f}"


def shortest(seconds: pd.Series) -> str:
    """Formats the shortest of a group's durations in seconds as m:ss; '' if there are none."""
    if seconds.isna().all():
        return ""
    minutes, rest = divmod(round(seconds.min()), 60)
    return f"{minutes}:{rest:02}"


def joined(values: pd.Series) -> str:
    """Lists a group's different values."""
    return ", ".join(map(str, values.unique()))


def points_of(frame: pd.DataFrame) -> pd.DataFrame:
    """Makes a row of each group: its first run's columns, its seeds, and mean, '.std' and '.count' of its figures."""
    runs = counted(frame)
    points = (
        runs[["label", "windows", ARCHITECTURE, N, DEPTH, "total", "share"]]
        .first()
        .assign(seeds=runs["seed"].agg(list))
    )
    for column in (PERPLEXITY, SPEED, CACHE, "seconds.wall"):
        points[[column, f"{column}.std", f"{column}.count"]] = runs[column].agg(["mean", "std", "count"])
    return points


def curves_of(points: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """Maps W_total to its TLinFormers by rising share of W_oh; if N or depth differ, those with the most points.

    Curves of fewer than three shares have no knee and are left out.
    """
    ours = points[points[ARCHITECTURE] == "tlinformer"].dropna(subset=["total", PERPLEXITY])
    found: dict[int, pd.DataFrame] = {}
    for (total, *_), curve in ours.groupby(["total", N, DEPTH]):
        if curve["share"].nunique() >= 3 and len(curve) > len(found.get(int(total), ())):
            found[int(total)] = curve.sort_values("share")
    return found


def knee(curve: pd.Series) -> Hashable | None:
    """Returns the point after which a larger index gains little: the one farthest below the chord; None if none is.

    The chord connects the first point and the last, with both axes scaled to [0, 1]; smaller values are better.
    """
    curve = curve.sort_index()
    x, y = curve.index.to_numpy(float), curve.to_numpy(float)
    if len(y) < 3 or x[-1] == x[0] or not 0 < np.ptp(y) < np.inf:
        return None
    below = (y[0] + (y[-1] - y[0]) * (x - x[0]) / (x[-1] - x[0]) - y) / np.ptp(y)
    return curve.index[below.argmax()] if below.max() > 1e-9 else None


def knee_of(curve: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Returns the row with the knee of a curve of `curves_of`; no row if there is none, and the reason."""
    reasons = ["some points have one seed only"] if (curve[f"{PERPLEXITY}.count"] < 2).any() else []
    if curve["share"].min() > ENDS[0] or curve["share"].max() < ENDS[1]:
        reasons.append(f"an end is missing, {ENDS[0]} or {ENDS[1]}")
    found = None if reasons else knee(curve.set_index("share")[PERPLEXITY])
    reason = " and ".join(reasons) or ("no point lies below the chord" if found is None else "")
    return curve[curve["share"] == found], reason


def table_of(frame: pd.DataFrame) -> list[str]:
    """Returns a Markdown table with the column names as headings."""
    return markdown(list(frame), frame.astype(object).fillna("").astype(str).to_numpy().tolist())
