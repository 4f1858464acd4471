"""Capacity: recall against the number of pairs at W_oh = 32, and against W_oh at 64 pairs; N = 1,024, five seeds.

    python -m tlinformer_jax sweep --sweep=configs/sweep_capacity.py:rows --out=runs/capacity --results=docs/results

Variants: pairs (4 to 256 pairs: 105 runs), rows (W_oh of 1 to 128: 80 runs), all (the default, 175 runs), and tiny,
three runs, minutes on a CPU.

A point is named pairsP-rowsW_MODEL_lrRATE, W the rows of W_oh. All have the token shift, without which it is a matter
of luck whether a run finds the answers at all (docs/quality.md); a model of width 128 and 4 layers; W_og = 64; samples
that grow from 64 tokens on as soon as 80% of training's answers are right. TLinFormer's window and attention read the
pairs themselves. What W_oh holds is all that TConstFormer has where the pairs fill the first window, so from 32 on. A
run ends at 99%, after 200 M tokens at the latest.

The report draws the median over seeds with its bootstrap interval. Result: not yet measured.
"""

from tlinformer_jax.errors import ConfigError
from tlinformer_jax.experiments.plan import Sweep
from tlinformer_jax.experiments.recipes import set_capacity, set_small_capacity, sweep_points

PAIRS, ROWS = (4, 8, 16, 32, 64, 128, 256), (1, 2, 4, 8, 16, 32, 64, 128)
WINDOWED = ("tlin-4", "tconst-4")  # attention has no W_oh


def get_sweep(variant: str = "all") -> Sweep:
    """Returns the sweep; --config.SECTION.FIELD=VALUE changes what its points leave alone."""
    by_pairs, by_rows = [f"pairs{n}-rows32" for n in PAIRS], [f"pairs64-rows{n}" for n in ROWS]
    if variant == "tiny":
        settings = [f"pairs{n}-rows4" for n in (1, 2, 4)]
        base, points = sweep_points(set_small_capacity, settings, WINDOWED[:1], (3e-3,))
        return Sweep(base, points, then=("evaluate",), study="retrieval")
    if variant not in ("all", "pairs", "rows"):
        raise ConfigError("variant", variant, "must be one of all, pairs, rows, tiny")
    if variant == "rows":
        base, points = sweep_points(set_capacity, by_rows, WINDOWED, (3e-3,))
    else:
        base, points = sweep_points(set_capacity, by_pairs, (*WINDOWED, "attention-4"), (3e-3,))
    if variant == "all":
        points |= sweep_points(set_capacity, [by_pairs[0], *by_rows], WINDOWED, (3e-3,))[1]
    return Sweep(base, points, seeds=(0, 1, 2, 3, 4), then=("evaluate",), study="retrieval")
