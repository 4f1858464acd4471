"""What a run is told about its data."""

import dataclasses

from tlinformer_jax.errors import ConfigError

DATASETS = ("pydoc",)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The corpus and how it becomes samples.

    Attributes:
      dataset: 'pydoc', the Python language reference that every CPython carries.
      tokenizer: 'bytes'.
      sequence_length: N, tokens of a sample.
    """

    dataset: str = "pydoc"
    tokenizer: str = "bytes"
    sequence_length: int = 512

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ConfigError("data.dataset", self.dataset, f"must be one of {', '.join(DATASETS)}")
        if (
            not isinstance(self.sequence_length, int)
            or isinstance(self.sequence_length, bool)
            or self.sequence_length < 1
        ):
            raise ConfigError("data.sequence_length", self.sequence_length, "must be an integer >= 1")
