"""Tokenizers: text to token ids and back.

A run's working directory stores the tokenizer: a trained model depends on no other files.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from tlinformer_jax.config.data import LETTERS, split_tokenizer
from tlinformer_jax.data import subwords
from tlinformer_jax.errors import ConfigError, DataError, file_errors_as
from tlinformer_jax.files import open_own, read_json, read_own, write_bytes, write_text

TOKENIZER_FILE = subwords.TOKENIZER_FILE
NUMBERS, IDS = "numbers:", "ids:"
# A folder saved by `transformers` has its tokenizer in the first of these files that exists.
FOLDER_FILES = (TOKENIZER_FILE, "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


class Tokenizer(Protocol):
    """The interface of a tokenizer for data pipeline and generation."""

    @property
    def name(self) -> str:
        """A name that identifies the tokenizer and its vocabulary; part of a token cache's key."""

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id is in [0, vocab_size)."""

    @property
    def end_of_text(self) -> int:
        """The id that separates documents."""

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, int32 [length], which never include `end_of_text`."""

    def decode(self, tokens: Sequence[int]) -> bytes:
        """Returns the UTF-8 bytes of `tokens`: none for `end_of_text`, and its own bytes for a part of a character.

        decode(tokens) is a prefix of decode(tokens + more).
        """

    def safe_cut(self, text: str) -> int:
        """Returns the largest known position p at which a text that begins with `text` can be cut; 0 if none is known.

        encode(text[:p]) + encode(text[p:] + more) == encode(text + more) for every text `more`.
        """

    def saved(self) -> tuple[str, dict[str, bytes]]:
        """Returns what a working directory stores: the content of TOKENIZER_FILE, and further files by name."""


class _Named:
    """A tokenizer that its name describes completely."""

    name: Any

    def saved(self) -> tuple[str, dict[str, bytes]]:
        return self.name, {}


@dataclasses.dataclass(frozen=True)
class ByteTokenizer(_Named):
    """UTF-8 bytes as tokens 0 .. 255; 256 ends a text."""

    name: str = "bytes"
    vocab_size: int = 257
    end_of_text: int = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)

    def decode(self, tokens: Sequence[int]) -> bytes:
        return bytes(token for token in map(int, tokens) if token < 256)

    def safe_cut(self, text: str) -> int:
        return len(text)


@dataclasses.dataclass(frozen=True)
class NumberTokenizer(_Named):
    """Token ids written as numbers with spaces between, for data that is not text.

    "numbers:V", for tasks, has ids 0 .. V - 1, and 0 ends a text; "ids:V" has ids 0 .. V, and V ends a text.
    """

    vocab_size: int
    end_of_text: int = 0

    @property
    def name(self) -> str:
        return f"{IDS}{self.end_of_text}" if self.end_of_text else f"{NUMBERS}{self.vocab_size}"

    def encode(self, text: str) -> np.ndarray:
        words = text.split()
        first, last = (0, self.end_of_text - 1) if self.end_of_text else (1, self.vocab_size - 1)
        wrong = [word for word in words if not word.isdecimal() or len(word) > 10 or not first <= int(word) <= last]
        if wrong:
            needed = f"must be a number from {first} to {last}; write ids separated by spaces, such as '1 2 3'"
            raise DataError(f"tokenizer {self.name}: {wrong[0][:40]!r} {needed}")
        return np.array([int(word) for word in words], np.int32)

    def decode(self, tokens: Sequence[int]) -> bytes:
        return "".join(f"{token} " for token in map(int, tokens) if token != self.end_of_text).encode()

    def safe_cut(self, text: str) -> int:
        return subwords.cut_before_space(text)


@dataclasses.dataclass(frozen=True)
class LetterTokenizer(_Named):
    """An id for each of some ASCII letters, in the given order, and one more that ends a text."""

    letters: str

    @property
    def name(self) -> str:
        return f"{LETTERS}{self.letters}"

    @property
    def vocab_size(self) -> int:
        return len(self.letters) + 1

    @property
    def end_of_text(self) -> int:
        return len(self.letters)

    def encode(self, text: str) -> np.ndarray:
        if wrong := text.translate(dict.fromkeys(map(ord, self.letters))):
            raise DataError(f"tokenizer {self.name}: {wrong[0]!r} is not one of its letters")
        table = np.zeros(128, np.int32)
        table[list(self.letters.encode())] = range(len(self.letters))
        return table[np.frombuffer(text.encode(), np.uint8)]

    def decode(self, tokens: Sequence[int]) -> bytes:
        return "".join(self.letters[token] for token in map(int, tokens) if token < len(self.letters)).encode()

    def safe_cut(self, text: str) -> int:
        return len(text)


