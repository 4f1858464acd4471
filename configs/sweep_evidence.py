"""Evidence at the paper's length: all architectures on books for several epochs, each with a learning rate of its own.

    xz -dc DIR/train-00002-of-00003.jsonl.xz | head -n -20 | xz > DIR/train-rest.jsonl.xz
    xz -dc DIR/train-00002-of-00003.jsonl.xz | tail -n 20 | xz > DIR/test.jsonl.xz
    python -m tlinformer_jax sweep --sweep=configs/sweep_evidence.py:VARIANT --out=runs/VARIANT --results=docs/results \
        --config.data.train_files='DIR/train-00000-*.xz,DIR/train-00001-*.xz,DIR/train-rest.jsonl.xz' \
        --config.data.validation_files=DIR/valid.jsonl.xz --config.data.test_files=DIR/test.jsonl.xz

Variants; models have 41M parameters, windows of 256 and N = 1,024 unless another size is named:

- rates (28 runs of 60 M tokens): four rates for each architecture. `--point=K --points=7`, K = 0 to 6, runs those of
  one. The best ones belong in RATES below before the other variants are started.
- books (the default, 18 runs of 600 M tokens, about six epochs): Base, TLinFormer, TConstFormer, sliding window, Gated
  DeltaNet, the hybrid, and no-history, a Transformer on samples of 256 tokens, which shows what a window of 256 can
  know without a history. All have the token shift, or Gated DeltaNet's convolution, except base and tlin, which show
  what it gives. base-plus, plus and causal-plus (TLinFormer with `model.causal_history`) have three seeds; base-plus
  and plus also have one run without dropout.
- long (7 runs of 300 M tokens): N = 8,192, also evaluated in samples of 65,536 tokens: Base, TLinFormer with windows of
  256 and of 1,024, sliding window, Gated DeltaNet, and TLinFormer with a causal history and both windows.
- 8k (5 runs of 200 M tokens, without dropout): Base, TLinFormer, TLinFormer with a causal history and the sliding
  window of `long`, and TLinFormer without the token shift.
- large (3 runs of 300 M tokens): Base and TLinFormer in the shape of configs/large.py:125m, N = 2,048.
- knee (5 runs of 300 M tokens): TLinFormer with a causal history and five shares of W_oh in W_oh + W_og = 512.
  --seeds=0,1 marks the knee.
- gap (6 runs of 200 M tokens): why Base is better after 600 M tokens: base-plus, plus, causal-plus, causal-plus with
  W_oh = 512, the sliding window, no-history.
- tiny (2 runs): Base and TLinFormer on the Python reference that comes with CPython, minutes on a CPU.

An update has 65,536 tokens: with larger ones there are fewer updates in which to learn to copy. Dropout (0.1), weight
decay and clipping are those of configs/books.py. The schedule is wsd:0.2, whose rate stays the same until the last
fifth, so that losses before it show each model's trend; under a cosine they also show how far the rate has fallen.

Rates, windows and options are chosen by the validation split, the five books of valid.jsonl.xz. Figures to report are
those of the test split, the last 20 books of the third shard, which the lines above take out of the training text.
rates has no actions, so it does not read the test split; `evaluate` of the others reports both. `history` is measured
on the validation split; --then=evaluate,history,samples adds texts.

A run that was stopped continues from its last checkpoint when the same command is run again. There are ten, and SIGTERM
saves another.

Needs: the same as configs/books.py. Result: docs/quality.md, "Six epochs of books" (points 0, 4, 5 and 15 of `books`:
after 600 M tokens a Transformer is better, with a causal history by less) and "Learning rates for six epochs" (9 points
of `rates`), and "Samples of 8,192 tokens" (`8k`, point 0 with two seeds). "Six epochs" also has base-plus, plus,
causal-plus and causal-plus-512 of `gap`, by an experimental version; there and in point 15 the causal history has an
earlier definition. The rest is not measured yet.
"""

from collections.abc import Mapping
from typing import Any

from tlinformer_jax.experiments.plan import Sweep
from tlinformer_jax.experiments.recipes import (
    TEXT_MODELS,
    books_config,
    chosen,
    package_config,
    row_points,
    tiny_config,
    window_fields,
)

