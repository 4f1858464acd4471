"""Data that the caller brings: `train_and_evaluate(config, workdir, train_data=..., validation_data=...)`.

Token ids in an array or a file are one long row, of which samples are drawn as from any other text. Everything else is
an iterable, which is read in its own order:

    documents   lists or arrays of token ids, or dicts with `input_ids` or `tokens`: joined into one row, the
                tokenizer's end-of-text after each, and cut into samples
    batches     integers [batch, N + 1] or [batch, N], dicts that hold them, or dicts of `inputs`, `labels` and, if
                wanted, `weights`, [batch, N] each: trained on as they come

A training that goes on must read what it has not read yet. Arrays and files are read at any place. Of an iterable the
working directory keeps a list of positions (POSITIONS_FILE): with `len` and indices, or with iterators that have
`get_state` and `set_state` (grain), reading starts at the last position before the checkpoint; of any other iterable,
such as a generator, the items before it are read again and dropped. A position also holds a hash of the batch that
follows it, by which data that has changed, or comes in another order, is noticed.
"""

import base64
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from tlinformer_jax.config.data import TOKENS, DataConfig
from tlinformer_jax.data.batches import ALL, Batch, Reader, Rows, TrainingBatches
from tlinformer_jax.data.cache import ENDS, file_identity
from tlinformer_jax.data.streams import RowStream, TokenStream, in_threads
from tlinformer_jax.data.tokenizers import Tokenizer
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.files import open_own

