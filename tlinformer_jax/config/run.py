"""A run's whole configuration, from a config file or a working directory, checked as one.

A config file is a Python file whose `get_config()` returns a `ml_collections.ConfigDict` with the sections `model`,
`train`, `data` and `mesh`; each section's fields are those of a frozen dataclass, `TrainConfig` among them.
"""

import dataclasses
import difflib
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tlinformer_jax.config.data import DataConfig, absolute_paths
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.data.tokenizers import build_tokenizer
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.files import read_json, write_text
from tlinformer_jax.parallel.mesh import MeshConfig

if TYPE_CHECKING:
    from ml_collections import ConfigDict

CONFIG_FILE = "config.json"
AUTO = "auto"
# The default of model.vocab_size is a multiple of this, which matrix products of TPUs and GPUs need to be fast.
VOCABULARY_MULTIPLE = 128
# The model of a configuration without the section `model`: small enough for the default corpus on any computer.
SMALL_MODEL = {"d_model": 96, "num_heads": 3, "hidden_depth": 0, "history_window": 32, "generation_window": 32}
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "constant", "paper")
KEPT = re.compile(r"([1-9]\d*)(?:\+(\d+))?")
COSINE_TO = re.compile(r"cosine:(\d+(?:\.\d+)?(?:e-?\d+)?)")
WSD = re.compile(r"wsd:(0?\.\d+|1(?:\.0*)?)")
EPOCH = "epoch"
# A JAX key takes 32 bits; dropout uses seed + 1.
LARGEST_SEED = 2**32 - 2
DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|min|h)")
UNITS = {"s": 1, "min": 60, "h": 3600}
# Evaluation keeps no activations for a gradient, so small micro-batches are evaluated several at a time.
EVALUATION_TOKENS = 16_384
SMALLEST = dict.fromkeys(("batch_size", "accumulation", "log_every"), 1)
SMALLEST |= dict.fromkeys(("steps", "epochs", "sampled_windows", "seed", "warmup_steps"), 0)
SMALLEST |= dict.fromkeys(("max_skipped_updates", "max_rollbacks"), 0)
NOT_NEGATIVE = ("learning_rate", "weight_decay", "z_loss", "clip_norm")


