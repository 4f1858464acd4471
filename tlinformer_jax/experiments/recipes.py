"""Shared parts of sweep files, and of config files for tasks with answers: models of equal depth, recipe, points."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.model import WINDOWED
from tlinformer_jax.config.named import load_python
from tlinformer_jax.config.recipes import TOKENS_PER_UPDATE, set_books, set_own_recipe
from tlinformer_jax.config.run import default_config_dict
from tlinformer_jax.errors import ConfigError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

T = TypeVar("T")

TOKENS = 200_000_000  # most training tokens of a run
STOP_AT = 0.99
EVALUATIONS = 24


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of a task: N, W_oh and W_og, the pairs of 'recall', and `DataConfig.curriculum`."""

    length: int
    history_window: int
    generation_window: int
    pairs: int = 1
    curriculum: str = ""


# Architecture, B, H: B * (H + 2) layers. B = 2, since a first block's history of raw embeddings lacks context.
MODELS = {
    "attention-2": ("transformer", 1, 0),  # shows that the task can be learnt in this setup
    "attention-4": ("transformer", 2, 0),
    "attention-6": ("transformer", 2, 1),
    "tlin-4": ("tlinformer", 2, 0),
    "tlin-6": ("tlinformer", 2, 1),
    "tconst-4": ("tconstformer", 2, 0),
    "tconst-6": ("tconstformer", 2, 1),
    "sliding-4": ("sliding_window", 2, 0),
    "sliding-6": ("sliding_window", 2, 1),
}
# What the models above are compared with (configs/sweep_comparators.py).
COMPARATORS = {"delta-4": ("gated_deltanet", 2, 0), "hybrid-4": ("gated_deltanet_hybrid", 2, 0)}
# TLinFormer with `model.causal_history` (configs/sweep_recall.py and sweep_niah.py).
CAUSAL = {"causal-4": ("tlinformer", 2, 0)}

SHIFT: dict[str, Any] = {"model.token_shift": True}
# Options for a long memory (docs/memory.md, "Passkeys"); `set_model` drops those that an architecture cannot have.
MEMORY: dict[str, Any] = {"token_shift": True, "longest_wavelength": 64, "key_taps": 5}
# Language models: name -> fields that differ from a row N-T-r of `config.recipes`. Gated DeltaNet's short convolution
# stands for the token shift that models named plus have.
TEXT_MODELS: dict[str, dict[str, Any]] = {
    "base": {"model.architecture": "transformer"},
    "base-plus": {"model.architecture": "transformer"} | SHIFT,
    "tlin": {},
    "plus": SHIFT,
    "causal-plus": SHIFT | {"model.causal_history": True},
    "tconst-plus": {"model.architecture": "tconstformer"} | SHIFT,
    "sliding-plus": {"model.architecture": "sliding_window"} | SHIFT,
    "delta": {"model.architecture": "gated_deltanet"},
    "hybrid": {"model.architecture": "gated_deltanet_hybrid"},
}


def set_model(config: "ConfigDict", name: str) -> None:
    """Sets the model to an entry of MODELS, COMPARATORS or CAUSAL; raises a ConfigError for an unknown name.

    Only windowed architectures have key taps. Gated DeltaNet has a short convolution in place of the token shift, and
    no rotary positions.
    """
    architecture, blocks, hidden = chosen(MODELS | COMPARATORS | CAUSAL, name)
    config.model.update(architecture=architecture, num_blocks=blocks, hidden_depth=hidden)
    config.model.causal_history = name in CAUSAL
    if architecture not in WINDOWED:
        config.model.key_taps = 0
    if name in COMPARATORS:
        config.model.token_shift = False
    if architecture == "gated_deltanet":
        config.model.longest_wavelength = 0


