"""The caller's own data: `train_and_evaluate(config, workdir, train_data=..., validation_data=...)`.

Token ids in an array or a file are one long row, from which samples are drawn as from any other text. Everything else
is an iterable, which is read in its own order:

    documents   lists or arrays of token ids, or dicts with `input_ids` or `tokens`: joined into one row, with the
                tokenizer's end-of-text after each, and cut into samples
    batches     integers [batch, N + 1] or [batch, N], dicts with such integers, or dicts of `inputs`, `labels` and
                optional `weights`, [batch, N] each: trained on as given. With `input_ids`, zeros in an
                `attention_mask` and `labels` of -100 exclude tokens from the loss

A continued training must read what it has not yet read. Arrays and files can be read from anywhere. For an iterable,
the working directory keeps a list of positions (POSITIONS_FILE). If it has `len` and indices, or iterators with
`get_state` and `set_state` (grain), reading starts at the last position before the checkpoint; of any other iterable,
the items before the position are read again and dropped. A hash of the next batch shows whether the data has changed.
"""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from tlinformer_jax.config.data import TOKENS, DataConfig
from tlinformer_jax.data.cache import ENDS, file_identity
from tlinformer_jax.data.ordered import Items, OrderedStream, Shape
from tlinformer_jax.data.streams import RowStream, TokenStream
from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.files import local_path

