"""Passkeys by architecture: trained to 8,192 tokens, evaluated from 256 to 65,536, for the heat maps of the report.

    python -m tlinformer_jax sweep --sweep=configs/sweep_passkey.py --out=runs/passkey --results=docs/results \
        --config.data.train_files='DIR/train-*.jsonl.xz' --config.data.validation_files=DIR/valid.jsonl.xz

Variants: 8k (the default, 12 cells: 4 architectures at 3 learning rates); tlin, only its TLinFormers; plus,
configs/passkey.py:8k-plus with five seeds, and with two seeds each without one of its options or all, with three taps,
windows of 256 or an overlap, for attention, and with a causal history; tiny, two cells on the embedded Python
reference, minutes on a CPU.
Attention is too slow at the two longest lengths of plus: `--point=K --then=evaluate@8192,evaluate@65536` trains it
alone.

The task and windows are those of configs/passkey.py; all models have width 256, 4 heads and 4 layers. Each length has
200 samples, 10 at each of 20 depths, with text from books that no training sample uses.

Result: docs/results.md, the four architectures at the learning rate 0.001, one seed, each 4 to 5 minutes on an H200
that it shared with six or seven others. At 8,192 tokens TLinFormer has 0.985 right and attention 0.940; TConstFormer
and the sliding window find no number before both windows. At 32,768 tokens TLinFormer has 0.255 right, nearly all of
them in the last 10,000 tokens. At rate 0.003 TLinFormer was worse (0.305 after 1,905 updates, two thirds of a run
without a record). Not measured: 0.0003. Of plus: docs/memory.md, "Passkeys", where most points beside
8k-plus are from a branch. Not measured: the second seeds with an overlap, of attention and with a causal history.
"""

from typing import Any

from tlinformer_jax.experiments.plan import Sweep
from tlinformer_jax.experiments.recipes import package_config, sweep_points, window_fields

MODELS = ("tlin-4", "tconst-4", "attention-4", "sliding-4")
LENGTHS = (256, 1024, 4096, 8192, 16384, 32768, 65536)
FAR = (8192, 65_536, 262_144, 1_048_576)
ROTATED, UNSHIFTED, UNTAPPED = {"model.longest_wavelength": 0}, {"model.token_shift": False}, {"model.key_taps": 0}
# Fields that differ from 8k-plus.
PLUS: dict[str, dict[str, Any]] = {
    "8k-plus": {"train.seed": (0, 1, 2, 3, 4)},
    "8k-plus-taps-3": {"model.key_taps": 3},
    "8k-plus-untapped": UNTAPPED,
    "8k-plus-unshifted": UNSHIFTED,
    "8k-plus-rotated": ROTATED,
    "8k-plus-windows-256": window_fields(256, 256),
    "8k-plus-overlap-16": {"model.window_overlap": 16},
    "8k-plus-none": UNTAPPED | UNSHIFTED | ROTATED,
    "8k-plus-attention": UNTAPPED | {"model.architecture": "transformer"},
    "8k-plus-causal": {"model.causal_history": True},  # last, since commands name points by their numbers
}


def get_sweep(variant: str = "8k") -> Sweep:
    """Returns the sweep; --config.SECTION.FIELD=VALUE sets fields that its points do not set."""
    if variant == "tiny":
        base, points = sweep_points(package_config("passkey"), ("tiny",), MODELS[:2], (3e-3,))
        return Sweep(base, points, then=("evaluate@256", "evaluate@512", "evaluate@1024"), study="retrieval")
    if variant == "plus":
        then = tuple(f"evaluate@{length}" for length in FAR)
        return Sweep(package_config("passkey")("8k-plus"), PLUS, seeds=(0, 1), then=then, study="retrieval")
    settings, models = ("8k", MODELS[:1]) if variant == "tlin" else (variant, MODELS)
    base, points = sweep_points(package_config("passkey"), (settings,), models, (3e-4, 1e-3, 3e-3))
    return Sweep(base, points, then=tuple(f"evaluate@{length}" for length in LENGTHS), study="retrieval")
