"""What is known of WikiText-103's files: where they are, and what they must hold.

Hashes: Hugging Face `datasets`' dataset_infos.json. Rows are lines, blank ones included. Words are those between
ASCII white space, without an end-of-line mark: the published counts (103,227,021, 217,646 and 245,569) have one a
line. The raw files spell out what v1 writes as <unk>, word for word; that their counts are the same is published
for no split, so theirs are held to within a thousandth, which still tells any cut or foreign file.
"""

import dataclasses
from collections.abc import Mapping

WIKI_SPLITS = {"train": "train", "validation": "valid", "test": "test"}  # ours to the zip's


@dataclasses.dataclass(frozen=True)
class Facts:
    """One variant of WikiText-103.

    Attributes:
      url: of the zip.
      size: of the zip in bytes.
      sha256: of the zip.
      member: the zip's file of a split, with {} for "train", "valid" or "test".
      parquet: the name that `Salesforce/wikitext` gives the variant's directory of parquet files.
      rows: of each split.
      words: of each split.
      words_tolerance: by what share the words may differ.
    """

    url: str
    size: int
    sha256: str
    member: str
    parquet: str
    rows: Mapping[str, int]
    words: Mapping[str, int]
    words_tolerance: float = 0.0

    @property
    def zip_name(self) -> str:
        return self.url.rsplit("/", 1)[-1]


_ROWS = {"train": 1_801_350, "validation": 3_760, "test": 4_358}
_WORDS = {"train": 103_227_021 - 1_801_350, "validation": 217_646 - 3_760, "test": 245_569 - 4_358}

VARIANTS: dict[str, Facts] = {
    "v1": Facts(
        url="https://wikitext.smerity.com/wikitext-103-v1.zip",
        size=190_229_076,
        sha256="242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        member="wikitext-103/wiki.{}.tokens",
        parquet="wikitext-103-v1",
        rows=_ROWS,
        words=_WORDS,
    ),
    "raw-v1": Facts(
        url="https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
        size=191_984_949,
        sha256="91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
        member="wikitext-103-raw/wiki.{}.raw",
        parquet="wikitext-103-raw-v1",
        rows=_ROWS,
        words=_WORDS,
        words_tolerance=1e-3,
    ),
}
