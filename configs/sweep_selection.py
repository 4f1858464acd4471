"""Which rows the observation window holds: the last ones, random ones, or those attended to most.

    python -m tlinformer_jax sweep --sweep=configs/sweep_selection.py --out=runs/selection --results=docs/results \
        --config.data.train_files='DIR/train-*.jsonl.xz' --config.data.validation_files=DIR/valid.jsonl.xz
    python -m tlinformer_jax sweep --sweep=configs/sweep_selection.py:recall --out=runs/selection_recall \
        --results=docs/results

Variants: books (the default), 41M models at N = 1,024 with W_oh = 128 and W_og = 256, 30 M tokens each; recall, the
three in the setting 512-64-tight of configs/recall.py (W_oh = 16, W_og = 128) with H = 0; tiny, 30 updates on the
embedded Python reference. `models.selection` defines the three.

The choice itself costs one query's attention a window. Result: docs/results.md, recall alone, one seed: 0.959 right
with random rows, 0.951 with the top k, 0.954 with the last, which another run of that seed found at 0.971. Not
measured: books.
"""

from ml_collections import ConfigDict

from tlinformer_jax.config import recipes
from tlinformer_jax.config.model import SELECTIONS
from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.errors import ConfigError
from tlinformer_jax.experiments.plan import Sweep
from tlinformer_jax.experiments.recipes import set_recall

TOKENS = 30_000_000


def get_sweep(variant: str = "books") -> Sweep:
    """Returns the sweep; --config.SECTION.FIELD=VALUE changes what its points leave alone."""
    bases = {"books": _books, "recall": _recall, "tiny": _tiny}
    if variant not in bases:
        raise ConfigError("variant", variant, f"must be one of {', '.join(bases)}")
    points = {f"{selection}-rows": {"model.observed_selection": selection} for selection in SELECTIONS}
    study = "retrieval" if variant == "recall" else "architectures"
    return Sweep(bases[variant](), points, then=("evaluate",), study=study)


def _books() -> ConfigDict:
    config = default_config_dict()
    recipes.set_books(config)
    recipes.set_own_recipe(config, "1k-512-0.5")
    recipes.set_tokens(config, TOKENS)
    config.model.update(history_window=128, generation_window=256)
    return config


def _recall() -> ConfigDict:
    config = default_config_dict()
    set_recall(config, "512-64-tight")
    return config


def _tiny() -> ConfigDict:
    config = default_config_dict()
    config.model.update(vocab_size=257, d_model=32, num_heads=2, num_blocks=1, hidden_depth=0, history_segments=1)
    config.model.update(history_window=8, generation_window=16)
    config.train.update(steps=30, batch_size=8, warmup_steps=3, log_every=10, eval_every=15, checkpoint_every=15)
    config.data.update(dataset="pydoc", tokenizer="bytes", sequence_length=64)
    return config
