"""Base, TLinFormer, TConstFormer and sliding window at N = 512 and N = 1,024, on books in GPT-2 tokens.

    python -m tlinformer_jax sweep --sweep=configs/sweep_architectures.py --out=runs/architectures \
        --results=docs/results \
        --config.data.train_files='DIR/train-*.jsonl.xz' --config.data.validation_files=DIR/valid.jsonl.xz

Every run has 41M parameters and sees 100 M tokens in updates of 131,072, with the same dropout and a cosine schedule
that ends at the last update. base-1k and 1k-512-0.5 are trained with three seeds, the others with one.

Variants: all (the default); one of its points, such as sliding-1k-512, with its seeds; or any other variant of
configs/books.py, such as 4k-512-0.5.

Needs: the same as configs/books.py. Result: docs/results.md, all 14 runs, and 4k-512-0.5 with one seed.
"""

from typing import Any

from tlinformer_jax.experiments.plan import Sweep
from tlinformer_jax.experiments.recipes import books_config, row_points

TOKENS = 100_000_000
TCONST, SLIDING = {"model.architecture": "tconstformer"}, {"model.architecture": "sliding_window"}
# Name -> row of `recipes`, and the fields that differ from it.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "base-512": ("base-512", {}),
    "512-512-0.5": ("512-512-0.5", {}),
    "512-256-0.5": ("512-256-0.5", {}),
    "tconst-512-256-0.5": ("512-256-0.5", TCONST),
    "sliding-512-256": ("512-256-0.5", SLIDING),
    "base-1k": ("base-1k", {}),
    "1k-1k-0.5": ("1k-1k-0.5", {}),
    "1k-512-0.5": ("1k-512-0.5", {}),
    "tconst-1k-512-0.5": ("1k-512-0.5", TCONST),
    "sliding-1k-512": ("1k-512-0.5", SLIDING),
}
SEVERAL = {"base-1k": (0, 1, 2), "1k-512-0.5": (0, 1, 2)}


def get_sweep(variant: str = "all") -> Sweep:
    """Returns the sweep; --config.SECTION.FIELD=VALUE sets fields that its points do not set."""
    rows = ROWS if variant == "all" else {variant: ROWS.get(variant, (variant, {}))}
    base, points = row_points(lambda row: books_config(row, TOKENS), rows)
    for name in points.keys() & SEVERAL.keys():
        points[name]["train.seed"] = SEVERAL[name]
    return Sweep(base, points, then=("evaluate", "samples"), study="architectures")
