"""Passkeys from scratch: four numbers are hidden in text and asked for at the end.

    python -m tlinformer_jax.main --config=configs/passkey.py --workdir=/tmp/passkey \
        --config.data.train_files='DIR/train-*.jsonl.xz' --config.data.validation_files=DIR/valid.jsonl.xz \
        --then=evaluate@1024,evaluate@8192,evaluate@32768

The text comes from whole books in GPT-2 tokens, and no part of it repeats within a sample; only the answer counts in
the loss. Training samples ask for all four numbers, evaluations for one. W_oh = W_og = 512; samples grow from 256 to
1,024, 2,048, 4,096 and, 701 updates before the end, 8,192 tokens, with 65,536 tokens in every update. The model has
width 256, 2 blocks, H = 0 (4 layers). A run ends as soon as 99% of the validation answers at 8,192 tokens are right, or
after 200 M tokens.

To evaluate samples longer than the held-out text, name files that are not trained on by `--config.data.test_files`,
such as one of the three shards of train_files; `--then=evaluate@1048576` hides keys in their text. TLinFormer and
TConstFormer run only the windows with answers.

Variants:

- 8k (the default);
- 8k-plus, the recipe for a long memory: W_oh = 32 and W_og = 128, so that samples of 256 tokens have numbers before
  W_oh already; keys of the history that know five tokens before theirs (`model.key_taps`), the token shift, and no slow
  rotations. Samples grow as soon as 98% of the answer tokens in training are right. It trains on 400 M tokens without
  an early end, since it improves until then;
- tiny, which hides one key in the embedded Python reference: it shows that everything works in a minute on a CPU, and
  learns nothing.

Needs: the same as configs/books.py. Result: docs/memory.md, "Passkeys": five of five runs of 8k-plus have at least
0.98 right at 8,192 tokens, 0.995 at 65,536 and 0.99 at 262,144; two were evaluated at 1,048,576 and have 0.96 and 0.95.
"""

from ml_collections import ConfigDict

from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.experiments.recipes import MEMORY, Setting, chosen, set_needles

PLUS_TOKENS = 400_000_000
PASSKEY = {
    "8k": Setting(8192, 512, 512, curriculum="256:800,1024:450,2048:500,4096:600"),
    "8k-plus": Setting(8192, 32, 128, curriculum="256:2500@0.98,1024:1500@0.98,4096:800@0.98"),
    "tiny": Setting(512, 64, 64, curriculum="256:20"),  # minutes on a CPU
}


def get_config(variant: str = "8k") -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    config = default_config_dict()
    tiny = variant == "tiny"
    set_needles(config, chosen(PASSKEY, variant), "passkey", 1 if tiny else 4, tiny)
    if variant.endswith("-plus"):
        config.model.update(MEMORY)
        _train_longer(config)
    return config


def _train_longer(config: ConfigDict) -> None:
    """Sets PLUS_TOKENS as the length of the training, without an early end."""
    updates = PLUS_TOKENS // (config.train.batch_size * config.data.sequence_length)
    config.train.update(steps=updates, warmup_steps=updates // 10, eval_every=updates // 8)
    config.data.examples = DataConfig(**config.data).samples_before(updates, config.train.batch_size)
