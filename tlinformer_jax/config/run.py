"""A run's whole configuration, from a config file or a working directory, checked as one.

A config file is a Python file whose `get_config()` returns a `ml_collections.ConfigDict` with the sections `model`,
`train`, `data` and `mesh`; each section's fields are those of a frozen dataclass.
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
from tlinformer_jax.parallel.mesh import MeshConfig

if TYPE_CHECKING:
    from ml_collections import ConfigDict

CONFIG_FILE = "config.json"
AUTO = "auto"
# The default of model.vocab_size is a multiple of this, which matrix products of TPUs and GPUs need to be fast.
VOCABULARY_MULTIPLE = 128
# The model of a configuration without the section `model`: small enough for the default corpus on any computer.
SMALL_MODEL = {"d_model": 96, "num_heads": 3, "hidden_depth": 0, "history_window": 32, "generation_window": 32}


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
