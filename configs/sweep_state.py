"""State tracking by architecture: parity and S_5, trained up to 64 or 256 tokens, evaluated up to 1,024.

    python -m tlinformer_jax sweep --sweep=configs/sweep_state.py --out=runs/state --results=docs/results

Variants: the name of a setting of configs/state.py runs that setting with four architectures and five seeds; the
default runs all settings (80 runs); causal is parity-64 for TLinFormer with model.causal_history; tiny is two runs on a
CPU.

Result: docs/memory.md, "State tracking": parity-64, three seeds; the others one seed with at most 100 M tokens:
--config.train.steps=3051@0.99 --config.train.warmup_steps=305 and stages of at most 400 or 500 updates, as their
commands in docs/results.md say. Two to eight minutes a run on an H200 that it shared with others. causal: one seed,
stopped at update 4,950 of 6,103.
"""

from tlinformer_jax.experiments.plan import Sweep
from tlinformer_jax.experiments.recipes import package_config, sweep_points

MODELS = ("tlin-4", "tconst-4", "attention-4", "sliding-4")
LENGTHS = (32, 64, 128, 256, 512, 1024)
# Variant -> settings of configs/state.py and models; others are a setting with MODELS.
VARIANTS = {
    "all": (("parity-64", "parity-256", "s5-64", "s5-256"), MODELS),
    "causal": (("parity-64",), ("causal-4",)),
}


def get_sweep(variant: str = "all") -> Sweep:
    """Returns the sweep; --config.SECTION.FIELD=VALUE sets fields that its points do not set."""
    if variant == "tiny":
        base, points = sweep_points(package_config("state"), ("tiny",), MODELS[:2], (3e-3,))
        return Sweep(base, points, then=("evaluate", "evaluate@64"), study="retrieval")
    settings, models = VARIANTS.get(variant, ((variant,), MODELS))
    base, points = sweep_points(package_config("state"), settings, models, (1e-3,))
    then = tuple(f"evaluate@{length}" for length in LENGTHS)
    return Sweep(base, points, seeds=(0, 1, 2, 3, 4), then=then, study="retrieval")