POSITIONS_FILE = "data_positions.jsonl"
DTYPES = ("uint16", "uint32")  # of a `.bin` file
RECORD_EVERY = 1.0  # seconds between two positions, and at least a hundredth of the time so far
MOST_VALIDATION = 1 << 28  # tokens of an iterable of validation data, which is held in memory
IDS = ("input_ids", "tokens")  # names of token ids in a dict


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """A file of token ids: `.npy`, or raw little-endian integers in `.bin`, as nanoGPT writes them (uint16)."""

    path: str | pathlib.Path
    dtype: str = "uint16"

    @classmethod
    def parse(cls, text: str) -> "TokenFile":
        """The file that PATH, or PATH:DTYPE, names."""
        match = re.fullmatch(r"(.+):(\w+)", text)
        return cls(match[1], match[2]) if match and match[1].endswith(".bin") else cls(text)

    def __str__(self) -> str:
        return f"{self.path}:{self.dtype}" if str(self.path).endswith(".bin") else str(self.path)

    def open(self) -> np.ndarray:
        """Its ids, memory-mapped; DataError for a file that cannot hold any."""
        path = pathlib.Path(self.path).expanduser()
        if path.suffix not in (".npy", ".bin"):
            raise DataError(f"{path}: must be a file of token ids, .npy or .bin")
        if self.dtype not in DTYPES:
            raise DataError(f"{path}: dtype {self.dtype!r} must be one of {', '.join(DTYPES)}")
        try:
            if path.suffix == ".npy":
                return np.load(path, mmap_mode="r", allow_pickle=False)
            dtype = np.dtype(self.dtype).newbyteorder("<")
            size = path.stat().st_size
            if size % dtype.itemsize or not size:
                raise DataError(f"{path}: its {size} bytes are no whole {self.dtype} ids; see TokenFile(path, dtype)")
            ids = np.memmap(path, dtype, mode="r")
        except (OSError, ValueError, EOFError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
        if self.dtype == "uint16" and len(ids) > 1 and not ids[1 : 1 << 20 : 2].any():
            raise DataError(f"{path}: every second uint16 is 0, as in a file of uint32: TokenFile(path, 'uint32')")
        return ids


TokenData = np.ndarray | str | pathlib.Path | TokenFile | Iterable[Any]


def token_file(data: Any) -> TokenFile | None:
    """The whole file that the data is read from, if it is one."""
    if isinstance(data, TokenFile):
        return data
    if isinstance(data, str | pathlib.Path):
        return TokenFile.parse(str(data))
    return None


def with_given_files(config: DataConfig, data: Mapping[str, TokenData | None]) -> DataConfig:
    """The section `data` of a run on the caller's data, by split: files stand in it, so that others can read them."""
    missing = [f"{split}_data" for split, given in data.items() if given is None]
    if missing:
        raise DataError(f"{missing[0]}: must be given too where the other of train_data and validation_data is")
    if config.dataset != TOKENS:
        allowed = f"must be {TOKENS!r} where train_data and validation_data are given"
        raise ConfigError("data.dataset", config.dataset, allowed)
    train, validation = (str(token_file(data[split]) or "") for split in ("train", "validation"))
    return dataclasses.replace(config, train_files=train, validation_files=validation)


def load_token_file(config: DataConfig, split: str) -> TokenStream:
    """The split of data.dataset = 'tokens' that its configuration names as a file."""
    name = getattr(config, f"{split}_files")
    if not name:
        needed = "must name a .npy or .bin file: data given to train_and_evaluate in Python is not kept"
        raise DataError(f"data.{split}_files = '': {needed}")
    return array_stream(TokenFile.parse(name).open(), f"data.{split}_files", name)


def array_stream(ids: np.ndarray, name: str, path: str = "") -> TokenStream:
    """A row of token ids as a stream; DataError if it is none."""
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
    data: Mapping[str, TokenData | None], vocab_size: int, batch_size: int, positions: pathlib.Path | None, writes: bool
) -> Callable[[DataConfig, str, Tokenizer], TokenStream]:
    """What `sources.load_split` is for files, for the caller's data.

    Args:
      data: by split, "train" and "validation".
      vocab_size: of the model.
      batch_size: of training.
      positions: the file of positions in the training data; None keeps none.
      writes: whether this process writes it.
    """

    def load(config: DataConfig, split: str, tokenizer: Tokenizer) -> TokenStream:
        given, name = data[split], f"{split}_data"
        if file := token_file(given):
            return array_stream(file.open(), name, str(file))
        if hasattr(given, "__array__"):
            return array_stream(np.asarray(given) if not isinstance(given, np.ndarray) else given, name)
        if not isinstance(given, Iterable):
            raise DataError(
                f"{name}: must be token ids, a .npy or .bin file or an iterable, not {type(given).__name__}"
            )
        rows = batch_size if split == "train" else None
        shape = Shape(name, vocab_size, tokenizer.end_of_text, config.sequence_length, rows)
        if split == "train":
            nothing, items = np.empty(0, np.int32), Items(given, name)
            return OrderedStream(nothing, 0, 0, items=items, shape=shape, positions=positions, writes=writes)
        return _collected(Items(given, name), shape)

    return load


# ---- Items of an iterable


