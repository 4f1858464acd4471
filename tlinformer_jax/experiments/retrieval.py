"""Tables, curves and heat maps of retrieval: what the records of tasks say of answers that are right. Without JAX.

A cell of a table is a model in a setting at the learning rate that found most answers there, of the validation split
on which it is told: the rates that were tried are named beside it. Where several are equal, the one that took least
updates.
"""

import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tlinformer_jax.data.tasks import DEPTHS, REGIONS
from tlinformer_jax.experiments.curves import Group, Result, groups_of, mean_of, wall_seconds
from tlinformer_jax.experiments.plots import plot_curves, plot_heat_map
from tlinformer_jax.experiments.tables import duration, markdown, numbers, with_spread

FORM = "{:.3f}"
EVALUATION = "evaluate"
PARTS = 8  # of a sample, in the table of the question's position
NAMES = {
    "transformer": "full attention",
    "sliding_window": "sliding window",
    "tlinformer": "TLinFormer",
    "tconstformer": "TConstFormer",
}


def accuracy(result: Result) -> Any:
    """The share of answers that are right at the end of the training."""
    return result["validation"].get("accuracy")


def _chance(result: Result) -> Any:
    return result["validation"].get("chance")


def updates(result: Result) -> Any:
    """That were made."""
    return result["steps"]


def settings_of(results: Iterable[Result]) -> dict[str, list[Group]]:
    """Groups by setting, named in words: the task with its sizes, and the windows.

    The same configuration is one group, whichever sweep has trained it; a seed that was run again counts as a run.
    """
    found: dict[str, list[Group]] = {}
    for group in groups_of({**result, "point": ""} for result in results):
        found.setdefault(setting(group), []).append(group)
    return dict(sorted(found.items()))


def setting(group: Group) -> str:
    """The task of a group, its sizes, W_oh and W_og, and the lengths it was trained on before."""
    data, model = group.config.data, group.config.model
    sizes = {"recall": f", {data.pairs:,} pairs", "passkey": f", {data.passkeys:,} hidden"}.get(data.dataset, "")
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


