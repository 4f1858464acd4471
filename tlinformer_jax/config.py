"""A run's whole configuration, from a config file or a working directory, checked as one.

Config files are Python files whose `get_config()` returns a `ml_collections.ConfigDict` with the sections
`model`, `train`, `data` and `mesh`; each section's fields are those of one frozen dataclass.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tlinformer_jax.data.config import DataConfig
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.models.config import ModelConfig
from tlinformer_jax.parallel.mesh import MeshConfig
from tlinformer_jax.training.config import TrainConfig

if TYPE_CHECKING:
    from ml_collections import ConfigDict

CONFIG_FILE = "config.json"


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    mesh: MeshConfig

    def __post_init__(self) -> None:
        sampled = self.train.sampled_windows
        if sampled and not self.model.windowed:
            raise ConfigError(
                "train.sampled_windows", sampled, f"must be 0 for model.architecture = {self.model.architecture!r}"
            )
        windows = -(-self.data.sequence_length // self.model.generation_window)
        if sampled > windows:
            raise ConfigError("train.sampled_windows", sampled, f"must be at most the {windows} windows of a sequence")
        if self.data.curriculum and (sampled or not self.train.equal_updates):
            field = "sampled_windows = 0" if sampled else "equal_updates = True"
            raise ConfigError("data.curriculum", self.data.curriculum, f"must be '' without train.{field}")
        before = sum(stage.updates for stage in self.data.stages)
        if before and 0 < self.train.steps <= before:
            allowed = f"must end before train.steps = {self.train.steps}, and has {before} updates"
            raise ConfigError("data.curriculum", self.data.curriculum, allowed)
        if not self.train.steps and any(stage.accuracy for stage in self.data.stages):
            allowed = "must have no @ACCURACY where train.steps is 0: the updates of an epoch would not be known"
            raise ConfigError("data.curriculum", self.data.curriculum, allowed)
        if self.train.stop_at_accuracy and not self.data.is_task:
            raise ConfigError(
                "train.stop_at_accuracy",
                self.train.stop_at_accuracy,
                f"must be 0 for data.dataset = {self.data.dataset!r}, which has no answers",
            )

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain nested dictionaries, as `run_config` takes them."""
        return dataclasses.asdict(self)


SECTIONS: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(RunConfig)}


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """The configuration that nested mappings (a ConfigDict, parsed JSON) describe.

    Raises:
      ConfigError: for a section or field that does not exist, and for every value that is not allowed.
    """
    for name in values:
        if name not in SECTIONS:
            raise ConfigError(name, "...", f"no such section; there are {', '.join(SECTIONS)}")
    return RunConfig(**{name: _section(name, kind, values.get(name, {})) for name, kind in SECTIONS.items()})


def default_config_dict() -> "ConfigDict":
    """Every field of every section with its default: what a config file starts from and a flag can override."""
    from ml_collections import ConfigDict, FieldReference  # here, because only config files need it

    def default(field: Any) -> Any:
        # A ConfigDict takes values of the default's type only; fields of several types must take any of them.
        return field.default if isinstance(field.type, type) else FieldReference(field.default, field_type=object)

    return ConfigDict(
        {name: {field.name: default(field) for field in dataclasses.fields(kind)} for name, kind in SECTIONS.items()}
    )


def field_names() -> dict[str, set[str]]:
    """The fields of every section."""
    return {name: {field.name for field in dataclasses.fields(kind)} for name, kind in SECTIONS.items()}


def save_config(config: RunConfig, workdir: pathlib.Path) -> None:
    """Writes the configuration into a working directory."""
    draft = workdir / f"{CONFIG_FILE}.draft"
    draft.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    draft.replace(workdir / CONFIG_FILE)


def load_config(workdir: pathlib.Path) -> RunConfig:
    """Reads the configuration of a working directory.

    Raises:
      DataError: if there is none, or one that is damaged or does not fit this version.
    """
    path = workdir / CONFIG_FILE
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError("it holds no sections")
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = f"no readable {CONFIG_FILE} ({error.strerror}); train into it first"
        raise DataError(f"workdir {workdir}: {reason}") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"workdir {workdir}: no readable {CONFIG_FILE} ({why})") from None
    try:
        return run_config(values)
    except ConfigError as error:
        raise DataError(f"workdir {workdir}: its {CONFIG_FILE} does not fit this version: {error}") from None


def fingerprint(config: RunConfig) -> str:
    """SHA-256, in hexadecimal, of the configuration's fields and values; equal for equal configurations only."""
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


def _section(name: str, kind: Any, values: Any) -> Any:
    if not isinstance(values, Mapping) and not hasattr(values, "items"):
        raise ConfigError(name, values, "must be a section of fields")
    fields = {field.name for field in dataclasses.fields(kind)}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(f"{name}.{key}", value, f"no such field; there are {', '.join(sorted(fields))}")
    return kind(**dict(values.items()))