# ---- The section `train`: length, optimiser, evaluations and checkpoints


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A step is one update of the parameters.

    Attributes:
      steps: updates in all; 0 means as many as `epochs` take.
      epochs: passes over the training samples; read only where `steps` is 0.
      batch_size: sequences an update, over all devices and micro-batches.
      accumulation: micro-batches an update is computed in, one after the other; divides batch_size.
      sampled_windows: generation windows of each sequence to train on, drawn without replacement for every
        micro-batch, their losses weighted up; 0 takes all. Bounds the cost of a step on a very long sequence.
      seed: of the parameters, the order of the data, dropout and the sampled windows.
      optimizer: 'adamw'; or 'muon', Muon for the hidden matrices and AdamW for the other parameters. Muon's updates are
        scaled to the size of AdamW's: it takes AdamW's learning rate and weight decay.
      learning_rate: the peak.
      warmup_steps: updates over which it rises linearly; the last of them has the peak.
      schedule: after the warm-up. 'cosine:0.1': to a tenth of the peak at the last step, 'cosine': to 0; 'constant';
        'wsd:0.2': constant, but over the last fifth of the steps falling to 0 by one minus the square root of the share
        that has passed; or 'paper', the paper's training loop in four respects. Its cosine counts its length in
        micro-batches and its argument in updates, so that it hardly falls; the first update has rate 0; an epoch's last
        update holds what is left of the epoch, its gradient still divided by the full number of micro-batches
        (otherwise epochs follow each other without a gap); and weight decay applies to all parameters (otherwise biases
        and LayerNorms are spared). Skipped updates do not count.
      weight_decay: decoupled, as in AdamW.
      z_loss: what the squared log-sum-exp of a token's logits counts in the gradient, beside the cross-entropy, such as
        1e-4; keeps logits from drifting. The loss that is reported is the cross-entropy alone.
      clip_norm: largest global norm of the gradient; 0 does not clip.
      ema: decay of a moving average of the parameters, such as 0.999, which evaluations, generation and whatever else
        reads a checkpoint use; 0 for none. After n updates the decay is at most (1 + n) / (10 + n), so that the average
        soon forgets the first parameters.
      log_every: updates between log lines.
      eval_every: updates between evaluations, or 'epoch' for one after each epoch; 0 evaluates at the end only.
      checkpoint_every: updates between checkpoints, or a time such as '10min' (also 's' and 'h'), which no checkpoint
        is older than when the next one is saved; 0 saves at the end only.
      keep_checkpoints: how many of the latest are kept; '2+1' also keeps the one with the lowest validation loss, '2+3'
        the best three, and then an evaluation that is among the best saves a checkpoint too.
      max_skipped_updates: an update whose loss or gradient is not finite is skipped; after more than so many in a row
        the run stops, and its last checkpoint stays. 0 stops at the first.
      max_rollbacks: how often, instead of stopping, the run takes up parameters and optimiser of the last checkpoint at
        a multiple of checkpoint_every, and goes on with the batches that follow the bad ones.
      stop_at_accuracy: of tasks: the run ends at the first evaluation with at least this share of answers right; 0
        goes on to the last update.
      deterministic: on a GPU, two runs, and a run killed and resumed, end with the same bits on the same kind of device
        and version of JAX, more slowly. Without it XLA times kernels before it chooses, and sums the embedding's
        gradient in whatever order its threads come to it. On CPUs and TPUs runs repeat themselves anyway.
    """

    steps: int = 1000
    epochs: int = 0
    batch_size: int = 64
    accumulation: int = 1
    sampled_windows: int = 0
    seed: int = 0
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    schedule: str = "cosine:0.1"
    weight_decay: float = 0.1
    z_loss: float = 0.0
    clip_norm: float = 1.0
    ema: float = 0.0
    log_every: int = 50
    eval_every: int | str = 0
    checkpoint_every: int | str = "10min"
    keep_checkpoints: int | str = 2
    max_skipped_updates: int = 0
    max_rollbacks: int = 0
    stop_at_accuracy: float = 0.0
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name, least in SMALLEST.items():
            if not _is_integer(getattr(self, name), least):
                raise ConfigError(f"train.{name}", getattr(self, name), f"must be an integer >= {least}")
        if self.seed > LARGEST_SEED:
            raise ConfigError("train.seed", self.seed, f"must be at most {LARGEST_SEED}")
        for name in NOT_NEGATIVE:
            if not _is_number(getattr(self, name)) or getattr(self, name) == float("inf"):
                raise ConfigError(f"train.{name}", getattr(self, name), "must be a finite number >= 0")
        if not _is_number(self.stop_at_accuracy) or self.stop_at_accuracy > 1:
            raise ConfigError("train.stop_at_accuracy", self.stop_at_accuracy, "must be a number from 0 to 1")
        if not isinstance(self.deterministic, bool):
            raise ConfigError("train.deterministic", self.deterministic, "must be True or False")
        if not _is_number(self.ema) or self.ema >= 1:
            raise ConfigError("train.ema", self.ema, "must be a number >= 0 and < 1")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError("train.optimizer", self.optimizer, f"must be one of {', '.join(OPTIMIZERS)}")
        if self.schedule not in SCHEDULES and not COSINE_TO.fullmatch(str(self.schedule)) and not self.decay_share:
            allowed = f"must be one of {', '.join(SCHEDULES)}, or 'cosine:0.1' to end at that share of the peak"
            allowed += ", or 'wsd:0.2' to fall over that share of the steps, more than 0 and at most 1"
            raise ConfigError("train.schedule", self.schedule, allowed)
        if self.eval_every != EPOCH and not _is_integer(self.eval_every, 0):
            raise ConfigError("train.eval_every", self.eval_every, f"must be an integer >= 0, or {EPOCH!r}")
        if not _is_integer(self.checkpoint_every, 0) and not seconds(self.checkpoint_every):
            allowed = "must be an integer >= 0, or a time such as '30s', '10min' or '1.5h'"
            raise ConfigError("train.checkpoint_every", self.checkpoint_every, allowed)
        kept = self.keep_checkpoints
        if isinstance(kept, bool) or not KEPT.fullmatch(str(kept)):
            allowed = "must be an integer >= 1, or such as '2+1': the latest two and the best one"
            raise ConfigError("train.keep_checkpoints", kept, allowed)
        if not self.steps and not self.epochs:
            raise ConfigError("train.steps", 0, "must be at least 1 where train.epochs is 0")
        if self.schedule == "paper" and not self.epochs:
            raise ConfigError("train.epochs", 0, "must be at least 1 for train.schedule = 'paper'")
        if self.max_rollbacks and not (isinstance(self.checkpoint_every, int) and self.checkpoint_every):
            allowed = f"must be 0 where train.checkpoint_every = {self.checkpoint_every!r} is no number of updates"
            raise ConfigError("train.max_rollbacks", self.max_rollbacks, allowed)
        if self.batch_size % self.accumulation:
            allowed = f"must divide train.batch_size = {self.batch_size}"
            raise ConfigError("train.accumulation", self.accumulation, allowed)

    @property
    def micro_batch_size(self) -> int:
        """Sequences that are computed together."""
        return self.batch_size // self.accumulation

    @property
    def kept(self) -> tuple[int, int]:
        """How many of the latest checkpoints are kept, and of the best."""
        match = KEPT.fullmatch(str(self.keep_checkpoints))
        assert match
        return int(match[1]), int(match[2] or 0)

    @property
    def cosine_end(self) -> float:
        """Where a cosine ends, as a fraction of the peak."""
        match = COSINE_TO.fullmatch(self.schedule)
        return float(match[1]) if match else 0.0

    @property
    def decay_share(self) -> float:
        """The share of the steps over which the rate of 'wsd' falls; 0 for other schedules."""
        match = WSD.fullmatch(str(self.schedule))
        return float(match[1]) if match else 0.0

    @property
    def equal_updates(self) -> bool:
        """Whether all updates have batch_size samples; the last of an epoch is smaller in the paper's schedule."""
        return self.schedule != "paper"

    def evaluation_batch_size(self, trained: int, length: int) -> int:
        """Sequences of `length` tokens in a batch of evaluation, in a run trained on samples of `trained` tokens."""
        return max(1, max(self.micro_batch_size * trained, EVALUATION_TOKENS) // length)


def seconds(every: int | str | None) -> float:
    """The seconds of a time such as '10min'; 0 for anything else."""
    match = DURATION.fullmatch(every) if isinstance(every, str) else None
    return float(match[1]) * UNITS[match[2]] if match else 0.0


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    """Whether it is a number >= 0; not for NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


# ---- All sections


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    mesh: MeshConfig

    def __post_init__(self) -> None:
        model, train, data = self.model, self.train, self.data
        sampled = train.sampled_windows
        if sampled and not model.windowed:
            allowed = f"must be 0 for model.architecture = {model.architecture!r}"
            raise ConfigError("train.sampled_windows", sampled, allowed)
        windows = -(-data.sequence_length // model.generation_window)
        if sampled > windows:
            raise ConfigError("train.sampled_windows", sampled, f"must be at most the {windows} windows of a sequence")
        if train.stop_at_accuracy and not data.is_task:
            allowed = f"must be 0 for data.dataset = {data.dataset!r}, which has no answers"
            raise ConfigError("train.stop_at_accuracy", train.stop_at_accuracy, allowed)
        if data.curriculum:
            self._check_curriculum()

    def _check_curriculum(self) -> None:
        train, stages, allowed = self.train, self.data.stages, None
        updates = sum(stage.updates for stage in stages)
        if train.sampled_windows:
            allowed = f"must be '' for train.sampled_windows = {train.sampled_windows}"
        elif not train.equal_updates:
            allowed = f"must be '' for train.schedule = {train.schedule!r}"
        elif 0 < train.steps <= updates:
            allowed = f"must end before train.steps = {train.steps}, and has {updates} updates"
        elif not train.steps and any(stage.accuracy for stage in stages):
            allowed = "must have no @ACCURACY where train.steps is 0: the updates of an epoch would not be known"
        if allowed:
            raise ConfigError("data.curriculum", self.data.curriculum, allowed)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested dictionaries, as `run_config` takes them."""
        return dataclasses.asdict(self)


SECTIONS: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(RunConfig)}


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """The configuration that nested mappings (a ConfigDict, parsed JSON) describe.

    What they leave out has the default of its dataclass. But without a section `model` the model is SMALL_MODEL, and
    `vocab_size` is by default "auto": the tokenizer's entries, rounded up to a multiple of VOCABULARY_MULTIPLE.

    Raises:
      ConfigError: for a section or field that does not exist, and for every value that is not allowed.
      DataError: for a file that is no tokenizer.
    """
    if not hasattr(values, "items"):
        raise ConfigError("config", values, "must be a mapping of the sections model, train, data and mesh")
    for name in values:
        if missing := unknown_field(name):
            raise ConfigError(name, "...", missing)
    sections = {name: _section(name, kind, values.get(name, {})) for name, kind in SECTIONS.items() if name != "model"}
    return RunConfig(model=_section("model", ModelConfig, _model_fields(values, sections["data"])), **sections)


