"""A 41M model under our own recipe, on books or any corpus of JSON lines, one document a line, in GPT-2 tokens.

    python -m tlinformer_jax.main --config=configs/books.py --workdir=/tmp/books \
        --config.data.train_files='DIR/train-*.jsonl.xz' --config.data.validation_files=DIR/valid.jsonl.xz
    python -m tlinformer_jax.main --config=configs/books.py:4k-512-0.5 --workdir=/tmp/books-4k ...

Variants: base-N, a causal transformer on sequences of N tokens; N-T-r, a TLinFormer with windows of T tokens in total,
a share r of which is the history window; 512-512-0.5 is the default. Each may end in -plus, such as 1k-512-0.5-plus,
for `model.token_shift`. N must divide the 131,072 tokens of an update. All variants see the same number of tokens and
have the same number of parameters, except for the shift's 432.

Needs: `pip install "tlinformer-jax[data]"`; files of JSON lines, plain, .gz, .xz or .zst, with the text in the field
--config.data.text_field (default: text); one accelerator. If 131,072 tokens at once do not fit in its memory,
--config.train.accumulation=4 computes them in four parts. 9,080 updates are 1.2 billion tokens; for a corpus much
smaller than a tenth of that, lower --config.train.steps.

Result: docs/quality.md, "Books, 41M parameters" and "Five models and experts"; 1.2 billion tokens were not tried.
"""

from ml_collections import ConfigDict

from tlinformer_jax.config import recipes
from tlinformer_jax.config.run import default_config_dict


def get_config(variant: str = "512-512-0.5") -> ConfigDict:
    """Returns the configuration; every field can be overridden by --config.SECTION.FIELD=VALUE."""
    config = default_config_dict()
    recipes.set_books(config)
    recipes.set_own_recipe(config, variant.removesuffix("-plus"))
    if variant.endswith("-plus"):
        config.model.token_shift = True
    return config
