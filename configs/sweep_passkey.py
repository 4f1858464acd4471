"""Passkeys by architecture: trained to 8,192 tokens, evaluated from 256 to 65,536, for the heat maps of the report.

    python -m tlinformer_jax sweep --sweep=configs/sweep_passkey.py --out=runs/passkey --results=docs/results \
        --config.data.train_files='DIR/train-*.jsonl.xz' --config.data.validation_files=DIR/valid.jsonl.xz

Variants: 8k (the default, 12 cells: 4 architectures at 3 learning rates); tlin, only its TLinFormers; tiny, two cells
on the embedded Python reference, minutes on a CPU.

The task and windows are those of configs/passkey.py; all models have width 256, 4 heads and 4 layers. Each length has
200 samples, 10 at each of 20 depths, with text from books that no training sample uses.

Result: docs/results.md, the four architectures at the learning rate 0.001, one seed, each 4 to 5 minutes on an H200
that it shared with six or seven others. At 8,192 tokens TLinFormer has 0.985 right and attention 0.940; TConstFormer
and the sliding window find no number before both windows. At 32,768 tokens TLinFormer has 0.255 right, nearly all of
them in the last 10,000 tokens. At rate 0.003 TLinFormer was worse (0.305 after 1,905 updates, two thirds of a run
without a record). Not measured: 0.0003.
"""

from tlinformer_jax.experiments.plan import Sweep
from tlinformer_jax.experiments.recipes import package_config, sweep_points

MODELS = ("tlin-4", "tconst-4", "attention-4", "sliding-4")
LENGTHS = (256, 1024, 4096, 8192, 16384, 32768, 65536)


def get_sweep(variant: str = "8k") -> Sweep:
    """Returns the sweep; --config.SECTION.FIELD=VALUE sets fields that its points do not set."""
    if variant == "tiny":
        base, points = sweep_points(package_config("passkey"), ("tiny",), MODELS[:2], (3e-3,))
        return Sweep(base, points, then=("evaluate@256", "evaluate@512", "evaluate@1024"), study="retrieval")
    settings, models = ("8k", MODELS[:1]) if variant == "tlin" else (variant, MODELS)
    base, points = sweep_points(package_config("passkey"), (settings,), models, (3e-4, 1e-3, 3e-3))
    return Sweep(base, points, then=tuple(f"evaluate@{length}" for length in LENGTHS), study="retrieval")
