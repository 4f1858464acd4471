"""The figures of sweeps and of the report; matplotlib is imported where it is used."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from tlinformer_jax.experiments.curves import (
    Group,
    cache_bytes,
    knee_of,
    observed_share,
    perplexity,
    share_curves,
    tokens_per_second,
)

SPEED, CACHE, SHARE = "perplexity_speed.png", "perplexity_cache.png", "perplexity_share.png"


def plot_sweep(groups: Sequence[Group], folder: pathlib.Path, prefix: str = "") -> list[pathlib.Path]:
    """Perplexity against tokens/s, against cache bytes, and against W_oh / W_total with the knees marked.

    Raises:
      ImportError: where matplotlib is not installed.
    """
    files = [
        _scatter(groups, tokens_per_second, "training, tokens/s", 1.0, folder / f"{prefix}{SPEED}"),
        _scatter(groups, cache_bytes, "cache of one sequence of N tokens, MB", 1e-6, folder / f"{prefix}{CACHE}"),
        _shares(groups, folder / f"{prefix}{SHARE}"),
    ]
    return [file for file in files if file is not None]


def plot_curves(
    curves: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    axes_names: tuple[str, str],
    file: pathlib.Path,
    log_x: bool = False,
) -> None:
    """Draws labelled lines (label, x, y); with `log_x`, x stands at its logarithm, and 0 as far before 1 as 2 after."""
    figure, axes = _figure()
    for label, x, y in curves:
        axes.plot(x, y, marker="o", markersize=3, label=label)
    if log_x:
        axes.set_xscale("symlog", base=2, linthresh=1)
    axes.set_xlabel(axes_names[0])
    axes.set_ylabel(axes_names[1])
    axes.legend(fontsize=8)
    _save(figure, file)


def plot_heat_map(
    lengths: Sequence[str],
    far: Sequence[Sequence[float | None]],
    near: Sequence[float | None],
    title: str,
    file: pathlib.Path,
) -> None:
    """Draws shares of right answers, 0 to 1: a row for each length, the shortest at the bottom.

    Args:
      lengths: names of the rows.
      far: by depth, of each row; None is left grey.
      near: of what lies in the last windows, a column apart.
      title: of the figure.
      file: to write.
    """
    figure, axes = _figure()
    axes.grid(visible=False)
    axes.set_facecolor("lightgrey")
    nothing = float("nan")
    depths = len(far[0])
    rows = [[*row, None, one] for row, one in zip(far, near)]
    values = [[nothing if cell is None else cell for cell in row] for row in rows]
    image = axes.imshow(values, origin="lower", aspect="auto", vmin=0, vmax=1, cmap="viridis")
    figure.colorbar(image, label="answers right")
    axes.set_yticks(range(len(lengths)), lengths)
    axes.set_xticks(
        [*range(0, depths, 4), depths + 1],
        [*(f"{place / depths:.0%}" for place in range(0, depths, 4)), "last\nwindows"],
    )
    axes.set_xlabel("depth of the source before both windows")
    axes.set_ylabel("tokens")
    axes.set_title(title, fontsize=9)
    _save(figure, file)


def _scatter(
    groups: Sequence[Group], figure_of: Callable[[Any], Any], name: str, unit: float, file: pathlib.Path
) -> pathlib.Path | None:
    figure, axes = _figure()
    drawn = False
    for group in groups:
        x, y = group.mean(figure_of), group.mean(perplexity)
        if x is None or y is None:
            continue
        axes.errorbar(x.value * unit, y.value, xerr=(x.spread or 0) * unit, yerr=y.spread or 0, fmt="o", capsize=3)
        axes.annotate(group.label, (x.value * unit, y.value), xytext=(4, 4), textcoords="offset points", fontsize=7)
        drawn = True
    if not drawn:
        return None
    axes.set_xlabel(name)
    axes.set_ylabel("validation perplexity")
    return _save(figure, file)


def _shares(groups: Sequence[Group], file: pathlib.Path) -> pathlib.Path | None:
    figure, axes = _figure()
    curves = share_curves(groups)
    on_curves = [id(group) for curve in curves.values() for group in curve]
    rest = [group for group in groups if id(group) not in on_curves and observed_share(group.config) is not None]
    for total, curve in sorted(curves.items()):
        _curve(axes, curve, f"W_total = {total:,}", "-o")
        found = knee_of(curve)
        if found is not None:
            _curve(axes, [found], f"knee, W_total = {total:,}", "*", markersize=16)
    _curve(axes, rest, "other points", "s", annotated=True)
    if not axes.lines and not axes.containers:
        return None
    axes.set_xlabel("W_oh / W_total")
    axes.set_ylabel("validation perplexity")
    axes.legend(fontsize=8)
    return _save(figure, file)


def _curve(axes: Any, groups: Sequence[Group], label: str, form: str, annotated: bool = False, **style: Any) -> None:
    points = [(group, observed_share(group.config), group.mean(perplexity)) for group in groups]
    known = [(group, share, mean) for group, share, mean in points if mean is not None]
    if not known:
        return
    axes.errorbar(
        [share for _, share, _ in known],
        [mean.value for _, _, mean in known],
        yerr=[mean.spread or 0 for _, _, mean in known],
        fmt=form,
        capsize=3,
        label=label,
        **style,
    )
    for group, share, mean in known if annotated else ():
        axes.annotate(group.label, (share, mean.value), xytext=(4, 4), textcoords="offset points", fontsize=7)


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, file: pathlib.Path) -> pathlib.Path:
    # Without matplotlib's version, so that the same figures are the same bytes.
    figure.savefig(file, dpi=110, metadata={"Software": None})
    return file
