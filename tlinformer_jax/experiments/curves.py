"""Figures of several runs: means and spreads over seeds, curves, their knee. Without JAX."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from tlinformer_jax.config import RunConfig, run_config
from tlinformer_jax.experiments.job import essence

Result = Mapping[str, Any]
ENDS = (0.125, 0.875)  # shares that a curve must reach before the chord between its ends can show a knee


@dataclasses.dataclass(frozen=True)
class Mean:
    """A figure over seeds.

    Attributes:
      value: the arithmetic mean.
      spread: the sample standard deviation (divisor n - 1); None of a single one.
      count: n.
    """

    value: float
    spread: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds only, and in nothing that decides what they come to.

    Attributes:
      label: the point's name in its sweep, else `label_of` the configuration.
      config: of the first.
      results: of all, by seed.
    """

    label: str
    config: RunConfig
    results: tuple[Result, ...]

    def mean(self, figure: Callable[[Result], Any]) -> Mean | None:
        """The mean of a figure over the runs that have it; None if none has."""
        return mean_of(figure(result) for result in self.results)

    @property
    def seeds(self) -> list[int]:
        """Of all runs."""
        return [result["seed"] for result in self.results]


def perplexity(result: Result) -> Any:
    """Validation perplexity per token at the end."""
    return result["validation"].get("perplexity")


def tokens_per_second(result: Result) -> Any:
    """Median speed of training."""
    return result["speed"].get("tokens_per_second")


def cache_bytes(result: Result) -> Any:
    """Bytes in use of the cache of one sequence of N tokens."""
    return result["cache"].get("used")


def wall_seconds(result: Result) -> Any:
    """Time of the training with compilation, evaluation and saving."""
    return result["seconds"].get("wall")


def mean_of(values: Iterable[Any]) -> Mean | None:
    """The mean and spread of those values that are not None; None if there are none."""
    known = [float(value) for value in values if value is not None]
    if not known:
        return None
    return Mean(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def groups_of(results: Iterable[Result]) -> list[Group]:
    """Runs of the same point, tokens and configuration but for the seed, put together in order of appearance."""
    found: dict[tuple[Any, ...], list[tuple[RunConfig, Result]]] = {}
    for result in results:
        config = run_config(result["config"])
        seedless = dataclasses.replace(essence(config), train=dataclasses.replace(config.train, seed=0))
        label = result.get("point") or label_of(config)
        # Runs that end when they are accurate enough end at different updates.
        tokens = None if result.get("target") else result["tokens"]
        found.setdefault((label, repr(seedless), tokens), []).append((config, result))
    return [
        Group(label, pairs[0][0], tuple(sorted((result for _, result in pairs), key=lambda result: result["seed"])))
        for (label, *_), pairs in found.items()
    ]


def label_of(config: RunConfig) -> str:
    """A run's architecture and lengths by name: base-1024, 1024-512-0.5 (TLinFormer), tconst-1024-512-0.5, ..."""
    model, length = config.model, config.data.sequence_length
    shape = "" if (model.num_blocks, model.hidden_depth) == (2, 2) else f"-B{model.num_blocks}-H{model.hidden_depth}"
    if model.architecture == "transformer":
        return f"base-{length}{shape}"
    prefix = {"tlinformer": "", "tconstformer": "tconst-", "sliding_window": "sliding-"}[model.architecture]
    if model.history_window == "auto":
        return f"{prefix}{length}-auto-{model.generation_window}{shape}"
    share = observed_share(config)
    return f"{prefix}{length}-{int(model.history_window) + model.generation_window}-{share:.3g}{shape}"


def observed_share(config: RunConfig) -> float | None:
    """W_oh / W_total; an 'auto' window counts as it is in the last window of a sequence. None of a Transformer."""
    model, length = config.model, config.data.sequence_length
    if model.architecture == "transformer":
        return None
    if model.history_window == "auto":
        rows = model.observed_rows((length - 1) // model.generation_window * model.generation_window)
    else:
        rows = int(model.history_window)
    return rows / (rows + model.generation_window)


def total_window(config: RunConfig) -> int | None:
    """W_total, the sum of both windows; None where there are none or one is 'auto'."""
    model = config.model
    if model.architecture == "transformer" or model.history_window == "auto":
        return None
    return int(model.history_window) + model.generation_window


def knee(points: Sequence[tuple[float, float]]) -> int | None:
    """The knee of a curve whose small y are the good ones: where going further along x begins to gain little.

    Both axes are scaled to [0, 1]. The knee is the point that lies farthest below the chord from the first point to
    the last, by x; the distance is measured along y, which orders points as the distance at right angles does.

    Args:
      points: (x, y) in any order.

    Returns:
      its index in `points`; None for fewer than three points, and where no point lies below the chord.
    """
    order = sorted(range(len(points)), key=lambda index: points[index])
    if len(order) < 3:
        return None
    (left, first), (right, last) = points[order[0]], points[order[-1]]
    values = [y for _, y in points]
    height = max(values) - min(values)
    if right == left or height == 0 or not math.isfinite(height):
        return None

    def below(index: int) -> float:
        x, y = points[index]
        return (first + (last - first) * (x - left) / (right - left) - y) / height

    best = max(order, key=below)
    return best if below(best) > 1e-9 else None


def share_curves(groups: Sequence[Group]) -> dict[int, list[Group]]:
    """The TLinFormers of one W_total, N and depth, from the smallest share of W_oh to the largest, by W_total.

    Of several N or depths with that W_total the curve is that of the most points; those with fewer than three are left
    out, having no knee.
    """
    found: dict[tuple[Any, ...], list[Group]] = {}
    for group in groups:
        model = group.config.model
        total = total_window(group.config)
        if model.architecture == "tlinformer" and total is not None and group.mean(perplexity) is not None:
            shape = (total, group.config.data.sequence_length, model.num_blocks, model.hidden_depth)
            found.setdefault(shape, []).append(group)
    curves: dict[int, list[Group]] = {}
    for (total, *_), members in found.items():
        if len(members) >= 3 and len(members) > len(curves.get(total, [])):
            curves[total] = sorted(members, key=lambda group: observed_share(group.config) or 0.0)
    return curves


def knee_of(curve: Sequence[Group]) -> Group | None:
    """The knee of a curve of `share_curves`; None where there is none, or `why_no_knee` says why none can be told."""
    points = [(observed_share(group.config) or 0.0, mean.value) for group in curve if (mean := group.mean(perplexity))]
    found = None if why_no_knee(curve) else knee(points)
    return None if found is None else curve[found]


def why_no_knee(curve: Sequence[Group]) -> str | None:
    """Why a curve of `share_curves` cannot show a knee: a point of one seed, or an end that is missing."""
    shares = [observed_share(group.config) or 0.0 for group in curve]
    reasons = ["some points have one seed only"] if any(len(set(group.seeds)) < 2 for group in curve) else []
    if min(shares) > ENDS[0] or max(shares) < ENDS[1]:
        reasons.append(f"an end is missing, {ENDS[0]} or {ENDS[1]}")
    return " and ".join(reasons) or None
