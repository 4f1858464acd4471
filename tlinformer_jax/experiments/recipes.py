"""What the config and sweep files of the retrieval tasks share: settings by name, models of equal depth, the recipe.

A 'tight' setting has more pairs than W_oh has rows and samples far longer than W_oh. Pairs fill whole generation
windows, so that in 'recall' no answer is in the generation window of its question; evaluations tell apart which of them
are in W_oh. A sliding window of W_oh + W_og rows reaches all answers in every setting, since its layers relay them.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.recipes import set_books, set_plus
from tlinformer_jax.errors import ConfigError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

T = TypeVar("T")

TOKENS = 200_000_000  # at most, of a cell
STOP_AT = 0.99
EVALUATIONS = 24


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of a task: N, W_oh and W_og; of 'recall' the pairs; `DataConfig.curriculum`."""

    length: int
    history_window: int
    generation_window: int
    pairs: int = 1
    curriculum: str = ""


RECALL = {
    # The protocol's own (length, pairs); the pairs fill the first window, W_oh could hold all of them.
    "64-4": Setting(64, 8, 8, 4),
    "128-8": Setting(128, 16, 16, 8),
    "256-16": Setting(256, 32, 32, 16),
    "512-64": Setting(512, 128, 128, 64, "64:600,128:600,256:800"),
    # Binding: 4 times as many pairs as rows of W_oh, 32 times as long; the pairs fill the first window.
    "256-32-tight": Setting(256, 8, 64, 32, "64:3000@0.8,128:2000@0.8"),
    "512-64-tight": Setting(512, 16, 128, 64, "64:600,128:600,256:800"),
    "1024-128-tight": Setting(1024, 32, 256, 128, "64:600,128:600,256:800,512:800"),
    # Two of the protocol's, on shorter samples first. Last, so that the points of sweeps keep their numbers.
    "128-8-grown": Setting(128, 16, 16, 8, "64:2000"),
    "256-16-grown": Setting(256, 32, 32, 16, "64:1500,128:1500"),
}
# Of capacity curves, at N = 1,024 and W_og = 64.
CAPACITY_STAGES = "64:1000@0.8,128:1000@0.8,256:1000@0.8,512:1000@0.8"
COPY = {
    "128": Setting(128, 64, 64),  # W_oh holds the whole segment
    "256-tight": Setting(256, 32, 32),  # half of the segment is more than both windows
    "512-tight": Setting(512, 32, 64),
}
PASSKEY = {
    "8k": Setting(8192, 512, 512, curriculum="256:800,1024:450,2048:500,4096:600"),
    "tiny": Setting(512, 64, 64, curriculum="256:20"),  # minutes on a CPU
}

# Kind and length of a haystack. Stages end as soon as training answers.
NIAH = {
    "1k": Setting(1024, 128, 128, curriculum="256:1000@0.9"),
    "4k": Setting(4096, 256, 256, curriculum="256:1000@0.9,1024:500@0.9"),
    "16k": Setting(16384, 512, 512, curriculum="256:1000@0.9,1024:500@0.9,4096:400@0.9"),
}
NIAH_KINDS = {"s1": ("niah-1", 1), "s2": ("niah-2", 1), "s3": ("niah-3", 1), "mk": ("niah-2", 4)}  # dataset, needles
NIAH_VARIANTS = {f"{kind}-{length}": (kind, length) for kind in NIAH_KINDS for length in NIAH} | {
    "tiny": ("s1", "tiny")
}
STATE = {
    "parity-64": Setting(64, 16, 16, curriculum="16:1000@0.95,32:1000@0.95"),
    "parity-256": Setting(256, 32, 32, curriculum="16:1000@0.95,32:1000@0.95,64:1000@0.95,128:1000@0.95"),
    "s5-64": Setting(64, 16, 16, curriculum="8:1000@0.95,16:1000@0.95,32:1000@0.95"),
    "s5-256": Setting(256, 32, 32, curriculum="8:1000@0.95,16:1000@0.95,32:1000@0.95,64:1000@0.95,128:1000@0.95"),
    "tiny": Setting(32, 8, 8, curriculum="16:20"),
}

