"""The TensorFlow Datasets builder. Import it where it is needed: it imports tensorflow_datasets (not TensorFlow)."""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from unittest import mock

import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import checksums
from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

from tlinformer_jax.data.wikitext103 import rows
from tlinformer_jax.data.wikitext103.facts import VARIANTS, WIKI_SPLITS, Facts
from tlinformer_jax.errors import DataError

USER_AGENT = "Mozilla/5.0 (compatible; tlinformer_jax)"
Rows = Callable[[], Iterator[str]]


class DownloadFailed(Exception):
    """The zip could not be downloaded, or is not the published one."""


class Wikitext103(tfds.core.GeneratorBasedBuilder):
    """WikiText-103, one example a row, in the order of the text.

    Reads, from `DownloadConfig(manual_dir=...)`, the zip or the parquet files if they are there; where no
    `manual_dir` is given it downloads the zip.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES: ClassVar = {"1.0.0": "One example a line; blank lines are empty strings."}
    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in VARIANTS]
    # TFDS refuses to name the manual directory of a builder without instructions.
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Optional: wikitext-103-v1.zip, or the parquet files of Salesforce/wikitext."

    @property
    def facts(self) -> Facts:
        """Where the variant's files are and what they must hold."""
        return VARIANTS[self.builder_config.name]

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            description="The WikiText-103 language modelling corpus (Merity et al., 2016), one example a row.",
            features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
            homepage="https://huggingface.co/datasets/Salesforce/wikitext",
            license="CC BY-SA 3.0 and GFDL",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[Any]]:
        sources = self._manual_rows(dl_manager) or self._downloaded_rows(dl_manager)
        return {split: self._generate_examples(source) for split, source in sources.items()}

    def _generate_examples(self, source: Rows) -> Iterator[tuple[int, dict[str, str]]]:
        for key, row in enumerate(source()):
            yield key, {"text": row}

    def _manual_rows(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Rows] | None:
        try:
            return manual_rows(pathlib.Path(dl_manager.manual_dir), self.facts)
        except AssertionError:  # how TFDS says that there is no such directory, or that it is empty
            return None

    def _downloaded_rows(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Rows]:
        try:
            with user_agent(USER_AGENT):
                path = pathlib.Path(dl_manager.download(self.facts.url))
        except (OSError, tfds.download.DownloadError, NonMatchingChecksumError) as error:
            reason = " ".join(str(error).split())
            raise DownloadFailed(f"{self.facts.url}: {type(error).__name__}: {reason[:200]}") from error
        return _zip_sources(path, self.facts)

    @property
    def url_infos(self) -> dict[str, checksums.UrlInfo]:
        """What TFDS verifies a download against; here instead of in a checksums.tsv, for one home of the facts."""
        facts = self.facts
        return {facts.url: checksums.UrlInfo(tfds.core.utils.Size(facts.size), facts.sha256, facts.zip_name)}


@contextlib.contextmanager
def user_agent(name: str) -> Iterator[None]:
    """Names the client in every `requests` session that is opened inside.

    The host refuses Python's default clients, and TFDS's downloader has no setting for it: it opens a plain
    session, which takes its headers from this function of `requests`.
    """
    import requests

    with mock.patch.object(requests.utils, "default_user_agent", return_value=name):
        yield


def manual_rows(directory: pathlib.Path, facts: Facts) -> dict[str, Rows] | None:
    """Each split's rows from a directory that the user filled; None where neither zip nor parquet is there.

    Raises:
      DataError: if the zip's sha256 or the parquet files' numbers of rows and words are wrong.
    """
    path = directory / facts.zip_name
    if path.is_file():
        rows.check_zip(path, facts)
        return _zip_sources(path, facts)
    files = {split: rows.find_parquet(directory, facts, split) for split in WIKI_SPLITS}
    if not any(files.values()):
        return None
    for split, paths in files.items():
        if not paths:
            raise DataError(f"{directory}: parquet files of other splits, but no {split}-*-of-*.parquet")
        rows.check_counts(rows.parquet_rows(paths), facts, split, str(paths[0].parent))
    return {split: _parquet_source(paths) for split, paths in files.items()}


def _zip_sources(path: pathlib.Path, facts: Facts) -> dict[str, Rows]:
    return {split: _zip_source(path, facts, split) for split in WIKI_SPLITS}


def _zip_source(path: pathlib.Path, facts: Facts, split: str) -> Rows:
    return lambda: rows.zip_rows(path, facts, split)


def _parquet_source(paths: list[pathlib.Path]) -> Rows:
    return lambda: rows.parquet_rows(paths)
