"""What the records of tasks say of the answers that are right: tables and heat maps. Without JAX.

A model finds the answers or misses them, by the seed, so runs are counted and listed and their shares never averaged.
"""

import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from scipy.stats import binomtest

from tlinformer_jax.data.recall import chance_by_elimination
from tlinformer_jax.data.tasks import REGIONS
from tlinformer_jax.experiments.curves import Group, Result, groups_of
from tlinformer_jax.experiments.plots import plot_heat_map
from tlinformer_jax.experiments.tables import markdown

FORM = "{:.3f}"
EVALUATION = "evaluate"
FOUND = 0.9  # a run with more of its answers right counts as one that found them
PARTS = 8  # of a sample, in the table of the question's position
NAMES = {
    "transformer": "full attention",
    "sliding_window": "sliding window",
    "tlinformer": "TLinFormer",
    "tconstformer": "TConstFormer",
}


def reported(result: Result) -> tuple[Mapping[str, Any], str]:
    """The figures of a run at the length it was trained on, and their split.

    Those of the test split where the record has them: validation has stopped the run.
    """
    evaluation = result["then"].get(EVALUATION, {})
    if evaluation.get("split") == "test":
        return evaluation["figures"], "test"
    return result["validation"], "validation"


def found_of(group: Group) -> tuple[int, int]:
    """Of how many seeds more than FOUND of the answers are right, and how many seeds there are.

    A seed that was run again counts once, as its first record says.
    """
    shares = [reported(result)[0].get("accuracy") for result in _first_of_each_seed(group)]
    known = [share for share in shares if share is not None]
    return sum(share > FOUND for share in known), len(known)


def exact_interval(found: int, runs: int) -> tuple[float, float]:
    """The Clopper-Pearson interval, at 95%, of the share of runs that find the answers."""
    interval = binomtest(found, runs).proportion_ci(0.95, "exact")
    return float(interval.low), float(interval.high)


def chance_of(group: Group) -> float | None:
    """The share of answers that a guess gets right, by one who knows which occur in the sample, and which are used."""
    if group.config.data.dataset == "recall":
        return chance_by_elimination(group.config.data.num_items)
    chance: float | None = group.results[0]["validation"].get("chance")
    return chance


def settings_of(results: Iterable[Result]) -> dict[str, list[Group]]:
    """Groups by setting, named in words: the task with its sizes, and the windows.

    The same configuration is one group, whichever sweep has trained it.
    """
    found: dict[str, list[Group]] = {}
    for group in groups_of({**result, "point": ""} for result in results):
        found.setdefault(setting(group), []).append(group)
    for members in found.values():
        members.sort(key=lambda group: (model_name(group), group.config.train.learning_rate))
    return dict(sorted(found.items()))


def setting(group: Group) -> str:
    """The task of a group, its sizes, W_oh and W_og, and the lengths it was trained on before."""
    data, model = group.config.data, group.config.model
    sizes = {"recall": f", {data.num_items:,} pairs", "passkey": f", {data.num_items:,} hidden"}.get(data.dataset, "")
    windows = f"W_oh = {model.history_window}, W_og = {model.generation_window}"
    name = f"{data.dataset}, N = {data.sequence_length:,}{sizes}, {windows}, width {model.d_model}"
    return f"{name}, curriculum {data.curriculum}" if data.curriculum else name


def model_name(group: Group) -> str:
    """Architecture and depth of a group, and which rows W_oh holds where they are not the last."""
    model = group.config.model
    name = f"{NAMES[model.architecture]}, {model.num_layers} layers"
    if model.windowed:
        name += f" (B = {model.num_blocks}, H = {model.hidden_depth})"
    return name if model.observed_selection == "recent" else f"{name}, {model.observed_selection} rows"


def retrieval_lines(results: Iterable[Result]) -> list[str]:
    """Two tables for each setting: how many runs found the answers, by model and learning rate; and every run."""
    lines: list[str] = []
    for name, groups in settings_of(results).items():
        lines += [f"### {name}", "", *_found_table(groups), "", *_runs_table(groups), ""]
    return lines


def _found_table(groups: Sequence[Group]) -> list[str]:
    columns = ["model", "learning rate", f"runs above {FOUND}", "95% interval", "chance", "parameters"]
    rows = []
    for group in groups:
        found, runs = found_of(group)
        chance = chance_of(group)
        rows.append(
            (
                *_model_and_rate(group),
                f"{found} of {runs}",
                "{:.2f} to {:.2f}".format(*exact_interval(found, runs)) if runs else "",
                "" if chance is None else FORM.format(chance),
                f"{group.results[0]['parameters']:,}",
            )
        )
    return markdown(columns, rows)


def _runs_table(groups: Sequence[Group]) -> list[str]:
    columns = ["model", "learning rate", "seed", "answers right", "source in window", "in W_oh", "before W_oh"]
    columns += ["split", "tokens", "end"]
    rows = []
    for group, result in _runs(groups):
        figures, split = reported(result)
        names = ("accuracy", *(f"accuracy_{region}" for region in REGIONS))
        shares = ["" if figures.get(name) is None else FORM.format(figures[name]) for name in names]
        rows.append((*_labels(group, result), *shares, split, f"{result['tokens'] / 1e6:.1f} M", end(result)))
    return markdown(columns, rows)


