"""State tracking: the product of all group elements so far at every position, also in longer samples than trained on.

    python -m tlinformer_jax.main --config=configs/state.py:s5-64 --workdir=/tmp/state \
        --then=evaluate,evaluate@128,evaluate@256,evaluate@1024

Variants, GROUP-LENGTH, where LENGTH is that of the longest training sample:

    parity-64, parity-256   two elements: is the number of ones so far odd?
    s5-64, s5-256           the 120 permutations of five things
    tiny                    parity at 32, a minute on a CPU

W_oh = W_og = 16 at 64 and 32 at 256. Samples start with 16 (parity) or 8 tokens and grow as soon as 95% of the training
labels are right. The model has width 128, 2 blocks, H = 0 (4 layers). A run ends as soon as 99% of the validation
labels are right, or after 200 M tokens. The report has the share of right labels by length and by position.

Result: configs/sweep_state.py.
"""

from ml_collections import ConfigDict

from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.experiments.recipes import Setting, chosen, set_task, shorten

STATE = {
    "parity-64": Setting(64, 16, 16, curriculum="16:1000@0.95,32:1000@0.95"),
    "parity-256": Setting(256, 32, 32, curriculum="16:1000@0.95,32:1000@0.95,64:1000@0.95,128:1000@0.95"),
    "s5-64": Setting(64, 16, 16, curriculum="8:1000@0.95,16:1000@0.95,32:1000@0.95"),
    "s5-256": Setting(256, 32, 32, curriculum="8:1000@0.95,16:1000@0.95,32:1000@0.95,64:1000@0.95,128:1000@0.95"),
    "tiny": Setting(32, 8, 8, curriculum="16:20"),
}


def get_config(variant: str = "parity-64") -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    setting, tiny = chosen(STATE, variant), variant == "tiny"
    dataset = "s5" if variant.startswith("s5") else "parity"
    vocabulary = {"parity": 4, "s5": 240}[dataset]
    width, tokens = (32, 4_096) if tiny else (128, 32_768)
    config = default_config_dict()
    config.data.update(dataset=dataset, tokenizer=f"numbers:{vocabulary}")
    set_task(config, setting, vocabulary, width, tokens_per_update=tokens, learning_rate=1e-3)
    if tiny:
        shorten(config, 40)
    return config
