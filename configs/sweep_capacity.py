"""Capacity: recall against the number of pairs at W_oh = 32, and against W_oh at 64 pairs; N = 1,024, five seeds.

    python -m tlinformer_jax sweep --sweep=configs/sweep_capacity.py:rows --out=runs/capacity --results=docs/results

Variants: pairs (4 to 256 pairs: 105 runs), rows (W_oh of 1 to 128: 80 runs), all (the default, 175 runs), and tiny
(three runs, minutes on a CPU).

A point is named pairsP-rowsW_MODEL_lrRATE, where W is the number of rows of W_oh. All have a model of width 128 and 4
layers, W_og = 64, and samples that start with 64 tokens and grow as soon as 80% of the training answers are right. All
have the token shift, without which it is a matter of luck whether a run finds the answers at all (docs/memory.md).
TLinFormer's window and attention read the pairs directly. TConstFormer reads only W_oh if the pairs fill the first
window, that is, from 32 pairs on. A run ends at 99%, or after 200 M tokens.

The report draws the median over seeds with its bootstrap interval. Result: docs/memory.md, "Capacity", with at most
131 M tokens and shorter stages: --config.train.steps=4000@0.99 --config.train.warmup_steps=400
--config.data.curriculum=64:700@0.8,128:700@0.8,256:700@0.8,512:700@0.8. Three seeds of TLinFormer and attention with
W_oh = 32, one to three of the other cells.
"""

import re

from ml_collections import ConfigDict

from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.experiments.plan import Sweep
from tlinformer_jax.experiments.recipes import Setting, set_task, shorten, sweep_points

PAIRS, ROWS = (4, 8, 16, 32, 64, 128, 256), (1, 2, 4, 8, 16, 32, 64, 128)
WINDOWED = ("tlin-4", "tconst-4")  # attention has no W_oh
STAGES = "64:1000@0.8,128:1000@0.8,256:1000@0.8,512:1000@0.8"


def get_sweep(variant: str = "all") -> Sweep:
    """Returns the sweep; --config.SECTION.FIELD=VALUE sets fields that its points do not set."""
    by_pairs, by_rows = [f"pairs{n}-rows32" for n in PAIRS], [f"pairs64-rows{n}" for n in ROWS]
    if variant == "tiny":
        settings = [f"pairs{n}-rows4" for n in (1, 2, 4)]
        base, points = sweep_points(_tiny, settings, WINDOWED[:1], (3e-3,))
        return Sweep(base, points, then=("evaluate",), study="retrieval")
    if variant not in ("all", "pairs", "rows"):
        raise ConfigError("variant", variant, "must be one of all, pairs, rows, tiny")
    if variant == "rows":
        base, points = sweep_points(_config, by_rows, WINDOWED, (3e-3,))
    else:
        base, points = sweep_points(_config, by_pairs, (*WINDOWED, "attention-4"), (3e-3,))
    if variant == "all":
        points |= sweep_points(_config, [by_pairs[0], *by_rows], WINDOWED, (3e-3,))[1]
    return Sweep(base, points, seeds=(0, 1, 2, 3, 4), then=("evaluate",), study="retrieval")


def _config(name: str) -> ConfigDict:
    """Returns recall with the number of pairs and of rows of W_oh in a point's name."""
    pairs, rows = map(int, re.findall("[0-9]+", name))
    config = _recall(pairs, 8192)
    set_task(config, Setting(1024, rows, 64, pairs, STAGES), 8192, 128, tokens_per_update=32_768, learning_rate=3e-3)
    return config


def _tiny(name: str) -> ConfigDict:
    """Returns the configuration with samples of 32 tokens, W_og = 4 and 40 updates: a minute on a CPU."""
    pairs, rows = map(int, re.findall("[0-9]+", name))
    config = _recall(pairs, 64)
    set_task(config, Setting(32, rows, 4, pairs), 64, 32, tokens_per_update=1_024, learning_rate=3e-3)
    shorten(config, 40)
    return config


def _recall(pairs: int, vocabulary: int) -> ConfigDict:
    config = default_config_dict()
    config.model.token_shift = True
    config.data.update(dataset="recall", tokenizer=f"numbers:{vocabulary}", num_items=pairs)
    return config
