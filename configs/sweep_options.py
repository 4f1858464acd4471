"""The options beyond the paper in language modelling: 41M models at N = 1,024 on books in GPT-2 tokens.

    python -m tlinformer_jax sweep --sweep=configs/sweep_options.py:rates --out=runs/rates --results=docs/results \
        --config.data.train_files='DIR/train-*.jsonl.xz' --config.data.validation_files=DIR/valid.jsonl.xz
    python -m tlinformer_jax sweep --sweep=configs/sweep_options.py --out=runs/options --results=docs/results \
        --config.data.train_files=... --config.data.validation_files=...

Variants: all (the default, 20 runs of 100 M tokens): TLinFormer as published, with token shift, without slow rotations,
with an overlap of 16 and of 32, with the first two and the overlap of 16, and with token shift and key taps; Base and
sliding window, with and without the token shift; and no-history, a Transformer on samples of 256 tokens, which shows
what a window of 256 can know without a history. plain, plus and both Bases have three seeds. rates, 12 runs of 30 M
tokens: three learning rates for each architecture, to choose --config.train.learning_rate; `--point=K --points=4`, K =
0 to 3, runs those of TLinFormer, Base, sliding window and no-history.

All see the same text once, in updates of 65,536 tokens without dropout, under a cosine that ends at the last update.
--config.train.learning_rate sets another rate than 0.001. `--then=evaluate,history` also measures what the history
contributes, except to no-history, whose samples fit into one window.

Needs: the same as configs/books.py. Result: docs/quality.md, "Options and windows, one epoch of books": 0.001 is the
best of the three rates for all four architectures, one seed each, and after 100 M tokens the losses of all runs are
within 0.05 nats. After the trials of 30 M tokens TLinFormer is the worst at 0.001.
"""

from typing import Any

from tlinformer_jax.errors import ConfigError
from tlinformer_jax.experiments.plan import Sweep
from tlinformer_jax.experiments.recipes import SHIFT, one_epoch_config, row_points

TOKENS, TRIAL = 100_000_000, 30_000_000
RATES = (3e-4, 1e-3, 3e-3)
SLIDING = {"model.architecture": "sliding_window"}
OVERLAP, WAVELENGTHS = {"model.window_overlap": 16}, {"model.longest_wavelength": 64}
# Name -> row of `recipes`, and the fields that differ from it.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("1k-512-0.5", {}),
    "base": ("base-1k", {}),
    "sliding": ("1k-512-0.5", SLIDING),
    "no-history": ("base-256", {}),
    "plus": ("1k-512-0.5", SHIFT),
    "overlap-16": ("1k-512-0.5", OVERLAP),
    "wavelengths-64": ("1k-512-0.5", WAVELENGTHS),
    "all-options": ("1k-512-0.5", SHIFT | OVERLAP | WAVELENGTHS),
    "base-plus": ("base-1k", SHIFT),
    "sliding-plus": ("1k-512-0.5", SLIDING | SHIFT),
    "overlap-32": ("1k-512-0.5", {"model.window_overlap": 32}),
    "plus-taps": ("1k-512-0.5", SHIFT | {"model.key_taps": 5}),
}
ARCHITECTURES = ("plain", "base", "sliding", "no-history")
SEVERAL = ("plain", "plus", "base", "base-plus")


def get_sweep(variant: str = "all") -> Sweep:
    """Returns the sweep; --config.SECTION.FIELD=VALUE sets fields that its points do not set."""
    if variant not in ("all", "rates"):
        raise ConfigError("variant", variant, "must be one of all, rates")
    tokens = TOKENS if variant == "all" else TRIAL
    rows = {f"books-{name}": row for name, row in ROWS.items()}
    base, points = row_points(lambda row: one_epoch_config(row, tokens), rows)
    if variant == "rates":
        points = {
            f"books-{name}-lr{rate:g}": points[f"books-{name}"] | {"train.learning_rate": rate}
            for rate in RATES
            for name in ARCHITECTURES
        }
    else:
        for name in SEVERAL:
            points[f"books-{name}"]["train.seed"] = (0, 1, 2)
    return Sweep(base, points, then=("evaluate",), study="architectures")
