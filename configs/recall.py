"""Multi-query associative recall from scratch: pairs of tokens, then each key again; its partner is the answer.

    python -m tlinformer_jax.main --config=configs/recall.py:512-64-tight --workdir=/tmp/recall --then=evaluate

The vocabulary is 8,192 (4,095 keys, 4,096 values); only answers count in the loss. Variants, named N-pairs:

    64-4, 128-8, 256-16      W_oh and W_og of 8, 16, 32: the pairs fill the first window and fit into W_oh
    512-64                   W_oh = W_og = 128, likewise
    256-32-tight             W_oh = 8, W_og = 64: 4 times as many pairs as rows of W_oh, N = 32 W_oh
    512-64-tight             W_oh = 16, W_og = 128: likewise
    1024-128-tight           W_oh = 32, W_og = 256: likewise
    128-8-grown              128-8 on shorter samples first
    256-16-grown             256-16 likewise

The first seven may end in -plus, such as 256-32-tight-plus: with `model.token_shift`, and without shorter samples
first. All but 64-4 may end in -grown-plus, such as 256-32-tight-grown-plus: with the shift, and on shorter samples
first. With the shift at least four of five TLinFormers find the answers in every setting, in 512-64, 512-64-tight and
1024-128-tight only on shorter samples first (docs/memory.md, "With the token shift").

The last six settings start on shorter samples with fewer pairs (`data.curriculum`). Without them attention learned
nothing in 512-64 at learning rates of 0.003 and 0.01, and TLinFormer nothing in 256-16. In 256-32-tight a sample of 64
tokens fills one window, so its stage does not train reading of the history. If samples of 256 followed directly, 2 of 5
seeds found the answers (64:3000@0.8), or 3 of 5 if 95% of the training answers had to be right first (64:3000@0.95).
With a stage of 128 in between that also ends by accuracy, as configured here, 5 of 5 do: 0.983 to 0.990 at rate 0.003
(docs/measurements/recall_competence_h100.json). The runs in docs/results.md had one stage of exactly 800 updates.

A 'tight' setting has more pairs than W_oh has rows, and samples far longer than W_oh. Pairs fill whole generation
windows, so no answer is in the generation window of its question; evaluations report answers in W_oh separately. A
sliding window of W_oh + W_og rows reaches all answers in every setting, since its layers pass them on.

The model has width 128, 2 blocks, H = 0 (4 layers); configs/sweep_recall.py has others, and the results. A run ends as
soon as 99% of the validation answers are right, or after 200 M tokens.
"""

import dataclasses

from ml_collections import ConfigDict

from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.experiments.recipes import Setting, chosen, set_task

RECALL = {
    # The protocol's (length, pairs); the pairs fill the first window and fit into W_oh.
    "64-4": Setting(64, 8, 8, 4),
    "128-8": Setting(128, 16, 16, 8),
    "256-16": Setting(256, 32, 32, 16),
    "512-64": Setting(512, 128, 128, 64, "64:600,128:600,256:800"),
    # Tight: 4 times as many pairs as rows of W_oh, samples 32 times as long; the pairs fill the first window.
    "256-32-tight": Setting(256, 8, 64, 32, "64:3000@0.8,128:2000@0.8"),
    "512-64-tight": Setting(512, 16, 128, 64, "64:600,128:600,256:800"),
    "1024-128-tight": Setting(1024, 32, 256, 128, "64:600,128:600,256:800,512:800"),
    # Two of the protocol's settings, on shorter samples first. They come last so that the points of sweeps keep their
    # numbers.
    "128-8-grown": Setting(128, 16, 16, 8, "64:2000"),
    "256-16-grown": Setting(256, 32, 32, 16, "64:1500,128:1500"),
}
# Shorter samples first, for runs with the token shift; the stages end by updates, so that seeds can train --together.
# They were chosen by runs of TLinFormer: with samples of 64, 128, 256 (and 512) tokens first, two of five failed in
# 512-64 and in 1024-128-tight.
SHORTER_FIRST = {
    "512-64": "64:1500",
    "256-32-tight": "64:800,128:800",
    "512-64-tight": "64:600,128:600,256:800",
    "1024-128-tight": "512:2500",
}
GROWN = {name: setting for name, setting in RECALL.items() if name.endswith("-grown")}
# Variant -> setting, whether it has the token shift, `DataConfig.curriculum`.
VARIANTS = {name: (setting, False, setting.curriculum) for name, setting in RECALL.items()}
VARIANTS |= {
    f"{name}-plus": (dataclasses.replace(RECALL[name], curriculum=""), True, "") for name in RECALL if name not in GROWN
}
VARIANTS |= {f"{name}-plus": (setting, True, setting.curriculum) for name, setting in GROWN.items()}
VARIANTS |= {f"{name}-grown-plus": (RECALL[name], True, stages) for name, stages in SHORTER_FIRST.items()}


def get_config(variant: str = "512-64-tight") -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    setting, shift, stages = chosen(VARIANTS, variant)
    config = default_config_dict()
    config.data.update(dataset="recall", tokenizer="numbers:8192", num_items=setting.pairs)
    set_task(config, setting, vocab_size=8192, width=128, tokens_per_update=32_768, learning_rate=3e-3)
    config.model.token_shift, config.data.curriculum = shift, stages
    # The recorded runs had the samples of the setting's own stages where these need more.
    needed = DataConfig(**config.data).samples_before(TrainConfig(**config.train).updates, config.train.batch_size)
    config.data.examples = max(config.data.examples, needed)
    return config
