"""Segment copy from scratch: random symbols, a mark, and the same symbols again, all of which are answers.

    python -m tlinformer_jax.main --config=configs/copy.py:256-tight --workdir=/tmp/copy --then=evaluate

There are 16 symbols; a segment has N / 2. Variants, named after N:

    128         W_oh = W_og = 64: W_oh contains the whole segment
    256-tight   W_oh = W_og = 32: the source is 129 tokens back, further than both windows together
    512-tight   W_oh = 32, W_og = 64: the source is 257 tokens back

The model has width 128, 2 blocks, H = 0 (4 layers); configs/sweep_copy.py has others. A run ends as soon as 99% of the
validation answers are right, or after 200 M tokens.
"""

from ml_collections import ConfigDict

from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.experiments.recipes import Setting, chosen, set_task

COPY = {
    "128": Setting(128, 64, 64),  # W_oh contains the whole segment
    "256-tight": Setting(256, 32, 32),  # half of the segment is more than both windows
    "512-tight": Setting(512, 32, 64),
}


def get_config(variant: str = "256-tight") -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    config = default_config_dict()
    config.data.update(dataset="copy", tokenizer="numbers:17")
    set_task(config, chosen(COPY, variant), vocab_size=17, width=128, tokens_per_update=32_768, learning_rate=1e-3)
    return config
