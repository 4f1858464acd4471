"""Tokenizers: text to token ids and back.

Every tokenizer is a small value with the same four members, and can write itself into a working directory
(`save`) and be read back from it (`load_tokenizer`), so that a trained model never depends on outside files.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from tlinformer_jax.errors import ConfigError, DataError

TOKENIZER_FILE = "tokenizer.json"
BYTES_FORMAT = {"tlinformer_jax": "bytes", "version": 1}


class Tokenizer(Protocol):
    """What the data pipeline and generation ask of a tokenizer."""

    @property
    def name(self) -> str:
        """Identifies the tokenizer and its vocabulary; part of a token cache's key."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is in [0, vocab_size)."""

    @property
    def end_of_text(self) -> int:
        """The id put between documents."""

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32 [length]. Never emits `end_of_text`."""

    def decode(self, tokens: Sequence[int]) -> bytes:
        """Returns the UTF-8 bytes of `tokens`; `end_of_text` decodes to nothing."""

    def save(self, directory: pathlib.Path) -> None:
        """Writes what `load_tokenizer(directory)` needs."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """UTF-8 bytes as tokens 0..255; 256 ends a text."""

    name: str = "bytes"
    vocab_size: int = 257
    end_of_text: int = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, tokens: Sequence[int]) -> bytes:
        return bytes(token for token in map(int, tokens) if token < 256)

    def save(self, directory: pathlib.Path) -> None:
        (directory / TOKENIZER_FILE).write_text(json.dumps(BYTES_FORMAT) + "\n")


def build_tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer that `config.data.tokenizer` names.

    Raises:
      ConfigError: for a name that is not known.
    """
    if name == "bytes":
        return ByteTokenizer()
    raise ConfigError("data.tokenizer", name, "must be 'bytes'")


def load_tokenizer(directory: pathlib.Path) -> Tokenizer:
    """Reads the tokenizer that `save` wrote into a working directory.

    Raises:
      DataError: if there is none, or it is not one of ours.
    """
    path = directory / TOKENIZER_FILE
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: no readable tokenizer ({error})") from None
    if stored == BYTES_FORMAT:
        return ByteTokenizer()
    raise DataError(f"{path}: unknown tokenizer format")