class Items:
    """Reads an iterable item by item, again from its start where it ends and can be read again.

    `seeks` says whether a position is found without reading all before it.
    """

    def __init__(self, data: Iterable[Any], name: str) -> None:
        self._data, self._name = data, name
        self._indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
        self._iterator = iter(()) if self._indexed else iter(data)
        self._once = self._iterator is data
        self._stateful = hasattr(self._iterator, "get_state") and hasattr(self._iterator, "set_state")
        self.seeks = self._indexed or self._stateful
        self._start = self._iterator.get_state() if self._stateful else None  # type: ignore[attr-defined]
        self.epoch, self.item = 0, 0
        self._kept: list[Any] = []
        if self._indexed and not len(data):  # type: ignore[arg-type]
            raise DataError(f"{name}: must hold at least one item; it is empty")

    def first(self) -> Any:
        """The first item, which stays the next one."""
        position = self.position()
        item = next(self)
        if self._once and not self._stateful:
            self._kept, self.item = [item], 0
        else:
            self.seek(position)
        return item

    def position(self) -> dict[str, Any]:
        """Where the next item stands, as JSON."""
        found: dict[str, Any] = {"epoch": self.epoch, "item": self.item}
        if self._stateful:
            state = self._iterator.get_state()  # type: ignore[attr-defined]
            if isinstance(state, bytes):
                found["bytes"] = base64.b64encode(state).decode()
            else:
                found["state"] = state
        return found

    def seek(self, position: Mapping[str, Any]) -> None:
        """Makes the item at `position` the next one."""
        self.epoch, skipped = position["epoch"], position["item"]
        if self._stateful:
            state = base64.b64decode(position["bytes"]) if "bytes" in position else position.get("state", self._start)
            self._iterator.set_state(state)  # type: ignore[attr-defined]
        elif not self._indexed:
            if not self._once:
                self._iterator = iter(self._data)
            elif self.item > skipped:
                raise DataError(f"{self._name}: cannot be read again; give a new iterator to each training")
            for _ in range(skipped - (self.item if self._once else 0)):
                self._next()
        self.item = skipped

    def __next__(self) -> Any:
        for item in self.rest():
            return item
        if self._once or not self.item:
            raise DataError(f"{self._name}: ends after {self.item} items, before the training does")
        self.epoch, self.item = self.epoch + 1, 0
        if not self._indexed:
            self._iterator = iter(self._data)
        return next(self)

    def rest(self) -> Iterator[Any]:
        """The items that are left of this epoch; None, by which grain filters, is no item."""
        while True:
            try:
                item = self._next()
            except StopIteration:
                return
            self.item += 1
            if item is not None:
                yield item

    def _next(self) -> Any:
        if self._kept:
            return self._kept.pop()
        if not self._indexed:
            return next(self._iterator)
        if self.item >= len(self._data):  # type: ignore[arg-type]
            raise StopIteration
        return self._data[self.item]  # type: ignore[index]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the items of an iterable must be."""

    name: str
    vocab_size: int
    end_of_text: int
    sequence_length: int
    batch_size: int | None  # None: any

    def read(self, item: Any, number: int) -> np.ndarray | Batch:
        """A document, int [length], its end included, or a batch; DataError naming what is wrong with the item."""
        where = f"{self.name}, item {number}"
        if isinstance(item, str | bytes):
            raise DataError(f"{where}: must be token ids, not text; data.dataset = 'text' reads text")
        if not isinstance(item, Mapping):
            ids = self._ids(item, where)
            return np.append(ids, self.end_of_text) if ids.ndim == 1 else self._batch({"tokens": ids}, where)
        name = next((name for name in (*IDS, "inputs") if name in item), None)
        if name is None:
            raise DataError(f"{where}: must have 'input_ids', 'tokens' or 'inputs' and 'labels'; it has {list(item)}")
        ids = self._ids(item[name], f"{where}, {name!r}")
        if name == "inputs" or ids.ndim == 2:
            return self._batch(dict(item) | {"tokens" if name != "inputs" else name: ids}, where)
        return np.append(ids, self.end_of_text)

    def _ids(self, item: Any, where: str) -> np.ndarray:
        try:
            ids = np.asarray(item)
        except ValueError:
            raise DataError(f"{where}: must be a list of token ids, or an array of them") from None
        if ids.ndim == 1 and not ids.size:
            return np.empty(0, np.int64)
        if ids.dtype.kind not in "iu":
            raise DataError(f"{where}: must be integers, token ids; its dtype is {ids.dtype}")
        if ids.ndim not in (1, 2):
            raise DataError(f"{where}: must be a document [length] or a batch [batch, length]; it is {list(ids.shape)}")
        for wrong in ids[(ids < 0) | (ids >= self.vocab_size)][:1]:
            allowed = f"model.vocab_size = {self.vocab_size} allows 0 to {self.vocab_size - 1}"
            raise DataError(f"{where}: token id {int(wrong)} is outside the vocabulary; {allowed}")
        return ids

    def _batch(self, item: Mapping[str, Any], where: str) -> Batch:
        length, rows = self.sequence_length, self.batch_size
        if "inputs" in item:
            if "labels" not in item:
                raise DataError(f"{where}: has 'inputs', and must have 'labels' too")
            inputs, labels = np.asarray(item["inputs"]), self._ids(item["labels"], f"{where}, 'labels'")
            weights = np.asarray(item.get("weights", np.ones(inputs.shape)), np.float32)
            wanted = f"[{rows or 'batch'}, {length}]"
        else:
            ids = item["tokens"]
            weights = np.asarray(item.get("attention_mask", np.ones(ids.shape)), np.float32)[:, 1:]
            if ids.shape[1] == length:  # what follows the last token is not known
                ids, weights = np.pad(ids, ((0, 0), (0, 1))), np.pad(weights, ((0, 0), (0, 1)))
            inputs, labels = ids[:, :-1], ids[:, 1:]
            wanted = f"[{rows or 'batch'}, {length + 1}] or [{rows or 'batch'}, {length}]"
        whole = rows or len(inputs), length
        if not inputs.shape == labels.shape == weights.shape == whole:
            fields = "train.batch_size and data.sequence_length" if rows else "data.sequence_length"
            shape = list(np.shape(item.get("tokens", inputs)))
            raise DataError(f"{where}: a batch must be {wanted}, by {fields}; it is {shape}")
        return {"inputs": inputs.astype(np.int32), "labels": labels.astype(np.int32), "weights": weights}