def books_config(row: str, tokens: int, tokens_per_update: int = TOKENS_PER_UPDATE) -> "ConfigDict":
    """Returns the configuration of a row of `config.recipes` with our recipe, trained on `tokens` tokens of books.

    A tenth of the updates is warm-up; there are ten evaluations, each with a checkpoint.
    """
    config = default_config_dict()
    set_books(config)
    set_own_recipe(config, row)
    config.train.batch_size = tokens_per_update // config.data.sequence_length
    updates = -(-tokens // tokens_per_update)
    tenth = max(1, updates // 10)
    config.train.update(steps=updates, warmup_steps=tenth, eval_every=tenth, checkpoint_every=tenth)
    return config


def one_epoch_config(row: str, tokens: int) -> "ConfigDict":
    """Returns `books_config` for a comparison in which hardly any text is seen twice.

    It has updates of 65,536 tokens, a learning rate of 0.001 and no dropout.
    """
    config = books_config(row, tokens, tokens_per_update=65_536)
    config.model.dropout = 0.0
    config.train.learning_rate = 1e-3
    return config


def row_points(
    get_config: "Callable[[str], ConfigDict]", rows: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> "tuple[ConfigDict, dict[str, dict[str, Any]]]":
    """Returns a sweep's base, row 1k-512-0.5 of `config.recipes`, and its points.

    `rows` maps a point's name to its row and to fields that differ from that row; `get_config` takes a row.
    """
    from tlinformer_jax.experiments.plan import overrides_between

    base = get_config("1k-512-0.5")
    points = {name: overrides_between(base, get_config(row)) | dict(fields) for name, (row, fields) in rows.items()}
    return base, points


def window_fields(history: int | str, generation: int) -> dict[str, Any]:
    """Returns the fields that set W_oh and W_og."""
    return {"model.history_window": history, "model.generation_window": generation}


def tiny_config() -> "ConfigDict":
    """Returns a tiny TLinFormer, trained in 40 updates on the Python reference that comes with CPython."""
    config = default_config_dict()
    config.model.update(vocab_size=257, d_model=32, num_heads=2, num_blocks=2, hidden_depth=0, d_ff=64)
    config.model.update(history_window=16, generation_window=16)
    config.train.update(steps=40, batch_size=8, warmup_steps=4, log_every=10, eval_every=20, checkpoint_every=10)
    config.data.update(dataset="pydoc", tokenizer="bytes", sequence_length=64)
    return config


def package_config(name: str) -> "Callable[[str], ConfigDict]":
    """Returns `get_config` of one of the package's config files; it takes a variant."""
    return lambda variant: load_python(f"{name}:{variant}", "--config", "get_config")


def sweep_points(
    get_config: "Callable[[str], ConfigDict]",
    settings: Sequence[str],
    models: Sequence[str],
    learning_rates: Sequence[float],
) -> "tuple[ConfigDict, dict[str, dict[str, Any]]]":
    """Returns a sweep's base and a point SETTING_MODEL_lrRATE for every setting, model and learning rate."""
    from tlinformer_jax.experiments.plan import overrides_between

    def configured(setting: str, model: str) -> "ConfigDict":
        config = get_config(setting)
        set_model(config, model)
        return config

    base, points = configured(settings[0], models[0]), {}
    for setting in settings:
        for model in models:
            changed = overrides_between(base, configured(setting, model))
            for rate in learning_rates:
                points[f"{setting}_{model}_lr{rate:g}"] = changed | {"train.learning_rate": rate}
    return base, points


def set_needles(config: "ConfigDict", setting: Setting, dataset: str, needles: int, tiny: bool) -> None:
    """Sets up needles, all asked for in training, in books (GPT-2 tokens) or, if `tiny`, Python's reference (bytes)."""
    if tiny:
        config.data.tokenizer = "bytes"
    else:
        set_books(config)  # niah-1 has its own haystack and does not read the books
    config.data.update(dataset=dataset, num_items=needles)
    if tiny:
        set_task(config, setting, vocab_size=257, width=32, tokens_per_update=4_096, learning_rate=3e-3)
        shorten(config, 40)
    else:
        set_task(config, setting, vocab_size=50257, width=256, tokens_per_update=65_536, learning_rate=1e-3)
        config.train.eval_every = TOKENS // 65_536 // 8  # an evaluation in samples of 8,192 tokens reads 1.6 M tokens


def set_task(
    config: "ConfigDict", setting: Setting, vocab_size: int, width: int, tokens_per_update: int, learning_rate: float
) -> None:
    """Sets windows, a small model and AdamW without weight decay, with warm-up and cosine; no sample is seen twice."""
    config.model.update(
        vocab_size=vocab_size,
        d_model=width,
        num_heads=max(1, width // 64),
        history_window=setting.history_window,
        generation_window=setting.generation_window,
        dropout=0.0,
    )
    set_model(config, "tlin-4")
    config.data.update(sequence_length=setting.length, curriculum=setting.curriculum)
    rows, updates = tokens_per_update // setting.length, TOKENS // tokens_per_update
    config.train.update(
        steps=f"{updates}@{STOP_AT}",
        batch_size=rows,
        learning_rate=learning_rate,
        warmup_steps=updates // 10,
        schedule="cosine:0.1",
        weight_decay=0.0,
        clip_norm=1.0,
        log_every=50,
        eval_every=updates // EVALUATIONS,
        checkpoint_every=updates // 4,
    )
    config.data.examples = DataConfig(**config.data).samples_before(updates, rows)


def shorten(config: "ConfigDict", steps: int) -> None:
    """Shortens a run to a trial of `steps` updates, evaluated twice."""
    config.train.update(steps=f"{steps}@{STOP_AT}", warmup_steps=steps // 10)
    config.train.update(eval_every=steps // 2, checkpoint_every=steps // 2)
    config.data.examples = DataConfig(**config.data).samples_before(steps, config.train.batch_size)


def chosen(table: Mapping[str, T], name: str) -> T:
    """Returns the variant `name` of a config file; raises a ConfigError for an unknown name."""
    if name not in table:
        raise ConfigError("variant", name, f"must be one of {', '.join(table)}")
    return table[name]