POSITIONS_FILE = "data_positions.jsonl"
DTYPES = ("uint16", "uint32")  # of a `.bin` file
MOST_VALIDATION = 1 << 28  # tokens of iterable validation data, which is held in memory


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """A file of token ids: `.npy`, or raw little-endian integers in `.bin`, as nanoGPT writes them (uint16)."""

    path: str | pathlib.Path
    dtype: str = "uint16"

    @classmethod
    def parse(cls, text: str) -> "TokenFile":
        """Parses PATH or PATH:DTYPE."""
        match = re.fullmatch(r"(.+):(\w+)", text)
        return cls(match[1], match[2]) if match and match[1].endswith(".bin") else cls(text)

    def __str__(self) -> str:
        return f"{self.path}:{self.dtype}" if str(self.path).endswith(".bin") else str(self.path)

    def open(self, name: str) -> np.ndarray:
        """Returns the file's ids, memory-mapped; a DataError names the argument or field that gave the file, `name`."""
        path = local_path(self.path, name)
        where = f"{name} = {str(path)!r}"
        if path.suffix not in (".npy", ".bin"):
            raise DataError(f"{where}: must be a file of token ids, .npy or .bin")
        if self.dtype not in DTYPES:
            raise DataError(f"{where}: dtype {self.dtype!r} must be one of {', '.join(DTYPES)}")
        try:
            if path.suffix == ".npy":
                return np.lib.format.open_memmap(path, mode="r")
            ids = np.memmap(path, np.dtype(self.dtype).newbyteorder("<"), mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{where}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
        if self.dtype == "uint16" and len(ids) > 1 and not ids[1 : 1 << 20 : 2].any():
            raise DataError(f"{where}: every second uint16 is 0, as in uint32 files; use TokenFile(path, 'uint32')")
        return ids


TokenData = np.ndarray | str | pathlib.Path | TokenFile | Iterable[Any]


def token_file(data: Any) -> TokenFile | None:
    """Returns the file that the data names; None if the data names none."""
    if isinstance(data, str | pathlib.Path):
        return TokenFile.parse(str(data))
    return data if isinstance(data, TokenFile) else None


def with_given_files(config: DataConfig, data: Mapping[str, TokenData | None]) -> DataConfig:
    """Returns the section `data` of a run on the caller's data; it names the data's files, for later commands."""
    missing = [f"{split}_data" for split, given in data.items() if given is None]
    if missing:
        raise DataError(f"{missing[0]}: must be given too; train_data and validation_data belong together")
    if config.dataset != TOKENS:
        allowed = f"must be {TOKENS!r} if train_data and validation_data are given"
        raise ConfigError("data.dataset", config.dataset, allowed)
    train, validation = (str(token_file(data[split]) or "") for split in ("train", "validation"))
    return dataclasses.replace(config, train_files=train, validation_files=validation)


def load_token_file(config: DataConfig, split: str) -> TokenStream:
    """Loads a split of data.dataset = 'tokens' from the file that its configuration names."""
    name = getattr(config, f"{split}_files")
    if not name:
        needed = "must name a .npy or .bin file: data given in Python is not stored; pass it to load_run again"
        raise DataError(f"data.{split}_files = '': {needed}")
    field = f"data.{split}_files"
    return array_stream(TokenFile.parse(name).open(field), field, name)


def array_stream(ids: np.ndarray, name: str, path: str = "") -> TokenStream:
    """Makes a stream of a row of token ids; raises a DataError if the array is not one."""
    if ids.dtype.kind not in "iu":
        raise DataError(f"{name}: must hold integers, token ids; its dtype is {ids.dtype}")
    if ids.ndim != 1:
        raise DataError(f"{name}: must be one row of token ids, [length]; its shape is {list(ids.shape)}")
    if path:
        identity = file_identity(pathlib.Path(TokenFile.parse(path).path).expanduser())
        digest = hashlib.sha256(f"{identity['size']} {identity['ends']}".encode())
    else:
        digest = hashlib.sha256(f"{ids.dtype} {len(ids)}".encode())
        digest.update(ids[:ENDS].tobytes() + ids[-ENDS:].tobytes())
    return TokenStream(ids, 0, 0, sha256=digest.hexdigest())


def given_loader(
    data: Mapping[str, TokenData | None],
    vocab_size: int,
    batch_size: int = 1,
    positions: pathlib.Path | None = None,
    writes: bool = False,
) -> Callable[[DataConfig, str, Tokenizer], TokenStream]:
    """Returns a function like `sources.load_split` for the caller's data, given by split ("train", "validation").

    `positions` is the file of positions in iterable training data, if any; this process writes it if `writes`.
    """

    def load(config: DataConfig, split: str, tokenizer: Tokenizer) -> TokenStream:
        given, name = data.get(split), f"{split}_data"
        if file := token_file(given):
            return array_stream(file.open(name), name, str(file))
        if hasattr(given, "__array__"):
            return array_stream(given if isinstance(given, np.ndarray) else np.asarray(given), name)
        if not isinstance(given, Iterable) or isinstance(given, Mapping | bytes):
            allowed = "must be token ids, a .npy or .bin file or an iterable of documents or batches"
            raise DataError(f"{name}: {allowed}, not {type(given).__name__}")
        rows = batch_size if split == "train" else None
        shape = Shape(name, vocab_size, tokenizer.end_of_text, config.sequence_length, rows)
        if split == "train":
            nothing, items = np.empty(0, np.int32), Items(given, name)
            return OrderedStream(nothing, 0, 0, items=items, shape=shape, positions=positions, writes=writes)
        return _collected(Items(given, name), shape)

    return load


def _collected(items: Items, shape: Shape) -> TokenStream:
    """Reads a whole iterable into memory, once."""
    found, count = [], 0
    for number, item in enumerate(items.rest()):
        found.append(shape.read(item, number))
        count += found[-1]["inputs"].size if isinstance(found[-1], dict) else found[-1].size
        if count > MOST_VALIDATION:
            raise DataError(f"{shape.name}: must end after at most {MOST_VALIDATION:,} tokens: it is read as a whole")
    batches = [read for read in found if isinstance(read, dict)]
    documents = [read for read in found if not isinstance(read, dict)]
    if batches and documents:
        raise DataError(f"{shape.name}: must hold documents or batches, not both")
    if not batches:
        joined = array_stream(np.concatenate([np.empty(0, np.int32), *documents]).astype(np.int32), shape.name)
        return dataclasses.replace(joined, num_documents=len(documents))
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    ids = np.append(rows["inputs"].reshape(-1), rows["labels"][-1, -1:])
    return RowStream(ids, 0, 0, sha256=hashlib.sha256(ids.tobytes()).hexdigest(), rows=rows)