def end(result: Result) -> str:
    """What ended a run: the validation accuracy that was wanted, or the updates it had."""
    target = result.get("target")
    if not target:
        return "all updates"
    return f"{target['accuracy']:.0%} reached" if target["reached"] else "all updates"


def _runs(groups: Iterable[Group]) -> Iterator[tuple[Group, Result]]:
    return ((group, result) for group in groups for result in group.results)


def _first_of_each_seed(group: Group) -> list[Result]:
    return list({result["seed"]: result for result in reversed(group.results)}.values())


def _model_and_rate(group: Group) -> tuple[str, str]:
    return model_name(group), f"{group.config.train.learning_rate:g}"


def _labels(group: Group, result: Result) -> tuple[str, str, str]:
    """Model, learning rate and seed of a run; a seed that was run before is not counted again."""
    again = all(result is not first for first in _first_of_each_seed(group))
    return (*_model_and_rate(group), f"{result['seed']}, again" if again else str(result["seed"]))


def length_lines(
    results: Iterable[Result], figures: pathlib.Path, figure_line: Callable[[pathlib.Path, str], list[str]]
) -> list[str]:
    """Answers right by length and depth, of every run that was evaluated at several lengths.

    Args:
      results: of tasks.
      figures: where the heat maps go.
      figure_line: the lines that show one.
    """
    lines: list[str] = []
    for name, groups in settings_of(results).items():
        rows = []
        for group, result in _runs(groups):
            by_length = counts_by_length(result)
            if len(by_length) < 2:
                continue
            labels = _labels(group, result)
            for length, regions in by_length.items():
                shares = [_share(regions[region]) for region in REGIONS]
                rows.append((*labels, f"{length:,}", _share(_together(regions, REGIONS)), *shares))
            label = f"{labels[0]}, {labels[1]}, seed {labels[2]}"
            file = figures / f"results_lengths_{_slug(result['name'])}.png"
            plot_heat_map(*heat_map(by_length), label, file)
            lines += figure_line(file, f"Answers right by length and depth: {label}, {name}")
        if rows:
            columns = ["model", "learning rate", "seed", "evaluated at", "answers right", "source in window"]
            columns += ["source in W_oh", "before W_oh"]
            lines = [*lines, f"Trained on {name}:", "", *markdown(columns, rows), ""]
    return lines


def question_lines(results: Iterable[Result]) -> list[str]:
    """Answers right by the position of the question, of every run whose questions stand at several."""
    lines: list[str] = []
    for name, groups in settings_of(results).items():
        length = groups[0].config.data.sequence_length
        bounds = [length * part // PARTS for part in range(PARTS + 1)]
        rows = []
        for group, result in _runs(groups):
            bins = _by_question(result)
            if sum(count > 0 for _, _, count in bins) < 2:
                continue
            parts = [[one for one in bins if low <= one[0] < high] for low, high in itertools.pairwise(bounds)]
            shares = [_told(sum(one[1] for one in part), sum(one[2] for one in part)) for part in parts]
            rows.append((*_labels(group, result), *shares))
        if rows:
            questions = [f"{low:,} to {high - 1:,}" for low, high in itertools.pairwise(bounds)]
            lines += [f"{name}:", "", *markdown(["model", "learning rate", "seed", *questions], rows), ""]
    return lines


def _by_question(result: Result) -> list[tuple[int, int, int]]:
    """(first position, right, answers) of each bin of positions, at the trained length."""
    part = result["then"].get(EVALUATION, {}).get("accuracy_by_position", {"edges": [], "right": [], "answers": []})
    return list(zip(part["edges"], part["right"], part["answers"]))


Counts = dict[str, dict[str, list[int]]]


def counts_by_length(result: Result) -> dict[int, Counts]:
    """Length -> region -> {right, answers} by depth, of all evaluations of a run."""
    found = {
        part["length"]: part["answers"]
        for name, part in result["then"].items()
        if name.partition("@")[0] == EVALUATION and "answers" in part
    }
    return dict(sorted(found.items()))


def heat_map(by_length: dict[int, Counts]) -> tuple[list[str], list[list[float | None]], list[float | None]]:
    """What `plots.plot_heat_map` draws: lengths; of each, the shares by depth of what lies before both windows; and
    the share of what lies in them, which proves nothing of the history."""
    names = [f"{length:,}" for length in by_length]
    far = [
        [right / count if count else None for right, count in zip(part["history"]["right"], part["history"]["answers"])]
        for part in by_length.values()
    ]
    near = [_ratio(_together(part, ("own", "observed"))) for part in by_length.values()]
    return names, far, near


def _together(regions: Counts, names: Sequence[str]) -> dict[str, list[int]]:
    return {kind: [sum(regions[name][kind]) for name in names] for kind in ("right", "answers")}


def _ratio(counts: dict[str, list[int]]) -> float | None:
    total = sum(counts["answers"])
    return sum(counts["right"]) / total if total else None


def _share(counts: dict[str, list[int]]) -> str:
    return _told(sum(counts["right"]), sum(counts["answers"]))


def _told(right: int, answers: int) -> str:
    return FORM.format(right / answers) if answers else ""


def _slug(name: str) -> str:
    """A file's name that stays the same whatever else is reported."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
