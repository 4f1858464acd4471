"""Larger TLinFormers on books in GPT-2 tokens: 125M, 350M and 1.3B parameters.

    python -m tlinformer_jax.main --config=configs/large.py:125m --workdir=/tmp/125m \
        --config.data.train_files='DIR/train-*.jsonl.xz' --config.data.validation_files=DIR/valid.jsonl.xz
    python -m tools.training_topology --topology=v5e:16x16 --config=configs/large.py:1b3

Variants, each with the accelerator that its mesh is for:

    name   width  heads x width  layers  N      windows    an update           accelerator
    125m   768    12 x 64        12      2,048  256 + 256  256 x 2,048 tokens  one v5e-8 or one H100 (the default)
    350m   1,024  16 x 64        24      2,048  256 + 256  256 x 2,048 tokens  v5e:4x4
    1b3    2,048  16 x 128       24      8,192  512 + 512  256 x 8,192 tokens  v5e:16x16

The vocabulary is GPT-2's 50,257 entries padded to 50,304, a multiple of 128; the other 47 never occur. Training uses
about 20 tokens per parameter. On other machines, change --config.train.mesh and --config.train.accumulation.
--check_compile prints the memory of a step, and tools.training_topology does so for TPUs that you do not have.

Needs: `pip install "tlinformer-jax[data]"`; files of JSON lines, plain, .gz, .xz or .zst.
tools.training_topology also needs `pip install "tlinformer-jax[tpu]"` in an environment of its own, on Linux on x86-64.
Result: none has been trained. A step of 1b3, compiled for v5e:16x16, takes 9.55 GiB a chip (docs/performance.md) with
scanned layers and the history in one segment, as configured here. On an H200 with model.memory=auto, 32 samples of
125m take 23 GB, and 16 of 350m 48 GB when three windows are computed at a time; the speed of "low" was not compared.
"""

from ml_collections import ConfigDict

from tlinformer_jax.config import recipes
from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.errors import ConfigError

# Four layers per block.
SHAPES = {
    "125m": {"d_model": 768, "num_heads": 12, "num_blocks": 3},
    "350m": {"d_model": 1024, "num_heads": 16, "num_blocks": 6},
    "1b3": {"d_model": 2048, "num_heads": 16, "num_blocks": 6},
}
WINDOWS = {"125m": 256, "350m": 256, "1b3": 512}
LENGTHS = {"125m": 2048, "350m": 2048, "1b3": 8192}
# Updates, peak learning rate, micro-batches per update.
TRAINING = {"125m": (4_800, 6e-4, 8), "350m": (13_800, 3e-4, 4), "1b3": (12_800, 2e-4, 1)}
MESHES = {"125m": "", "350m": "fsdp=4", "1b3": "fsdp=16"}


def get_config(variant: str = "125m") -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    if variant not in SHAPES:
        raise ConfigError("variant", variant, f"must be one of {', '.join(SHAPES)}")
    config = default_config_dict()
    recipes.set_books(config)
    config.data.sequence_length = LENGTHS[variant]
    window = WINDOWS[variant]
    config.model.update(
        vocab_size=50304,
        hidden_depth=2,
        history_window=window,
        generation_window=window,
        dropout=0.0,
        memory="auto" if variant == "1b3" else "low",
        **SHAPES[variant],
    )
    updates, rate, accumulation = TRAINING[variant]
    config.train.update(
        steps=updates,
        batch_size=256,
        accumulation=accumulation,
        learning_rate=rate,
        warmup_steps=updates // 20,
        eval_every=updates // 10,
        checkpoint_every=200,
        mesh=MESHES[variant],
    )
    return config
