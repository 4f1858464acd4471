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

Variants: 8k (the default); 8k-plus, with the token shift, without slow rotations and with W_oh = W_og = 256, whose
samples grow as soon as 90% of the answer tokens in training are right; tiny, which hides one key in the embedded Python
reference and takes minutes on a CPU.

Needs: the same as configs/books.py. Result: configs/sweep_passkey.py; a run of 8k-plus has 0.955 right at 8,192 tokens,
0.925 at 65,536, 0.880 at 262,144 and 0.805 at 1,048,576 (docs/measurements/passkey_wavelengths_h200.json). Another run
with the same seed did not learn to read before W_oh: 0.055 at 8,192 tokens (docs/results.md).
"""

from ml_collections import ConfigDict

from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.experiments.recipes import Setting, chosen, set_needles

PASSKEY = {
    "8k": Setting(8192, 512, 512, curriculum="256:800,1024:450,2048:500,4096:600"),
    # Shorter windows: in samples of 1,024 tokens or more, most keys are before W_oh.
    "8k-plus": Setting(8192, 256, 256, curriculum="256:500@0.9,1024:800@0.9,4096:500@0.9"),
    "tiny": Setting(512, 64, 64, curriculum="256:20"),  # minutes on a CPU
}


def get_config(variant: str = "8k") -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    config = default_config_dict()
    tiny = variant == "tiny"
    set_needles(config, chosen(PASSKEY, variant), "passkey", 1 if tiny else 4, tiny)
    if variant.endswith("-plus"):
        config.model.token_shift = True
        config.model.longest_wavelength = 64
    return config
