"""TLinFormer's comparators, trained the same way: Gated DeltaNet, its hybrid, and mixtures of experts.

    python -m tlinformer_jax sweep --sweep=configs/sweep_comparators.py:recall --seeds=0,1,2,3,4 --together \
        --out=runs/comparators_recall --results=docs/results
    python -m tlinformer_jax sweep --sweep=configs/sweep_comparators.py:books --out=runs/comparators \
        --results=docs/results \
        --config.data.train_files='DIR/train-*.jsonl.xz' --config.data.validation_files=DIR/valid.jsonl.xz

Gated DeltaNet, also in the hybrid, has a short convolution before queries, keys and values; all others have the token
shift.

- recall (18 cells): Gated DeltaNet and the hybrid in the nine settings of configs/recall.py, shorter samples first only
  where the setting is named so. configs/sweep_recall.py:plus has the other models.
- passkey (12 runs): configs/passkey.py:8k-plus, TLinFormer, attention, Gated DeltaNet and the hybrid, three seeds; only
  TLinFormer has the key taps. No run ends before its 400 M tokens. Attention and the hybrid compute much at the longest
  lengths: `--point=K --then=...` trains one of them with others.
- books (5 runs): 41M models after 100 M tokens of books in samples of 1,024: Base, TLinFormer (256/256), sliding window
  of 512, Gated DeltaNet, the hybrid. Updates have 65,536 tokens, the rate is 0.001, and there is no dropout.
- experts (4 runs): Base and TLinFormer of books, but with 8 experts in each layer, half as wide as its feed-forward,
  two for each token (moe: as many active parameters as in books, 81M in all); and with a feed-forward four times as
  wide (wide: dense, as many parameters as moe in all).
- tiny (6 runs): a Transformer, TLinFormer, Gated DeltaNet, the hybrid, and TLinFormer as moe and wide, on the Python
  reference that comes with CPython. About a minute a run on a busy two-core CPU, most of it compilation.

Needs: the same as configs/books.py. Result: docs/quality.md, "Five models and experts", for books and experts, one seed
each, 3 to 11 minutes a run on an H200 that it shared with others; docs/memory.md, "Recall", for all cells, three seeds
each, and "Gated DeltaNet beside attention" for one seed of each model with an earlier 8k-plus (windows of 256, no key
taps, 200 M tokens). Not measured: passkey with today's. On an NVIDIA GPU install the extra linear-attention: without it
Gated DeltaNet is plain JAX, with three times as many kernels (docs/performance.md, "Several seeds in one program").
"""

from tlinformer_jax.errors import ConfigError
from tlinformer_jax.experiments.plan import Sweep
from tlinformer_jax.experiments.recipes import (
    COMPARATORS,
    TEXT_MODELS,
    one_epoch_config,
    package_config,
    sweep_points,
    tiny_config,
)

TOKENS = 100_000_000
RECALL = ("64-4-plus", "128-8-plus", "256-16-plus", "512-64-plus")
TIGHT = ("256-32-tight-plus", "512-64-tight-plus", "1024-128-tight-plus")
GROWN = ("128-8-grown", "256-16-grown")
FAR = (8192, 65_536, 262_144, 1_048_576)
# Name of the point -> fields that differ from row 1k-512-0.5 of `config.recipes`.
BOOKS = {
    "base-1k-plus": TEXT_MODELS["base-plus"],
    "1k-512-0.5-plus": TEXT_MODELS["plus"],
    "sliding-1k-512-plus": TEXT_MODELS["sliding-plus"],
    "delta-1k": TEXT_MODELS["delta"],
    "hybrid-1k": TEXT_MODELS["hybrid"],
}
EXPERTS = {
    "moe": {"model.num_experts": 8, "model.experts_per_token": 2, "model.d_ff": 640},
    "wide": {"model.d_ff": 5120},
}
TINY = ("transformer", "tlinformer", "gated_deltanet", "gated_deltanet_hybrid")


def get_sweep(variant: str = "books") -> Sweep:
    """Returns the sweep; --config.SECTION.FIELD=VALUE sets fields that its points do not set."""
    if variant == "recall":
        settings = (*RECALL, *TIGHT, *GROWN)
        base, points = sweep_points(package_config("recall"), settings, tuple(COMPARATORS), (3e-3,))
        return Sweep(base, points, then=("evaluate",), study="retrieval")
    if variant == "passkey":
        models = ("tlin-4", "attention-4", *COMPARATORS)
        base, points = sweep_points(package_config("passkey"), ("8k-plus",), models, (1e-3,))
        then = tuple(f"evaluate@{length}" for length in FAR)
        return Sweep(base, points, seeds=(0, 1, 2), then=then, study="retrieval")
    if variant == "tiny":
        dense = {name: {"model.architecture": name} for name in TINY}
        return Sweep(tiny_config(), dense | {"moe": EXPERTS["moe"] | {"model.d_ff": 32}, "wide": {"model.d_ff": 256}})
    models = {
        "books": BOOKS,
        "experts": {
            f"{name}-{kind}": fields | experts
            for kind, experts in EXPERTS.items()
            for name, fields in list(BOOKS.items())[:2]
        },
    }
    if variant not in models:
        raise ConfigError("variant", variant, "must be one of books, experts, passkey, recall, tiny")
    return Sweep(one_epoch_config("1k-512-0.5", TOKENS), models[variant], then=("evaluate",), study="architectures")
