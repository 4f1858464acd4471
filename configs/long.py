"""Very long sequences on one device: 65,536 tokens, or 1,048,576 with sampled windows in each update.

    python -m tlinformer_jax.main --config=configs/long.py --workdir=/tmp/long-64k \
        --config.data.train_files='DIR/train-*.jsonl.xz' --config.data.validation_files=DIR/valid.jsonl.xz
    python -m tlinformer_jax.main --config=configs/long.py:1m --workdir=/tmp/long-1m ...

Variants: 64k (the default) and 1m. Both are the 41M shape with windows of 1024 and 1024 tokens, without dropout, one
sequence at a time. 64k sees 131,072 tokens an update, as our recipe does. An update of 1m trains on 16 of the 1024
windows of one sequence, drawn anew each time. --config.train.sampled_windows=0 --config.model.memory=low trains on all
windows, which takes 116 s an update and 59 GB on an H100.

Needs: `pip install "tlinformer-jax[data]"`; files of JSON lines, plain, .gz, .xz or .zst; one accelerator. Each split
must have at least one token more than a sequence; samples continue from one document to the next.

Result: speed and memory of a step on two sequences of 65,536 tokens, and on all windows of 1,048,576, are in
docs/performance.md; no model has been trained with these configurations yet.
"""

from ml_collections import ConfigDict

from tlinformer_jax.config import recipes
from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.errors import ConfigError

VARIANTS = ("64k", "1m")


def get_config(variant: str = "64k") -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    if variant not in VARIANTS:
        raise ConfigError("variant", variant, f"must be one of {', '.join(VARIANTS)}")
    config = default_config_dict()
    recipes.set_books(config)
    recipes.set_own_recipe(config, "64k-2k-0.5")
    config.model.dropout = 0.0
    config.train.accumulation = config.train.batch_size
    if variant == "1m":
        config.data.sequence_length = 1024 * 1024
        config.train.update(batch_size=1, accumulation=1, sampled_windows=16)
    return config