def build_tokenizer(name: str) -> Tokenizer:
    """Builds the tokenizer that `config.data.tokenizer` names; a UserError if it or its package is missing."""
    if name == "gpt2":
        return subwords.Gpt2Tokenizer(subwords.installed_gpt2_vocabulary())
    if simple := _simple(name):
        return simple
    spelled, end_of_text_token = split_tokenizer(name)
    path = pathlib.Path(spelled).expanduser()
    with file_errors_as(f"{path}: cannot be read as a tokenizer"):
        if path.is_dir():
            path, end_of_text_token = _in_folder(path)
        if not path.is_file():
            allowed = (
                "must be 'bytes', 'gpt2' or the path of a tokenizer.json file, its folder or a sentencepiece .model"
            )
            raise ConfigError("data.tokenizer", name, allowed)
        if path.suffix == ".model":
            return subwords.sentencepiece_tokenizer(path.read_bytes(), path)
        return subwords.hugging_face_tokenizer(path.read_text(encoding="utf-8"), path, end_of_text_token)


def save_tokenizer(tokenizer: Tokenizer, directory: pathlib.Path) -> None:
    """Writes what `load_tokenizer(directory)` needs; TOKENIZER_FILE comes last, when the other files exist."""
    name, files = tokenizer.saved()
    for file, data in files.items():
        write_bytes(directory / file, data)
    write_text(directory / TOKENIZER_FILE, json.dumps({"tlinformer_jax": name}) + "\n")


def load_tokenizer(directory: pathlib.Path) -> Tokenizer:
    """Reads the tokenizer that `save_tokenizer` wrote into a working directory; a DataError if there is none."""
    path = directory / TOKENIZER_FILE
    try:
        name = read_json(path)["tlinformer_jax"]
        kind, _, end_of_text_token = name.partition(":")
        if name == "gpt2":
            return subwords.Gpt2Tokenizer(read_own(directory / subwords.GPT2_FILE).encode())
        if kind == subwords.HUGGING_FACE_FILE:
            return subwords.hugging_face_tokenizer(read_own(directory / kind), directory / kind, end_of_text_token)
        if name == subwords.SENTENCEPIECE_FILE:
            with open_own(directory / name, "rb") as file:
                return subwords.sentencepiece_tokenizer(file.read(), directory / name)
        if simple := _simple(name):
            return simple
    except DataError:
        raise
    except ConfigError as error:
        raise DataError(f"{path}: {error}") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: no readable tokenizer ({getattr(error, 'strerror', None) or error})") from None
    raise DataError(f"{path}: unknown tokenizer format")


def check_vocab(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Checks that `model.vocab_size` is not smaller than the tokenizer's; raises a ConfigError if not."""
    if vocab_size < tokenizer.vocab_size:
        allowed = f"must be at least {tokenizer.vocab_size}, the vocabulary of tokenizer {tokenizer.name!r}"
        raise ConfigError("model.vocab_size", vocab_size, allowed)


def _simple(name: str) -> Tokenizer | None:
    """Returns the tokenizer that a name describes completely, None if it does not."""
    kind, _, rest = name.partition(":")
    if name == "bytes":
        return ByteTokenizer()
    if f"{kind}:" in (NUMBERS, IDS):
        if not rest.isdecimal() or len(rest) > 10 or not 4 <= int(rest) < 2**31 - 1:
            raise ConfigError("data.tokenizer", name, f"must be {kind}:V with V from 4 to {2**31 - 2}")
        return NumberTokenizer(int(rest)) if f"{kind}:" == NUMBERS else NumberTokenizer(int(rest) + 1, int(rest))
    if f"{kind}:" == LETTERS:
        if not re.fullmatch(r"[A-Z*-]+", rest) or len(set(rest)) < len(rest):
            raise ConfigError("data.tokenizer", name, f"must be {LETTERS} and some of A-Z, * and -, each once")
        return LetterTokenizer(rest)
    return None


def _in_folder(folder: pathlib.Path) -> tuple[pathlib.Path, str]:
    """Returns the tokenizer file of a `transformers` folder, and its end-of-text entry ("" if not named)."""
    path = next((path for name in FOLDER_FILES if (path := folder / name).is_file()), None)
    if path is None:
        raise DataError(f"{folder}: holds no tokenizer: none of {', '.join(FOLDER_FILES)}")
    try:
        end = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8")).get("eos_token") or ""
        return path, str(end["content"] if isinstance(end, dict) else end)
    except FileNotFoundError:
        return path, ""
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise DataError(f"{folder / 'tokenizer_config.json'}: cannot be read ({error})") from None
