"""A run's whole configuration, read from a config file or a working directory and checked.

A config file is a Python file whose `get_config()` returns a `ml_collections.ConfigDict` with the sections `model`,
`train` and `data`. The fields of a section are those of a frozen dataclass, such as `TrainConfig`.
"""

import dataclasses
import difflib
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tlinformer_jax.config.data import DataConfig, absolute_paths
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.tokenizers import build_tokenizer
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.files import read_json, write_text
from tlinformer_jax.parallel.mesh import AXES

if TYPE_CHECKING:
    from ml_collections import ConfigDict

CONFIG_FILE = "config.json"
AUTO = "auto"
# The default of model.vocab_size is a multiple of this, for fast matrix products on TPUs and GPUs.
VOCABULARY_MULTIPLE = 128
# The model of a configuration without the section `model`, small enough to train on the default corpus on any computer.
SMALL_MODEL = {"d_model": 96, "num_heads": 3, "hidden_depth": 0, "history_window": 32, "generation_window": 32}
# A section, and a word in the name of an unknown field of it -> where this is set.
SETTINGS = {
    ("data", "cache"): "the environment variable TLINFORMER_CACHE names the folder of the cache",
    ("train", "accuracy"): "train.steps = '5000@0.99' ends a task's run at an accuracy",
    ("train", "epochs"): "train.steps = '10epochs' counts epochs",
}


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The whole configuration of a run."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig

    def __post_init__(self) -> None:
        model, train, data = self.model, self.train, self.data
        sampled = train.sampled_windows
        if sampled and not model.windowed:
            allowed = f"must be 0 for model.architecture = {model.architecture!r}"
            raise ConfigError("train.sampled_windows", sampled, allowed)
        windows = -(-data.sequence_length // model.generation_window)
        if sampled > windows:
            raise ConfigError("train.sampled_windows", sampled, f"must be at most the {windows} windows of a sequence")
        if train.goal and not data.is_task:
            allowed = f"must have no @ACCURACY for data.dataset = {data.dataset!r}, which has no answers"
            raise ConfigError("train.steps", train.steps, allowed)
        if data.document_masking and (model.recurrent or model.key_taps or model.attention == "cudnn"):
            name = "architecture" if model.recurrent else "key_taps" if model.key_taps else "attention"
            allowed = f"must be False for model.{name} = {getattr(model, name)!r}, which cannot keep documents apart"
            raise ConfigError("data.document_masking", True, allowed)
        if data.curriculum:
            self._check_curriculum()
        if train.deterministic and model.attention == "cudnn":
            allowed = "must be False for model.attention = 'cudnn', whose backward pass is not; use 'auto'"
            raise ConfigError("train.deterministic", True, allowed)
        if train.deterministic and model.attention == AUTO:
            object.__setattr__(self, "model", dataclasses.replace(model, attention="deterministic"))

    def _check_curriculum(self) -> None:
        train, stages, allowed = self.train, self.data.stages, None
        updates = sum(stage.updates for stage in stages)
        if train.sampled_windows:
            allowed = f"must be '' for train.sampled_windows = {train.sampled_windows}"
        elif not train.equal_updates:
            allowed = f"must be '' for train.schedule = {train.schedule!r}"
        elif 0 < train.updates <= updates:
            allowed = f"must end before train.steps = {train.steps}, but has {updates} updates"
        elif train.epochs and any(stage.accuracy for stage in stages):
            allowed = "must have no @ACCURACY if train.steps is in epochs, because their updates would be unknown"
        if allowed:
            raise ConfigError("data.curriculum", self.data.curriculum, allowed)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns plain nested dictionaries, which `run_config` accepts."""
        return dataclasses.asdict(self)


SECTIONS: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(RunConfig)}


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """Builds a configuration from nested mappings (a ConfigDict, parsed JSON); UserError if anything is not allowed.

    Missing fields have the defaults of their dataclass, except that `vocab_size` defaults to "auto": the tokenizer's
    size, rounded up to a multiple of VOCABULARY_MULTIPLE. Without a section `model` the model is SMALL_MODEL.
    """
    if not hasattr(values, "items"):
        raise ConfigError("config", values, "must be a mapping of the sections model, train and data")
    for name, section in values.items():
        if missing := unknown_field(name):
            raise ConfigError(name, "...", missing)
        if not hasattr(section, "items"):
            raise ConfigError(name, section, "must be a section of fields")
        for field, value in section.items():
            if missing := unknown_field(f"{name}.{field}"):
                raise ConfigError(f"{name}.{field}", value, missing)
    fields = {name: dict(values.get(name, {}).items()) for name in SECTIONS}
    data, model = DataConfig(**fields["data"]), fields["model"] or dict(SMALL_MODEL)
    if model.get("vocab_size", AUTO) == AUTO:
        entries = build_tokenizer(data.tokenizer).vocab_size
        model["vocab_size"] = entries + -entries % VOCABULARY_MULTIPLE
    return RunConfig(ModelConfig(**model), TrainConfig(**fields["train"]), data)


def default_config_dict() -> "ConfigDict":
    """Returns every field of every section with its default, for config files to start from and flags to override."""
    from ml_collections import ConfigDict, FieldReference  # imported here, because only config files need it

    def default(field: Any) -> Any:
        # A ConfigDict accepts only values of the default's type. Fields of several types must accept any.
        return field.default if isinstance(field.type, type) else FieldReference(field.default, field_type=object)

    config = ConfigDict(
        {name: {field.name: default(field) for field in dataclasses.fields(kind)} for name, kind in SECTIONS.items()}
    )
    config.model.vocab_size = FieldReference(AUTO, field_type=object)
    return config


def unknown_field(name: str) -> str | None:
    """Returns what is wrong with the name of a field ('model.width') or section, with a hint; None if it exists."""
    fields = {section: sorted(field.name for field in dataclasses.fields(kind)) for section, kind in SECTIONS.items()}
    section, _, field = name.partition(".")
    if section in fields and (not field or field in fields[section]):
        return None
    homes = {known: home for home, names in fields.items() for known in names}
    first = field.partition(".")[0]
    if section in homes and section not in fields:  # mesh.fsdp
        close = [f"{homes[section]}.{section}"]
    elif section in fields and first != field and first in fields[section]:  # train.mesh.fsdp
        close = [f"{section}.{first}"]
    elif section == "train" and first in AXES:
        close = ["train.mesh"]
    elif field:
        near = [field] if field in homes else fields.get(section, list(homes))
        close = [f"{homes[known]}.{known}" for known in difflib.get_close_matches(field, near, n=1)]
    else:
        close = difflib.get_close_matches(section, list(fields), n=1)
    if close:
        return f"no such {'field' if field else 'section'}; did you mean {close[0]}?"
    for (home, word), hint in SETTINGS.items():
        if section == home and word in field:
            return f"no such field; {hint}"
    if section in fields:
        return f"no such field; the fields are {', '.join(fields[section])}"
    return f"no such section; the sections are {', '.join(fields)}"


def save_config(config: RunConfig, workdir: pathlib.Path) -> None:
    """Writes the configuration into a working directory."""
    write_text(workdir / CONFIG_FILE, json.dumps(config.to_dict(), indent=2) + "\n")


def load_config(workdir: pathlib.Path) -> RunConfig:
    """Reads a working directory's configuration, whose relative paths start there; DataError if it is not usable."""
    path = workdir / CONFIG_FILE
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError("it has no sections")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        advice = "; train into it first" if isinstance(error, FileNotFoundError | NotADirectoryError) else ""
        raise DataError(f"workdir {workdir}: no readable {CONFIG_FILE} ({why}){advice}") from None
    try:
        if isinstance(values.get("data"), dict):
            values["data"] = absolute_paths(values["data"], workdir)
        return run_config(values)
    except ConfigError as error:
        raise DataError(f"workdir {workdir}: its {CONFIG_FILE} does not fit this version: {error}") from None


def fingerprint(config: RunConfig) -> str:
    """Returns the SHA-256, in hexadecimal, of the configuration's fields and values."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode()).hexdigest()


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Returns the fields in which two configurations differ, as 'section.field: old -> new'."""
    before, after = old.to_dict(), new.to_dict()
    return [
        f"{section}.{name}: {before[section][name]!r} -> {value!r}"
        for section, fields in after.items()
        for name, value in fields.items()
        if before[section][name] != value
    ]
