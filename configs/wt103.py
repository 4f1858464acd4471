"""WikiText-103 in GPT-2 tokens: every row of the paper's Table 1, under the paper's recipe and under our own.

    python -m tlinformer_jax.main --config=configs/wt103.py --workdir=/tmp/wt103
    python -m tlinformer_jax.main --config=configs/wt103.py:paper-1k-512-0.5 --workdir=/tmp/wt103-paper-1k-512-0.5

Variants: base-512, 512-512-0.382, 512-512-0.5 (the default), 512-512-0.618, base-1k, 1k-512-0.5, 1k-1k-0.5, base-2k,
2k-512-0.5 and 2k-2k-0.5 under our recipe, in which you can compare any two rows. With `paper-` before it, a row is
trained as in the paper; then only rows of the same N are comparable, and dropout differs (see `_set_paper_recipe`).

Needs: `pip install "tlinformer-jax[data]"`; 190 MB of download, or its zip or parquet files in the folder `downloads`
of the cache (`data.cache.cache_folder`); one accelerator. If our recipe's 131,072 tokens at once do not fit in its
memory, --config.train.accumulation=4 computes them in four parts; the result is the same except for the drawn dropout.

Result: not yet measured.
"""

from ml_collections import ConfigDict

from tlinformer_jax.config import recipes
from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.errors import ConfigError

PAPER_BATCH = 256
PAPER_MICRO_BATCH = {512: 32, 1024: 16, 2048: 8}
VARIANTS = (*recipes.TABLE_1, *(f"paper-{row}" for row in recipes.TABLE_1))


def get_config(variant: str = "512-512-0.5") -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    if variant not in VARIANTS:
        raise ConfigError("variant", variant, f"must be one of {', '.join(VARIANTS)}")
    config = default_config_dict()
    config.data.update(dataset="wikitext103", tokenizer="gpt2")
    if variant.startswith("paper-"):
        _set_paper_recipe(config, variant.removeprefix("paper-"))
    else:
        recipes.set_own_recipe(config, variant)
    return config


def _set_paper_recipe(config: ConfigDict, row: str) -> None:
    """Sets row `row` of Table 1 as the paper trains it, quirks included.

    - Dropout is 0.2, but 0.1 for TLinFormer 512-512-0.5, which gives that row an advantage.
    - `schedule = 'paper'`: the cosine's length counts micro-batches while its argument counts updates, so the rate ends
      above 97% of its peak. An epoch's last update has the rest of the epoch, with its gradient still divided by the
      full number of micro-batches. Every parameter decays, including biases and LayerNorms.
    - An update has 256 sequences at every N, so ten epochs have half as many updates if N is twice as long.
    """
    recipes.set_row(config, row)
    config.model.dropout = 0.1 if row == "512-512-0.5" else 0.2
    config.train.update(
        steps="10epochs",
        batch_size=PAPER_BATCH,
        accumulation=PAPER_BATCH // PAPER_MICRO_BATCH[config.data.sequence_length],
        learning_rate=3e-4,
        warmup_steps=2000,
        schedule="paper",
        weight_decay=0.06,
        clip_norm=1.0,
        eval_every="epoch",
        checkpoint_every=500,
    )
