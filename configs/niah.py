"""Needles in a haystack from scratch, the tasks of RULER: a sentence hidden in a long text, asked for at the end.

    python -m tlinformer_jax.main --config=configs/niah.py:s1-4k --workdir=/tmp/niah --then=evaluate,evaluate@16384
    python -m tlinformer_jax.main --config=configs/niah.py:mk-4k --workdir=/tmp/niah \
        --config.data.train_files='DIR/train-*.jsonl.xz' --config.data.validation_files=DIR/valid.jsonl.xz

Variants, KIND-LENGTH:

    s1    S-NIAH-1: a few repeated short sentences with "The special magic number for WORD is" and seven digits
    s2    S-NIAH-2: the same among books
    s3    S-NIAH-3: the value has the 32 hexadecimal digits of a UUID
    mk    MK-NIAH: four such sentences of seven digits among books; training asks for all, evaluation for one
    1k    N = 1,024, W_oh = W_og = 128
    4k    N = 4,096, W_oh = W_og = 256
    16k   N = 16,384, W_oh = W_og = 512

KIND-LENGTH-plus has the options and windows of configs/passkey.py:8k-plus (W_oh = 32, W_og = 128). s1-1k is the
default; tiny is s1 in 512 bytes, a minute on a CPU. s1 generates its text and reads no files. The others read books;
with --config.data.train_files= --config.data.validation_files= they use the embedded Python reference instead, which is
long enough for 1k and 4k.

Samples start with 256 tokens and grow as soon as 90% (plus: 98%) of the answer tokens in training are right. The model
has width 256, 2 blocks, H = 0 (4 layers). A run ends as soon as 99% of the validation answers are right, or after 200 M
tokens.

Needs: the same as configs/books.py; s1 needs no files. Result: configs/sweep_niah.py.
"""

from ml_collections import ConfigDict

from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.experiments.recipes import MEMORY, Setting, chosen, set_needles

# Each stage ends as soon as enough training answers are right.
LENGTHS = {
    "tiny": Setting(512, 64, 64, curriculum="256:20"),
    "1k": Setting(1024, 128, 128, curriculum="256:1000@0.9"),
    "4k": Setting(4096, 256, 256, curriculum="256:1000@0.9,1024:500@0.9"),
    "16k": Setting(16384, 512, 512, curriculum="256:1000@0.9,1024:500@0.9,4096:400@0.9"),
}
# W_oh = 32: samples of 256 tokens have needles before it.
PLUS = {
    "1k": Setting(1024, 32, 128, curriculum="256:1500@0.98"),
    "4k": Setting(4096, 32, 128, curriculum="256:1500@0.98,1024:500@0.98"),
    "16k": Setting(16384, 32, 128, curriculum="256:1500@0.98,1024:500@0.98,4096:400@0.98"),
}
KINDS = {"s1": ("niah-1", 1), "s2": ("niah-2", 1), "s3": ("niah-3", 1), "mk": ("niah-2", 4)}  # dataset, needles
SETTINGS = LENGTHS | {f"{length}-plus": setting for length, setting in PLUS.items()}
VARIANTS = {f"{kind}-{name}": (kind, name) for kind in KINDS for name in SETTINGS if name != "tiny"}
VARIANTS["tiny"] = ("s1", "tiny")


def get_config(variant: str = "s1-1k") -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    config = default_config_dict()
    kind, name = chosen(VARIANTS, variant)
    set_needles(config, SETTINGS[name], *KINDS[kind], tiny=variant == "tiny")
    if name.endswith("-plus"):
        config.model.update(MEMORY)
    return config