def default_config_dict() -> "ConfigDict":
    """Every field of every section with its default: what a config file starts from and a flag can override."""
    from ml_collections import ConfigDict, FieldReference  # here, because only config files need it

    def default(field: Any) -> Any:
        # A ConfigDict takes only values of the default's type; fields of several types must take all of them.
        return field.default if isinstance(field.type, type) else FieldReference(field.default, field_type=object)

    config = ConfigDict(
        {name: {field.name: default(field) for field in dataclasses.fields(kind)} for name, kind in SECTIONS.items()}
    )
    config.model.vocab_size = FieldReference(AUTO, field_type=object)
    return config


def add_defaults(config: "ConfigDict") -> None:
    """Adds the defaults that a config file leaves out, as `run_config` takes them, so that flags can override them.

    A field whose value is not of its default's type comes to take any; `run_config` says what is not allowed.
    """
    from ml_collections import FieldReference

    whole = default_config_dict()
    if not config.get("model"):
        whole.model.update(SMALL_MODEL)
    with config.unlocked():
        for name, defaults in whole.items():
            section = config.get(name)
            if section is None:
                config[name] = defaults
            elif hasattr(section, "items"):
                for field, default in defaults.items(preserve_field_references=True):
                    if field not in section:
                        section[field] = default
                    elif section.get_type(field) != defaults.get_type(field):
                        value = section[field]
                        del section[field]
                        section[field] = FieldReference(value, field_type=object)


