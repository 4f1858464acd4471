"""Text of TensorFlow Datasets: every record of a split is a document, found in the cache the second time."""

import numpy as np
import pytest

from tests.support.optional import need_modules
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.data.sources import load_split, open_split
from tlinformer_jax.data.tokenizers import ByteTokenizer
from tlinformer_jax.errors import ConfigError, DataError

pytestmark = pytest.mark.usefixtures("own_cache")
BOOKS = {"train": ["A whale.", "Two whales, ångström"], "validation": ["A fish."]}
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def builder():
    """A data set `tiny_books` of three records, which TFDS finds by its name."""
    need_modules("tensorflow_datasets", "array_record", extra="data")
    import tensorflow_datasets as tfds

    class TinyBooks(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict({"text": tfds.features.Text(), "year": np.int64})
            )

        def _split_generators(self, _):
            return {split: self._generate_examples(split) for split in BOOKS}

        def _generate_examples(self, split):
            for number, text in enumerate(BOOKS[split]):
                yield number, {"text": text, "year": 1851}

    return TinyBooks


def config_for(tmp_path, **changes) -> DataConfig:
    return DataConfig(**{"dataset": "tfds:tiny_books"} | changes)


def test_every_record_is_a_document(builder, tmp_path):
    config = config_for(tmp_path)
    for split, texts in BOOKS.items():
        stream = load_split(config, split, BYTES)
        tokens = np.array(stream.tokens)
        documents = bytes(np.where(tokens == BYTES.end_of_text, 0, tokens).astype(np.uint8)).split(b"\0")[:-1]
        assert sorted(documents) == sorted(text.encode() for text in texts)
    assert open_split(config, "train", BYTES)[1]


def test_mistakes_are_one_line(builder, tmp_path):
    for changes, split, kind, message in (
        ({"dataset": "tfds:no_such_books"}, "train", ConfigError, "data.dataset = 'tfds:no_such_books'"),
        ({"text_field": "year"}, "train", ConfigError, "whose fields are text, year"),
        ({}, "test", DataError, "has no split 'test'; it has train, validation"),
    ):
        with pytest.raises(kind) as caught:
            load_split(config_for(tmp_path, **changes), split, BYTES)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="must be one of"):
        DataConfig(dataset="tfds:")