# Architecture, B, H; B * (H + 2) layers. A block's history of raw embeddings cannot know its predecessors, so B = 2.
MODELS = {
    "attention-2": ("transformer", 1, 0),  # shows that the harness works
    "attention-4": ("transformer", 2, 0),
    "attention-6": ("transformer", 2, 1),
    "tlin-4": ("tlinformer", 2, 0),
    "tlin-6": ("tlinformer", 2, 1),
    "tconst-4": ("tconstformer", 2, 0),
    "tconst-6": ("tconstformer", 2, 1),
    "sliding-4": ("sliding_window", 2, 0),
    "sliding-6": ("sliding_window", 2, 1),
}


def set_recall(config: "ConfigDict", name: str) -> None:
    """Sets multi-query associative recall, vocabulary 8,192, in the setting `name`, else raises ConfigError.

    `name` may end in '-plus': with `set_plus`, and without shorter samples first.
    """
    plus, settings = name.endswith("-plus"), RECALL
    if plus:
        settings = {
            known: dataclasses.replace(setting, curriculum="")
            for known, setting in RECALL.items()
            if not known.endswith("-grown")
        }
    setting = _chosen(settings, name.removesuffix("-plus"))
    config.data.update(dataset="recall", tokenizer="numbers:8192", num_items=setting.pairs)
    _set_task(config, setting, vocab_size=8192, width=128, tokens_per_update=32_768, learning_rate=3e-3)
    if plus:
        set_plus(config)


def set_capacity(config: "ConfigDict", name: str) -> None:
    """Sets recall with the token shift, named pairsP-rowsW, W the rows of W_oh; N = 1,024, W_og = 64."""
    _set_capacity(config, name, Setting(1024, 0, 64, curriculum=CAPACITY_STAGES), 8192, 128, 32_768)


def set_small_capacity(config: "ConfigDict", name: str) -> None:
    """The same in samples of 32 tokens, W_og = 4, 40 updates: a minute on a CPU."""
    _set_capacity(config, name, Setting(32, 0, 4), 64, 32, 1_024)
    _shorten(config, 40)


def set_copy(config: "ConfigDict", name: str) -> None:
    """Sets segment copy of 16 symbols in the setting `name`, else raises ConfigError."""
    config.data.update(dataset="copy", tokenizer="numbers:17")
    _set_task(config, _chosen(COPY, name), vocab_size=17, width=128, tokens_per_update=32_768, learning_rate=1e-3)


def set_passkey(config: "ConfigDict", name: str) -> None:
    """Sets passkeys, 4 in a sample, among books in GPT-2 tokens ('tiny': among the Python reference, in bytes)."""
    setting = _chosen(PASSKEY, name)
    _set_needles(config, setting, "passkey", 1 if name == "tiny" else 4, tiny=name == "tiny")


def set_niah(config: "ConfigDict", name: str) -> None:
    """Sets needles in a haystack, named KIND-LENGTH, in GPT-2 tokens ('tiny': s1 in bytes), else raises ConfigError.

    All needles of a training sample are asked for.
    """
    kind, length = _chosen(NIAH_VARIANTS, name)
    setting = PASSKEY["tiny"] if name == "tiny" else NIAH[length]
    _set_needles(config, setting, *NIAH_KINDS[kind], tiny=name == "tiny")


def set_state(config: "ConfigDict", name: str) -> None:
    """Sets state tracking, named GROUP-LENGTH ('tiny': parity), else raises ConfigError."""
    setting = _chosen(STATE, name)
    dataset = "s5" if name.startswith("s5") else "parity"
    vocabulary = {"parity": 4, "s5": 240}[dataset]
    config.data.update(dataset=dataset, tokenizer=f"numbers:{vocabulary}")
    tiny = name == "tiny"
    width, tokens = (32, 4_096) if tiny else (128, 32_768)
    _set_task(config, setting, vocabulary, width, tokens_per_update=tokens, learning_rate=1e-3)
    if tiny:
        _shorten(config, 40)


