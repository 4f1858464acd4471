"""Text from TensorFlow Datasets, `data.dataset = "tfds:NAME"`, stored as array records: TensorFlow is not needed."""

from collections.abc import Iterator
from typing import Any

from tlinformer_jax.config.data import TFDS, DataConfig
from tlinformer_jax.data.cache import cache_folder
from tlinformer_jax.data.files import TextPiece
from tlinformer_jax.errors import ConfigError, DataError, first_line


def identity(config: DataConfig, split: str) -> dict[str, Any]:
    """Returns what a split's text depends on: the data set's full name with its version, the split and the field."""
    name = f"{TFDS}{_builder(config).info.full_name}"
    return {"dataset": name, "split": split, "text_field": config.text_field}


def read_documents(config: DataConfig, split: str) -> Iterator[TextPiece]:
    """Yields the field `data.text_field` of every record; downloads and prepares the data set at the first call."""
    builder = _builder(config)
    try:
        builder.download_and_prepare()
        records = builder.as_data_source(split=split) if split in builder.info.splits else None
    except Exception as error:  # of any type: raised by the data set's own code
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{config.dataset}: cannot be prepared ({reason})") from None
    if records is None:
        raise DataError(f"{config.dataset}: has no split {split!r}; it has {', '.join(builder.info.splits)}")
    for record in records:
        text = record.get(config.text_field)
        if not isinstance(text, bytes | str):
            allowed = f"must be a text field of {config.dataset}, whose fields are {', '.join(sorted(record))}"
            raise ConfigError("data.text_field", config.text_field, allowed)
        yield (text.decode("utf-8") if isinstance(text, bytes) else text), True


def _builder(config: DataConfig) -> Any:
    """Returns the data set's builder, which keeps its files below the cache directory."""
    try:
        import tensorflow_datasets
    except ImportError:
        needed = "needs the package tensorflow-datasets: pip install 'tlinformer-jax[data]'"
        raise ConfigError("data.dataset", config.dataset, needed) from None
    name = config.dataset.removeprefix(TFDS)
    folder = str(cache_folder() / "tensorflow_datasets")
    try:
        return tensorflow_datasets.builder(name, data_dir=folder, file_format="array_record")
    except Exception as error:
        allowed = f"must be one of TFDS's data sets ({first_line(error)})"
        raise ConfigError("data.dataset", config.dataset, allowed) from None