def unknown_field(name: str) -> str | None:
    """What is wrong with the name of a field ('model.width') or section; None for one that exists.

    It tells the field that was meant, of the same name in another section or spelled alike, or all of the section.
    """
    fields = {section: sorted(field.name for field in dataclasses.fields(kind)) for section, kind in SECTIONS.items()}
    section, _, field = name.partition(".")
    if section in fields and (not field or field in fields[section]):
        return None
    if field:
        homes = {known: home for home, names in fields.items() for known in names}
        near = [field] if field in homes else fields.get(section, list(homes))
        close = [f"{homes[known]}.{known}" for known in difflib.get_close_matches(field, near, n=1)]
    else:
        close = difflib.get_close_matches(section, list(fields), n=1)
    if close:
        return f"no such {'field' if field else 'section'}; did you mean {close[0]}?"
    if section in fields:
        return f"no such field; there are {', '.join(fields[section])}"
    return f"no such section; there are {', '.join(fields)}"


def save_config(config: RunConfig, workdir: pathlib.Path) -> None:
    """Writes the configuration into a working directory."""
    write_text(workdir / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")


def load_config(workdir: pathlib.Path) -> RunConfig:
    """Reads the configuration of a working directory; relative paths in it start from that directory.

    Raises:
      DataError: if there is none, or one that is damaged or does not fit this version.
    """
    path = workdir / CONFIG_FILE
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError("it holds no sections")
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = f"no readable {CONFIG_FILE} ({error.strerror}); train into it first"
        raise DataError(f"workdir {workdir}: {reason}") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"workdir {workdir}: no readable {CONFIG_FILE} ({why})") from None
    try:
        if isinstance(values.get("data"), dict):
            values["data"] = absolute_paths(values["data"], workdir)
        return run_config(values)
    except ConfigError as error:
        raise DataError(f"workdir {workdir}: its {CONFIG_FILE} does not fit this version: {error}") from None


def fingerprint(config: RunConfig) -> str:
    """SHA-256, in hexadecimal, of the configuration's fields and values."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Fields in which two configurations differ, as 'section.field: old -> new'."""
    before, after = old.to_dict(), new.to_dict()
    return [
        f"{section}.{name}: {before[section][name]!r} -> {value!r}"
        for section, fields in after.items()
        for name, value in fields.items()
        if before[section][name] != value
    ]


def _model_fields(values: Mapping[str, Any], data: DataConfig) -> Any:
    """The fields of the section `model`, with the size of the vocabulary."""
    fields = values.get("model") or SMALL_MODEL
    if not hasattr(fields, "items") or fields.get("vocab_size", AUTO) != AUTO:
        return fields
    entries = build_tokenizer(data.tokenizer).vocab_size
    return {**dict(fields.items()), "vocab_size": entries + -entries % VOCABULARY_MULTIPLE}


def _section(name: str, kind: Any, values: Any) -> Any:
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise ConfigError(name, values, "must be a section of fields")
    for key, value in values.items():
        if missing := unknown_field(f"{name}.{key}"):
            raise ConfigError(f"{name}.{key}", value, missing)
    return kind(**dict(values.items()))
