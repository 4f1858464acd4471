"""Needles in a haystack by architecture: S-NIAH-1, 2, 3 and MK-NIAH, at 1 K to 16 K tokens.

    python -m tlinformer_jax sweep --sweep=configs/sweep_niah.py:4k --out=runs/niah --results=docs/results \
        --config.data.train_files='DIR/train-*.jsonl.xz' --config.data.validation_files=DIR/valid.jsonl.xz

Variants: 1k, 4k (the default), 16k, 1k-plus, 4k-plus and 16k-plus, the four tasks of configs/niah.py at that length (16
points each, three seeds); 1k-plus-causal, TLinFormer with model.causal_history in the tasks of 1k-plus (4 points); one
setting of configs/niah.py, such as s1-4k; and tiny, two runs on a CPU. In plus all have the token shift and no slow
rotations, and TLinFormer and TConstFormer also key taps. Each is evaluated at 1, 4 and 16 times its length for the heat
maps of the report. A point is refused if the held-out text is shorter: then set --then.

Result: docs/memory.md, "Needles", one or two seeds unless another number is named:

- 1k with --config.model.token_shift=true --config.model.longest_wavelength=64, except for the sliding window in mk;
- 1k-plus: TLinFormer and attention in all tasks, TConstFormer and the sliding window in mk;
- 4k-plus: TLinFormer and attention in s2 and mk; 16k-plus: TLinFormer in mk;
- 1k-plus-causal: s1 and s2 with two seeds, s3 with one, mk with three.
"""

from tlinformer_jax.experiments.plan import Sweep
from tlinformer_jax.experiments.recipes import chosen, package_config, sweep_points

MODELS = ("tlin-4", "tconst-4", "attention-4", "sliding-4")
KINDS = ("s1", "s2", "s3", "mk")
LENGTHS = ("1k", "4k", "16k", "1k-plus", "4k-plus", "16k-plus")
# Variant -> settings of configs/niah.py.
SETTINGS = {length: [f"{kind}-{length}" for kind in KINDS] for length in LENGTHS}
SETTINGS["1k-plus-causal"] = SETTINGS["1k-plus"]
SETTINGS |= {setting: [setting] for length in LENGTHS for setting in SETTINGS[length]} | {"tiny": ["tiny"]}


def get_sweep(variant: str = "4k") -> Sweep:
    """Returns the sweep; --config.SECTION.FIELD=VALUE sets fields that its points do not set."""
    settings = chosen(SETTINGS, variant)
    if variant == "tiny":
        base, points = sweep_points(package_config("niah"), settings, MODELS[:2], (3e-3,))
        return Sweep(base, points, then=("evaluate", "evaluate@1024"), study="retrieval")
    models = ("causal-4",) if variant.endswith("causal") else MODELS
    base, points = sweep_points(package_config("niah"), settings, models, (1e-3,))
    length = base.data.sequence_length
    then = tuple(f"evaluate@{part * length}" for part in (1, 4, 16))
    return Sweep(base, points, seeds=(0, 1, 2), then=then, study="retrieval")