def set_model(config: "ConfigDict", name: str) -> None:
    """Sets architecture and depth to those of MODELS, else raises ConfigError."""
    architecture, blocks, hidden = _chosen(MODELS, name)
    config.model.update(architecture=architecture, num_blocks=blocks, hidden_depth=hidden)


def sweep_points(
    set_task: "Callable[[ConfigDict, str], None]",
    settings: Sequence[str],
    models: Sequence[str],
    learning_rates: Sequence[float],
) -> "tuple[ConfigDict, dict[str, dict[str, Any]]]":
    """The base of a sweep, and a point for every setting, model and learning rate, named SETTING_MODEL_lrRATE."""
    from tlinformer_jax.config.run import default_config_dict
    from tlinformer_jax.experiments.plan import overrides_between

    def configured(setting: str, model: str) -> "ConfigDict":
        config = default_config_dict()
        set_task(config, setting)
        set_model(config, model)
        return config

    base, points = configured(settings[0], models[0]), {}
    for setting in settings:
        for model in models:
            changed = overrides_between(base, configured(setting, model))
            for rate in learning_rates:
                points[f"{setting}_{model}_lr{rate:g}"] = changed | {"train.learning_rate": rate}
    return base, points


def _set_capacity(
    config: "ConfigDict", name: str, setting: Setting, vocabulary: int, width: int, tokens_per_update: int
) -> None:
    """Recall in a setting whose W_oh and pairs `name` gives."""
    pairs, rows = map(int, re.findall("[0-9]+", name))
    setting = dataclasses.replace(setting, history_window=rows, pairs=pairs)
    set_plus(config)
    config.data.update(dataset="recall", tokenizer=f"numbers:{vocabulary}", num_items=pairs)
    _set_task(config, setting, vocabulary, width, tokens_per_update, learning_rate=3e-3)


def _set_needles(config: "ConfigDict", setting: Setting, dataset: str, needles: int, tiny: bool) -> None:
    """Needles, all asked for in training, in books in GPT-2 tokens; or a trial in the Python reference in bytes."""
    if tiny:
        config.data.tokenizer = "bytes"
    else:
        set_books(config)  # of which niah-1, with a haystack of its own, reads nothing
    config.data.update(dataset=dataset, num_items=needles)
    if tiny:
        _set_task(config, setting, vocab_size=257, width=32, tokens_per_update=4_096, learning_rate=3e-3)
        _shorten(config, 40)
    else:
        _set_task(config, setting, vocab_size=50257, width=256, tokens_per_update=65_536, learning_rate=1e-3)
        config.train.eval_every = config.train.steps // 8  # an evaluation of 8,192 tokens a sample reads 1.6 M


def _set_task(
    config: "ConfigDict", setting: Setting, vocab_size: int, width: int, tokens_per_update: int, learning_rate: float
) -> None:
    """Windows, a small model, and the recipe: AdamW without weight decay, a tenth to warm up, cosine; never twice the
    same sample."""
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
        steps=updates,
        batch_size=rows,
        learning_rate=learning_rate,
        warmup_steps=updates // 10,
        schedule="cosine:0.1",
        weight_decay=0.0,
        clip_norm=1.0,
        log_every=50,
        eval_every=updates // EVALUATIONS,
        checkpoint_every=updates // 4,
        stop_at_accuracy=STOP_AT,
    )
    config.data.examples = DataConfig(**config.data).samples_before(updates, rows)


def _shorten(config: "ConfigDict", steps: int) -> None:
    """A trial of so many updates, evaluated twice."""
    config.train.update(steps=steps, warmup_steps=steps // 10, eval_every=steps // 2, checkpoint_every=steps // 2)
    config.data.examples = DataConfig(**config.data).samples_before(steps, config.train.batch_size)


def _chosen(table: Mapping[str, T], name: str) -> T:
    if name not in table:
        raise ConfigError("variant", name, f"must be one of {', '.join(table)}")
    return table[name]