def _collected(items: Items, shape: Shape) -> TokenStream:
    """All of an iterable, read once into memory."""
    documents: list[np.ndarray] = []
    batches: list[Batch] = []
    count = 0
    for number, item in enumerate(items.rest()):
        read = shape.read(item, number)
        batches += [read] if isinstance(read, dict) else []
        documents += [] if isinstance(read, dict) else [read]
        count += read["inputs"].size if isinstance(read, dict) else read.size
        if count > MOST_VALIDATION:
            raise DataError(f"{shape.name}: must end after at most {MOST_VALIDATION:,} tokens: it is read as a whole")
    if batches and documents:
        raise DataError(f"{shape.name}: must hold documents or batches, not both")
    if batches:
        rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
        ids = np.append(rows["inputs"].reshape(-1), rows["labels"][-1, -1:])
        return RowStream(ids, 0, 0, sha256=hashlib.sha256(ids.tobytes()).hexdigest(), rows=rows)
    ids = np.concatenate(documents) if documents else np.empty(0, np.int64)
    return array_stream(ids.astype(np.int32), shape.name)


# ---- Training on an iterable


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderedStream(TokenStream):
    """The caller's training data, read in its own order: it may never end, so that its `tokens` are none."""

    items: Items
    shape: Shape
    positions: pathlib.Path | None
    writes: bool


