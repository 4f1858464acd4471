"""Recall by architecture at equal depth: four settings of the protocol and three tight ones, three learning rates.

    python -m tlinformer_jax sweep --sweep=configs/sweep_recall.py:512-64-tight --out=runs/recall --results=docs/results
    python -m tlinformer_jax sweep --sweep=configs/sweep_recall.py --out=runs/recall --results=docs/results
    python -m tlinformer_jax sweep --sweep=configs/sweep_recall.py:seeds --out=runs/recall_seeds --seeds=0,1,2 \
        --results=docs/results

Variants:

- the name of a setting of configs/recall.py runs its 27 cells; the default runs all nine settings (243 cells);
- seeds: the three tight settings at one learning rate, because their results are close;
- plus: all nine settings with the token shift, and TLinFormer also without it; each architecture has 4 layers and one
  rate, and only the settings called grown start on shorter samples;
- plus-grown: TLinFormer with the token shift in the other four settings, on shorter samples first. In 512-64 these are
  samples of 64 tokens only, in 1024-128-tight of 512: with samples of 64, 128, 256 (and 512) tokens first, two of five
  runs failed in each (docs/memory.md);
- plus-causal: TLinFormer with the token shift and model.causal_history in all nine settings;
- causal: the same without the token shift;
- tiny: 2 cells of a minute each on a CPU; TLinFormer stops after 200 updates, before it finds the answers.

Controls are chance (H_P / P for P pairs, shown in the figures), attention, TConstFormer and sliding window. TLinFormer
with B = 2 and H = 0 is compared with 4 layers of attention, with H = 1 with 6. attention-2 checks the setup: it must
find 99% in the protocol's settings. All have width 128 and 2 heads. A cell ends at 99%, or after 200 M tokens (6,103
updates of 32,768 tokens); the record says which. An override of train.steps must repeat the @0.99.

Cells are so small that several can share a device: run eight processes with XLA_PYTHON_CLIENT_PREALLOCATE=false and
--point=K --points=8, K = 0 .. 7; docs/performance.md has their times. Seeds and rates of a cell run as one program with
--together, unless one of its stages ends by accuracy:

    python -m tlinformer_jax sweep --sweep=configs/sweep_recall.py:plus --seeds=0,1,2,3,4 --together --out=runs/plus

A sliding window of W_oh + W_og rows can pass an answer on: one of its four layers joins key and value, and the others
carry them at most 3 (W_oh + W_og) tokens, which is all of N in 512-64 and 0.75 N to 0.84 N in the others.

Result: docs/results.md, 63 runs of models of 4 layers and of attention-2, all at the learning rate 0.003 except nine of
512-64-tight at 0.001; one seed, three of attention, TLinFormer and the sliding window in 256-32-tight and 512-64-tight.
Not measured: the models of 6 layers, other rates, further seeds in 1024-128-tight, attention-2 there and on grown
samples of 128 and 256. Of plus: attention in all nine settings and TLinFormer in 64-4, 128-8, 256-16 and the two called
grown, five seeds; the sliding window in all, TConstFormer in all but 64-4, 128-8 and 256-16, and TLinFormer without the
shift in all but 64-4 and 256-16, three seeds. The other cells were stopped
(docs/measurements/recall_stopped_h200.json). plus-grown and plus-causal: all, five seeds. causal: 64-4, 128-8 and
128-8-grown, three seeds; 256-16 was stopped.
"""

from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.experiments.plan import Sweep
from tlinformer_jax.experiments.recipes import MODELS, chosen, package_config, sweep_points

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
TIGHT = ("256-32-tight", "512-64-tight", "1024-128-tight")
SETTINGS = ("64-4", "128-8", "256-16", "512-64", *TIGHT)
GROWN = ("128-8-grown", "256-16-grown")
PLUS = tuple(f"{setting}-plus" for setting in (*SETTINGS, *GROWN))
PLUS_GROWN = tuple(f"{setting}-grown-plus" for setting in ("512-64", *TIGHT))
# Variant -> settings of configs/recall.py, which are variants themselves.
VARIANTS = {"all": (*SETTINGS, *GROWN), "seeds": TIGHT, "plus": PLUS, "plus-grown": PLUS_GROWN}
VARIANTS |= {"plus-causal": PLUS, "causal": (*SETTINGS, *GROWN), "tiny": ()}
VARIANTS |= {setting: (setting,) for setting in (*SETTINGS, *GROWN, *PLUS, *PLUS_GROWN)}
# Variant with one learning rate -> its models.
MODELS_OF = {
    "seeds": tuple(MODELS)[1:],
    "plus-grown": ("tlin-4",),
    "plus-causal": ("causal-4",),
    "causal": ("causal-4",),
}


def get_sweep(variant: str = "all") -> Sweep:
    """Returns the sweep; --config.SECTION.FIELD=VALUE sets fields that its points do not set."""
    settings, models, rates = chosen(VARIANTS, variant), tuple(MODELS), LEARNING_RATES
    if variant in BUILT:
        return BUILT[variant]()
    if variant in MODELS_OF:
        models, rates = MODELS_OF[variant], (3e-3,)
    base, points = sweep_points(package_config("recall"), settings, models, rates)
    return Sweep(base, points, then=("evaluate",), study="retrieval")


def _plus() -> Sweep:
    """Returns each setting with the token shift, shorter samples first only in GROWN; TLinFormer also without it."""
    models = [name for name in MODELS if name.endswith("-4")]
    base, points = sweep_points(package_config("recall"), PLUS, models, (3e-3,))
    plain = {"model.token_shift": False}
    points |= {name.replace("-plus", "-plain"): fields | plain for name, fields in points.items() if "_tlin-4" in name}
    return Sweep(base, points, then=("evaluate",), study="retrieval")


def _tiny() -> Sweep:
    """Returns two pairs among 64 ids, where attention finds the answers within about 700 updates."""
    config = default_config_dict()
    config.model.update(architecture="transformer", vocab_size=64, d_model=64, num_heads=2, d_ff=128)
    config.model.update(num_blocks=1, hidden_depth=0, history_window=4, generation_window=4)
    config.train.update(steps="1500@0.99", batch_size=64, warmup_steps=100, schedule="cosine:0.1", learning_rate=2e-3)
    config.train.update(log_every=100, eval_every=100, checkpoint_every=500, weight_decay=0.0)
    config.data.update(dataset="recall", tokenizer="numbers:64", sequence_length=16, num_items=2)
    config.data.examples = 1500 * 64
    windows = {"model.architecture": "tlinformer", "train.steps": "200@0.99"}
    return Sweep(config, {"16-2_attention-2": {}, "16-2_tlin-2": windows}, then=("evaluate",), study="retrieval")


BUILT = {"plus": _plus, "tiny": _tiny}
