"""State tracking: at every position the product of all elements of a group so far, at lengths never trained on as well.

    python -m tlinformer_jax.main --config=configs/state.py:s5-64 --workdir=/tmp/state \
        --then=evaluate,evaluate@128,evaluate@256,evaluate@1024

Variants, GROUP-LENGTH, where LENGTH is the longest sample that is trained on:

    parity-64, parity-256   two elements: whether the number of ones so far is odd
    s5-64, s5-256           the 120 permutations of five things
    tiny                    parity at 32, a minute on a CPU

W_oh = W_og = 16 at 64 and 32 at 256. Samples grow from 16 (parity) or 8 tokens on, each time as soon as 95% of
training's labels are right. The model has width 128, 2 blocks, H = 0 (4 layers). A run ends as soon as 99% of the
validation's labels are right, after 200 M tokens at the latest. The report has the share of right labels by length and
by position.

Result: not yet measured.
"""

from ml_collections import ConfigDict

from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.experiments import recipes as retrieval_recipes


def get_config(variant: str = "parity-64") -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    config = default_config_dict()
    retrieval_recipes.set_state(config, variant)
    return config