@dataclasses.dataclass(frozen=True)
class OrderedBatches(TrainingBatches):
    """The batches of an iterable, in its order. Every process reads all of it, and keeps its own rows of a batch."""

    stream: OrderedStream

    def __post_init__(self) -> None:
        if not self.equal_updates:
            raise ConfigError("train.schedule", "paper", "needs epochs, and train_data is read in its own order")
        self.stream.shape.read(self.stream.items.first(), 0)  # before anything is compiled

    @property
    def samples_per_epoch(self) -> int:
        return 0

    def updates_for_epochs(self, epochs: int) -> int:
        """Epochs are not known."""
        needed = "train.steps, and train.eval_every in updates, must be given"
        raise DataError(f"train_data is an iterable, whose epochs are not known: {needed}")

    def indices(self, step: int) -> np.ndarray:
        """The samples of an update, counted in the order in which they are read."""
        return np.arange(step * self.batch_size, (step + 1) * self.batch_size)

    def prefetched(self, start_step: int, rows: Rows = ALL, num_threads: int = 1, ahead: int = 4) -> Reader:
        """As of any training data; the iterable is read in one thread."""
        reader = self._read(start_step, rows)
        return in_threads(lambda _: next(reader), itertools.count(), 1, ahead)

    def _read(self, start_step: int, rows: Rows) -> Iterator[Batch]:
        """The batches from update `start_step` on; leaves positions for runs that go on."""
        stream = self.stream
        known = _last_position(stream.positions, start_step)
        place = known or {"step": 0, "items": {"epoch": 0, "item": 0}, "offset": 0, "carry": []}
        self._tell(start_step, place["items"])
        try:
            stream.items.seek(place["items"])
        except (TypeError, ValueError, KeyError) as error:  # of the iterator's own code
            if isinstance(error, DataError):
                raise
            raise DataError(f"{stream.shape.name}: does not take the state that it had in this run ({error})") from None
        due = began = time.monotonic()
        for step, (begins, batch) in enumerate(self._packed(place), place["step"]):
            begins |= {"step": step, "batch": _digest(batch)}
            if known and step == known["step"] and begins["batch"] != known["batch"]:
                self._say("changed since the last run here, or in another order: its batches are others now")
                if stream.positions and stream.writes:
                    stream.positions.unlink()
            if step < start_step:
                continue
            if stream.positions and stream.writes and time.monotonic() >= due:
                due = time.monotonic() + max(RECORD_EVERY, (time.monotonic() - began) / 100)
                with open_own(stream.positions, "a") as file:
                    file.write(f"\n{json.dumps(begins)}\n")  # on a line of its own also after one that a kill has cut
            yield {name: array[rows] for name, array in batch.items()}

    def _packed(self, place: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], Batch]]:
        """Where each batch begins, and the batch, from the place that `items` has been set to.

        Documents are one row of tokens, of which samples overlap by one, `carry`. A place is the item that holds the
        next token, and the token's offset in it.
        """
        items, shape, size = self.stream.items, self.stream.shape, (self.batch_size, self.sequence_length)
        need, offset, carry = size[0] * size[1] + 1, place["offset"], list(place["carry"])
        item, read = items.position(), self._next()
        while True:
            if isinstance(read, dict):
                yield {"items": item, "offset": 0, "carry": []}, read
                item, read = items.position(), self._next()
                continue
            begins = {"items": item, "offset": offset, "carry": carry}
            parts, count = [np.array(carry, np.int64)], len(carry)
            while count < need:
                while offset >= len(read):
                    offset -= len(read)
                    item, read = items.position(), self._next()
                    if isinstance(read, dict):
                        raise DataError(
                            f"{shape.name}, item {items.item - 1}: is a batch; items before it are documents"
                        )
                parts.append(read[offset : offset + need - count])
                offset, count = offset + len(parts[-1]), count + len(parts[-1])
            tokens = np.concatenate(parts).astype(np.int32)
            carry = [int(tokens[-1])]
            weights = np.ones(size, np.float32)
            yield begins, {"inputs": tokens[:-1].reshape(size), "labels": tokens[1:].reshape(size), "weights": weights}

    def _next(self) -> np.ndarray | Batch:
        item = next(self.stream.items)
        return self.stream.shape.read(item, self.stream.items.item - 1)

    def _tell(self, start_step: int, place: Mapping[str, Any]) -> None:
        """Says how exactly, and how, a run goes on."""
        if start_step and self.stream.items.seeks:
            self._say(f"goes on at item {place['item']:,} of its epoch {place['epoch']}")
        elif start_step:
            self._say(f"cannot seek: its first {place['item']:,} items are read again and dropped")
        elif not self.stream.items.seeks:
            self._say(
                "cannot seek: a run that goes on must be given the same items again, and reads past the first ones"
            )

    def _say(self, message: str) -> None:
        if self.stream.writes:
            print(f"{self.stream.shape.name}: {message}", file=sys.stderr, flush=True)


def _digest(batch: Batch) -> str:
    return hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()[:16]


def _last_position(path: pathlib.Path | None, step: int) -> dict[str, Any] | None:
    """The last recorded position at or before update `step`; None if there is none."""
    found = None
    if path is not None and path.exists():
        with open_own(path) as file:
            for line in file:
                try:
                    entry = json.loads(line)
                    if entry["step"] <= step and (found is None or entry["step"] >= found["step"]):
                        found = entry
                except (ValueError, TypeError, KeyError):
                    continue  # blank, or cut by a kill
    return found
