"""Window sizes and depth of the 41M TLinFormer at N = 1,024, on books in GPT-2 tokens, 30 M tokens a point.

    python -m tlinformer_jax sweep --sweep=configs/sweep_windows.py --out=runs/windows \
        --config.data.train_files='DIR/train-*.jsonl.xz' --config.data.validation_files=DIR/valid.jsonl.xz

Variants: full (the default, 23 points), knee (10 points, enough to show the knee in less time) and tiny (four points on
the embedded Python reference, minutes on a CPU).

A point is named W_oh-W_og after its windows; points of another depth end in -B-H, blocks and hidden layers, 8 layers in
total. Points with the same W_total = W_oh + W_og form a curve over W_oh / W_total. The sweep marks its knee if every
point has two seeds or more (--seeds=0,1,2) and neither end is missing.

Needs: the same as configs/books.py. All points see the same text in the same order. Result: docs/results.md, 9 of the
knee's 10 points (not yet 448-64).
"""

from typing import Any

from tlinformer_jax.errors import ConfigError
from tlinformer_jax.experiments.plan import Sweep
from tlinformer_jax.experiments.recipes import books_config, tiny_config, window_fields

TOKENS = 30_000_000
# Rows of W_oh if both windows together have 512.
HISTORIES = (64, 128, 196, 256, 316, 384, 448)
LENGTHS = (64, 128, 256, 512, 1024)
DEPTHS = ((4, 0), (1, 6))


def get_sweep(variant: str = "full") -> Sweep:
    """Returns the sweep; --config.SECTION.FIELD=VALUE sets fields that its points do not set."""
    if variant == "tiny":
        windows = ((8, 24), (16, 16), (24, 8), ("auto", 16))
        base = tiny_config()
        base.model.num_blocks = 1
        return Sweep(base, dict(_point(*pair) for pair in windows), then=("evaluate",))
    curve = [(history, 512 - history) for history in HISTORIES]
    if variant == "knee":
        windows = [*curve, (128, 128), (512, 512), ("auto", 256)]
        return Sweep(books_config("1k-512-0.5", TOKENS), dict(_point(*pair) for pair in windows))
    if variant != "full":
        raise ConfigError("variant", variant, "must be one of full, knee, tiny")
    windows = [*curve, *((share, 1024 - share) for share in (391, 512, 633)), *((size, 256) for size in LENGTHS)]
    windows += [(256, size) for size in LENGTHS] + [(size, size) for size in (64, 128)] + [("auto", 256)]
    points = dict(_point(*pair) for pair in windows)
    for blocks, hidden in DEPTHS:
        name, overrides = _point(256, 256)
        points[f"{name}-B{blocks}-H{hidden}"] = overrides | {
            "model.num_blocks": blocks,
            "model.hidden_depth": hidden,
        }
    return Sweep(books_config("1k-512-0.5", TOKENS), points)


def _point(history: int | str, generation: int) -> tuple[str, dict[str, Any]]:
    return f"{history}-{generation}", window_fields(history, generation)