# Peak learning rates. `rates` has chosen 2e-3 for base and plus, among three rates. The other 41M models have the same
# until their own are measured, so comparisons with them are provisional. base stands for base-plus and no-history.
# The rates of `large`, and of `long` with its samples of 8,192 tokens, are not measured.
RATES = {
    "base": 2e-3,
    "base-plus": 2e-3,
    "no-history": 2e-3,
    "tlin": 2e-3,
    "plus": 2e-3,
    "causal-plus": 2e-3,
    "tconst-plus": 2e-3,
    "sliding-plus": 2e-3,
    "delta": 2e-3,
    "hybrid": 2e-3,
    "125m-base-plus": 1e-3,
    "125m-plus": 1e-3,
    "125m-causal-plus": 1e-3,
}
TRIED = (3e-4, 6e-4, 1e-3, 2e-3)
RATED = ("base", "tlin", "plus", "tconst-plus", "sliding-plus", "delta", "hybrid")
# Variant -> training tokens of a run, and actions after it.
VARIANTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "rates": (60_000_000, ()),
    "books": (600_000_000, ("evaluate", "history")),
    "long": (300_000_000, ("evaluate", "evaluate@65536", "history")),
    "8k": (200_000_000, ("evaluate", "evaluate@65536", "history")),
    "large": (300_000_000, ("evaluate", "history")),
    "knee": (300_000_000, ("evaluate", "history")),
    "gap": (200_000_000, ("evaluate", "history")),
    "tiny": (0, ("evaluate", "history")),
}
SCHEDULE, DROPOUT = "wsd:0.2", 0.1
TOKENS_PER_UPDATE = 65_536
COMPARED = ("base-plus", "plus")
CAUSAL = "causal-plus"
HISTORIES = (64, 128, 256, 384, 448)  # W_oh of `knee`
SHAPE = ("vocab_size", "d_model", "num_heads", "num_blocks", "hidden_depth")
# Name of a point -> row of `config.recipes`, and the fields that differ from it.
Rows = dict[str, tuple[str, dict[str, Any]]]


def get_sweep(variant: str = "books") -> Sweep:
    """Returns the sweep; --config.SECTION.FIELD=VALUE sets fields that its points do not set."""
    tokens, then = chosen(VARIANTS, variant)
    if variant == "tiny":
        base, points = tiny_config(), {name: TEXT_MODELS[name] for name in COMPARED}
    else:
        base, points = row_points(lambda row: books_config(row, tokens, TOKENS_PER_UPDATE), _rows(variant))
    base.model.dropout, base.train.schedule = DROPOUT, SCHEDULE
    return Sweep(base, points, then=then, study="windows" if variant == "knee" else "architectures")


def _rows(variant: str) -> Rows:
    no_history = _model("base-plus", {"train.learning_rate": RATES["no-history"]}, row="base-256")
    if variant == "rates":
        return {
            f"1k-{name}-lr{rate:g}": _model(name, {"train.learning_rate": rate}) for rate in TRIED for name in RATED
        }
    if variant == "long":
        rows = {f"8k-{name}": _model(name, row="8k-512-0.5") for name in ("base-plus", "plus", "sliding-plus", "delta")}
        rows |= {"8k-plus-1024": _model("plus", row="8k-2k-0.5"), f"8k-{CAUSAL}": _model(CAUSAL, row="8k-512-0.5")}
        return rows | {f"8k-{CAUSAL}-1024": _model(CAUSAL, row="8k-2k-0.5")}
    if variant == "8k":
        names = (*COMPARED, CAUSAL, "sliding-plus", "tlin")
        return {f"8k-200m-{name}": _model(name, {"model.dropout": 0.0}, row="8k-512-0.5") for name in names}
    if variant == "large":
        model = package_config("large")("125m").model
        shape = {f"model.{field}": model[field] for field in SHAPE}
        names = {f"125m-{name}": name for name in (*COMPARED, CAUSAL)}
        return {
            point: _model(name, shape | {"train.learning_rate": RATES[point]}, row="2k-512-0.5")
            for point, name in names.items()
        }
    if variant == "gap":
        rows = {name: _model(name) for name in (*COMPARED, CAUSAL, "sliding-plus")}
        rows |= {"no-history": no_history, f"{CAUSAL}-512": _model(CAUSAL, window_fields(512, 256))}
        return {f"gap-{name}": row for name, row in rows.items()}
    if variant == "knee":
        return {f"1k-{size}-{512 - size}": _model(CAUSAL, window_fields(size, 512 - size)) for size in HISTORIES}
    seeds = {"train.seed": (0, 1, 2)}
    others = [name for name in TEXT_MODELS if name != CAUSAL]
    rows = {f"1k-{name}": _model(name, seeds if name in COMPARED else {}) for name in others}
    rows["1k-no-history"] = no_history
    rows |= {f"1k-{name}-dropout0": _model(name, {"model.dropout": 0.0}) for name in COMPARED}
    return rows | {f"1k-{CAUSAL}": _model(CAUSAL, seeds)}  # last, since commands name points by their numbers


def _model(name: str, fields: Mapping[str, Any] = {}, row: str = "1k-512-0.5") -> tuple[str, dict[str, Any]]:
    return row, TEXT_MODELS[name] | {"train.learning_rate": RATES[name]} | dict(fields)