def best_of(groups: Iterable[Group]) -> dict[str, tuple[Group, list[Group]]]:
    """By model: the group of the best learning rate, and all of the model's groups by rate."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(model_name(group), []).append(group)

    def worth(group: Group) -> tuple[float, float]:
        right, steps = group.mean(accuracy), group.mean(updates)
        return (-1.0 if right is None else right.value, -(steps.value if steps else 0.0))

    return {
        name: (max(members, key=worth), sorted(members, key=lambda group: group.config.train.learning_rate))
        for name, members in sorted(found.items())
    }


def retrieval_lines(results: Iterable[Result]) -> list[str]:
    """A table for each setting: every model at its best learning rate, and all rates beside each other."""
    lines: list[str] = []
    for name, groups in settings_of(results).items():
        lines += [f"### {name}", "", *_setting_table(groups), "", *_rates_table(groups)]
    return lines


def _setting_table(groups: Sequence[Group]) -> list[str]:
    columns = ["model", "learning rate", "answers right", *(f"source in {name}" for name in ("window", "W_oh"))]
    columns += ["source before W_oh", "chance", "tokens", "end", "parameters", "wall time", "seeds"]
    rows = []
    for name, (group, _) in best_of(groups).items():
        shares = [_mean(group, figure) for figure in ("accuracy", *(f"accuracy_{region}" for region in REGIONS))]
        tokens = mean_of(result["tokens"] / 1e6 for result in group.results)
        rows.append(
            (
                name,
                f"{group.config.train.learning_rate:g}",
                *shares,
                FORM.format(chance.value) if (chance := group.mean(_chance)) else "",
                with_spread(tokens, "{:.1f} M"),
                end(group),
                f"{group.results[0]['parameters']:,}",
                duration(group.mean(wall_seconds)),
                numbers(group.seeds),
            )
        )
    return markdown(columns, rows)


def end(group: Group) -> str:
    """What ended the runs: the accuracy that was wanted, or the updates they had."""
    targets = [result.get("target") for result in group.results]
    wanted = next((target["accuracy"] for target in targets if target), None)
    if wanted is None:
        return "all updates"
    reached = sum(bool(target and target["reached"]) for target in targets)
    if reached == len(targets):
        return f"{wanted:.0%} reached"
    return f"all updates: {wanted:.0%} not reached" + (
        f" by {len(targets) - reached} of {len(targets)}" if reached else ""
    )


def _rates_table(groups: Sequence[Group]) -> list[str]:
    """Answers right by learning rate; nothing where only one was tried."""
    rates = sorted({group.config.train.learning_rate for group in groups})
    if len(rates) < 2:
        return []
    rows = []
    for name, (_, members) in best_of(groups).items():
        by_rate = {group.config.train.learning_rate: with_spread(group.mean(accuracy), FORM) for group in members}
        rows.append((name, *(by_rate.get(rate, "") for rate in rates)))
    return [*markdown(["answers right by learning rate", *(f"{rate:g}" for rate in rates)], rows), ""]


def length_lines(
    results: Iterable[Result], figures: pathlib.Path, figure_line: Callable[[pathlib.Path, str], list[str]]
) -> list[str]:
    """Answers right by length and depth, of every model at its best rate that was evaluated at several lengths.

    Args:
      results: of tasks.
      figures: where the heat maps go.
      figure_line: the lines that show one.
    """
    lines: list[str] = []
    for name, groups in settings_of(results).items():
        rows = []
        for model, (group, _) in best_of(groups).items():
            by_length = counts_by_length(group)
            if len(by_length) < 2:
                continue
            for length, regions in by_length.items():
                shares = [_share(regions[region]) for region in REGIONS]
                rows.append((model, f"{length:,}", _share(_together(regions, REGIONS)), *shares))
            file = figures / f"results_lengths_{_slug(name)}_{_slug(model)}.png"
            plot_heat_map(*heat_map(by_length), model, file)
            lines += figure_line(file, f"Answers right by length and depth: {model}, {name}")
        if rows:
            columns = ("model", "evaluated at", "answers right", "source in window", "source in W_oh", "before W_oh")
            lines = [*lines, f"Trained on {name}:", "", *markdown(columns, rows), ""]
    return lines


def question_lines(
    results: Iterable[Result], figures: pathlib.Path, figure_line: Callable[[pathlib.Path, str], list[str]]
) -> list[str]:
    """Answers right by the position of the question, of every model at its best rate, where it has several.

    Args:
      results, figures, figure_line: as of `length_lines`.
    """
    lines: list[str] = []
    for name, groups in settings_of(results).items():
        by_model = {model: _by_question(group) for model, (group, _) in best_of(groups).items()}
        asked = {model: bins for model, bins in by_model.items() if sum(count > 0 for _, _, count in bins) > 1}
        if not asked:
            continue
        length = groups[0].config.data.sequence_length
        bounds = [length * part // PARTS for part in range(PARTS + 1)]
        rows = []
        for model, bins in asked.items():
            parts = [[one for one in bins if low <= one[0] < high] for low, high in itertools.pairwise(bounds)]
            rows.append((model, *(_told(sum(one[1] for one in part), sum(one[2] for one in part)) for part in parts)))
        columns = ["questions in", *(f"{low:,} to {high - 1:,}" for low, high in itertools.pairwise(bounds))]
        lines += [f"{name}:", "", *markdown(columns, rows), ""]
        curves = [
            (model, [start for start, _, count in bins if count], [right / count for _, right, count in bins if count])
            for model, bins in asked.items()
        ]
        file = figures / f"results_questions_{_slug(name)}.png"
        plot_curves(curves, ("position of the question", "answers right"), file)
        lines += figure_line(file, f"Answers right by the position of the question: {name}")
    return lines


def _by_question(group: Group) -> list[tuple[int, int, int]]:
    """(first position, right, answers) of each bin of positions, added up over seeds, at the trained length."""
    found: dict[int, tuple[int, int]] = {}
    for result in group.results:
        part = result["then"].get(EVALUATION, {}).get("accuracy_by_position", {"edges": [], "right": [], "answers": []})
        for start, right, count in zip(part["edges"], part["right"], part["answers"]):
            before = found.get(start, (0, 0))
            found[start] = (before[0] + right, before[1] + count)
    return [(start, *counts) for start, counts in sorted(found.items())]


Counts = dict[str, dict[str, list[int]]]


def counts_by_length(group: Group) -> dict[int, Counts]:
    """Length -> region -> {right, answers} by depth, added up over seeds, of all evaluations of the group."""
    found: dict[int, Counts] = {}
    for result in group.results:
        seen = set()
        for name, part in result["then"].items():
            if name.partition("@")[0] != EVALUATION or "answers" not in part or part["length"] in seen:
                continue
            seen.add(part["length"])
            place = found.setdefault(
                part["length"], {region: {"right": [0] * DEPTHS, "answers": [0] * DEPTHS} for region in REGIONS}
            )
            for region, kind in itertools.product(REGIONS, ("right", "answers")):
                place[region][kind] = [a + b for a, b in zip(place[region][kind], part["answers"][region][kind])]
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


def _mean(group: Group, figure: str) -> str:
    return with_spread(group.mean(lambda result: result["validation"].get(figure)), FORM)
