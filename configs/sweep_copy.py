"""Segment copy by architecture at equal depth: one setting fits into the windows and two do not.

    python -m tlinformer_jax sweep --sweep=configs/sweep_copy.py:256-tight --out=runs/copy --results=docs/results
    python -m tlinformer_jax sweep --sweep=configs/sweep_copy.py --out=runs/copy --results=docs/results

Variants: the settings of configs/copy.py, which states their windows, 24 cells each; all of them (the default, 72).
Controls, models, learning rates and the end of a cell are as in configs/sweep_recall.py; chance is 1 / 16.

A cell took 13 to 43 s on an H200 that it shared with up to seven others. Result: docs/results.md, models of 4 layers at
the learning rate 0.001, one seed: all find 99% except the sliding window in 512-tight (0.452). Not measured: the models
of 6 layers, other rates.
"""

from tlinformer_jax.experiments.plan import Sweep
from tlinformer_jax.experiments.recipes import MODELS, package_config, sweep_points

SETTINGS = ("128", "256-tight", "512-tight")
LEARNING_RATES = (3e-4, 1e-3, 3e-3)


def get_sweep(variant: str = "all") -> Sweep:
    """Returns the sweep; --config.SECTION.FIELD=VALUE sets fields that its points do not set."""
    settings = SETTINGS if variant == "all" else (variant,)
    base, points = sweep_points(package_config("copy"), settings, tuple(MODELS)[1:], LEARNING_RATES)
    return Sweep(base, points, then=("evaluate",), study="retrieval")
