"""Trains on an iterable in its own order; `data.given` says what it may contain, and how a run continues."""

import base64
import contextlib
import dataclasses
import hashlib
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from tlinformer_jax.data.batches import AHEAD, ALL, Batch, Reader, Rows, TrainingBatches
from tlinformer_jax.data.streams import TokenStream, in_threads, outside_vocabulary
from tlinformer_jax.errors import ConfigError, DataError, file_errors_as
from tlinformer_jax.files import open_own, read_own, writing

RECORD_EVERY = 1.0  # seconds between two records of the position; at least a hundredth of the time so far
IDS = ("input_ids", "tokens")  # keys of token ids in a dict
IGNORED = -100  # label of a token that does not count in the loss, as in PyTorch


# ---- The items


class Items:
    """A reader of an iterable's items, which starts again at the iterable's end if that can be read again.

    Attributes:
      seeks: whether a position can be reached without reading everything before it.
    """

    def __init__(self, data: Iterable[Any], name: str) -> None:
        self._data: Any = data
        self._name = name
        self._indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
        self._begin(0)
        self._once = self._iterator is data
        self._has_state = hasattr(self._iterator, "get_state") and hasattr(self._iterator, "set_state")
        self.seeks = self._indexed or self._has_state
        self._epoch = 0
        self._start = self.position()

    def _begin(self, item: int) -> None:
        """Starts an epoch at an item; without indices, always at the first."""
        self._item = item if self._indexed else 0
        indices = range(self._item, len(self._data)) if self._indexed else ()
        self._iterator: Any = (self._data[number] for number in indices) if self._indexed else iter(self._data)

    @property
    def number(self) -> int:
        """Index of the last item in its epoch, from 0."""
        return self._item - 1

    def first(self) -> Any:
        """Returns the first item, without moving past it."""
        item = next(self)
        if self._once and not self.seeks:
            self._iterator, self._item = itertools.chain([item], self._iterator), 0
        else:
            self.seek(None)
        return item

    def position(self) -> dict[str, Any]:
        """Returns the position of the next item, as JSON."""
        state = self._iterator.get_state() if self._has_state else None
        if isinstance(state, bytes):
            state = {"base64": base64.b64encode(state).decode()}
        return {"epoch": self._epoch, "item": self._item, "state": state}

    def seek(self, position: Mapping[str, Any] | None) -> None:
        """Moves to the item at `position`, None for the first one."""
        position = position or self._start
        if self._has_state:
            state = position["state"]
            encoded = isinstance(state, dict) and state.keys() == {"base64"}
            self._iterator.set_state(base64.b64decode(state["base64"]) if encoded else state)
        elif not self._once:
            self._begin(position["item"])
        elif self._item > position["item"]:
            raise DataError(f"{self._name}: cannot be read again; pass a new iterator to each training run")
        if not self.seeks:
            for _ in range(position["item"] - self._item):
                next(self._iterator, None)
        self._epoch, self._item = position["epoch"], position["item"]

    def __next__(self) -> Any:
        for item in self.rest():
            return item
        if self._once or not self._item:
            raise DataError(f"{self._name}: ends after {self._item} items, before the training ends")
        self._epoch += 1
        self._begin(0)
        for item in self.rest():
            return item
        raise DataError(f"{self._name}: all of its {self._item} items are None")

    def rest(self) -> Iterator[Any]:
        """Yields the remaining items of this epoch; skips None, which grain's filters leave behind."""
        for item in self._iterator:
            self._item += 1
            if item is not None:
                yield item


@dataclasses.dataclass(frozen=True)
class Shape:
    """The required form of an iterable's items."""

    name: str
    vocab_size: int
    end_of_text: int
    sequence_length: int
    batch_size: int | None  # None if any size is allowed

    def read(self, item: Any, number: int) -> np.ndarray | Batch:
        """Reads a document, int [length] with its end-of-text, or a batch; a DataError names a wrong item's fault."""
        where = of_ids = f"{self.name}, item {number}"
        if isinstance(item, str | bytes):
            raise DataError(f"{where}: must be token ids, not text; data.dataset = 'text' reads text")
        name: str | None = "tokens"
        if isinstance(item, Mapping):
            name = next((name for name in (*IDS, "inputs") if name in item), None)
            of_ids = f"{where}, {name!r}"
        else:
            item = {"tokens": item}
        if name is None:
            raise DataError(f"{where}: must have 'input_ids', 'tokens' or 'inputs' and 'labels'; it has {list(item)}")
        ids = self._ids(item[name], of_ids)
        if name == "inputs" or ids.ndim == 2:
            return self._batch(dict(item) | {"tokens" if name != "inputs" else name: ids}, where)
        for other, left_out in (("attention_mask", 0), ("labels", IGNORED)):
            if np.any(np.asarray(item.get(other, ())) == left_out):
                allowed = "every token of a document counts; give batches to leave some out"
                raise DataError(f"{where}, {other!r}: must not hold {left_out}: {allowed}")
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
            found = f"it is {list(ids.shape)}" if ids.ndim else "it is a single number"
            raise DataError(f"{where}: must be a document [length] or a batch [batch, length]; {found}")
        for wrong in ids[(ids < 0) | (ids >= self.vocab_size)][:1]:
            raise outside_vocabulary(where, int(wrong), self.vocab_size)
        return ids

    def _batch(self, item: Mapping[str, Any], where: str) -> Batch:
        length, rows = self.sequence_length, self.batch_size
        if "inputs" in item:
            if "labels" not in item:
                raise DataError(f"{where}: has 'inputs', so it must have 'labels' too")
            inputs, labels = np.asarray(item["inputs"]), self._ids(item["labels"], f"{where}, 'labels'")
            _check_shape(labels, inputs, f"{where}, 'labels'")
            weights = _weights(item, "weights", inputs, where)
            wanted = f"[{rows or 'batch'}, {length}]"
        else:
            ids = item["tokens"]
            weights = (_weights(item, "attention_mask", ids, where) * _counted(item, ids, where))[:, 1:]
            if ids.shape[1] == length:  # the label of the last token is not known
                ids, weights = np.pad(ids, ((0, 0), (0, 1))), np.pad(weights, ((0, 0), (0, 1)))
            inputs, labels = ids[:, :-1], ids[:, 1:]
            wanted = f"[{rows or 'batch'}, {length + 1}] or [{rows or 'batch'}, {length}]"
        whole = rows or len(inputs), length
        if inputs.shape != whole:
            fields = "train.batch_size and data.sequence_length" if rows else "data.sequence_length"
            shape = list(np.shape(item.get("tokens", inputs)))
            raise DataError(f"{where}: a batch must be {wanted}, because of {fields}; it is {shape}")
        return {"inputs": inputs.astype(np.int32), "labels": labels.astype(np.int32), "weights": weights}


def _check_shape(array: np.ndarray, tokens: np.ndarray, where: str) -> None:
    if array.shape != tokens.shape:
        raise DataError(f"{where}: must have the shape of its tokens, {list(tokens.shape)}; it is {list(array.shape)}")


def _weights(item: Mapping[str, Any], name: str, tokens: np.ndarray, where: str) -> np.ndarray:
    """Returns the weight of each token of a batch in the loss, float32; 1 if the item has no weights."""
    if item.get(name) is None:
        return np.ones(tokens.shape, np.float32)
    try:
        weights = np.asarray(item[name], np.float32)
    except (TypeError, ValueError):
        raise DataError(f"{where}, {name!r}: must be numbers >= 0") from None
    _check_shape(weights, tokens, f"{where}, {name!r}")
    for wrong in weights[~(np.isfinite(weights) & (weights >= 0))][:1]:
        raise DataError(f"{where}, {name!r}: must be numbers >= 0; it holds {wrong}")
    return weights


def _counted(item: Mapping[str, Any], tokens: np.ndarray, where: str) -> np.ndarray:
    """Returns which tokens of a batch count, bool, from Hugging Face's `labels`: the id itself, or IGNORED."""
    if item.get("labels") is None:
        return np.ones(tokens.shape, bool)
    labels, where = np.asarray(item["labels"]), f"{where}, 'labels'"
    _check_shape(labels, tokens, where)
    if ((labels != tokens) & (labels != IGNORED)).any():
        raise DataError(f"{where}: must be the same ids, or {IGNORED}; for others give 'inputs' and 'labels'")
    return labels != IGNORED


# ---- Training on an iterable


@dataclasses.dataclass(frozen=True, kw_only=True)
class OrderedStream(TokenStream):
    """The caller's training data, read in its own order. `tokens` is empty, since the data may never end."""

    items: Items
    shape: Shape
    positions: pathlib.Path | None
    writes: bool


class BatchStart(NamedTuple):
    """Where the batch of an update begins in an iterable."""

    step: int = 0
    items: dict[str, Any] | None = None  # position of the item with the batch's first token; None for the first item
    offset: int = 0  # of this token in the item
    batch: str = ""  # hash of the batch


@dataclasses.dataclass(frozen=True)
class OrderedBatches(TrainingBatches):
    """The batches of an iterable, in its order. Every process reads everything, and keeps its own rows of a batch."""

    stream: OrderedStream

    def __post_init__(self) -> None:
        if not self.equal_updates:
            raise ConfigError("train.schedule", "paper", "needs epochs, but train_data is an iterable")
        self.stream.shape.read(self.stream.items.first(), 0)  # before anything is compiled

    def updates_for_epochs(self, epochs: int) -> int:
        """Raises a DataError: the epochs of an iterable are not known."""
        needed = "train.steps, and train.eval_every in updates, must be given"
        raise DataError(f"train_data is an iterable, whose epochs are unknown: {needed}")

    def indices(self, step: int) -> np.ndarray:
        """Returns the samples of an update, numbered in reading order."""
        return np.arange(step * self.batch_size, (step + 1) * self.batch_size)

    def prefetched(self, start_step: int, rows: Rows = ALL) -> Reader:
        """Yields batches like the method of the base class, but reads the iterable in a single thread."""
        reader = self._read(start_step, rows)
        return in_threads(lambda _: next(reader), itertools.count(), threads=1, ahead=AHEAD)

    def _read(self, start_step: int, rows: Rows) -> Iterator[Batch]:
        """Yields the batches from update `start_step` on, and records positions for runs that continue later."""
        stream = self.stream
        begin = _last_start(stream.positions, start_step)
        if start_step and stream.items.seeks:
            at = begin.items or {"epoch": 0, "item": 0}
            self._say(f"continues at item {at['item']:,} of its epoch {at['epoch']}")
        elif start_step:
            self._say("cannot seek: its earlier items are read again and dropped")
        elif not stream.items.seeks:
            self._say("cannot seek: to continue this run later, pass the same items again, from the first one on")
        try:
            stream.items.seek(begin.items)
        except DataError:
            raise
        except Exception as error:  # of any type: raised by the iterator's own code
            raise DataError(f"{stream.shape.name}: refuses the state that it had in this run ({error})") from None
        written = stream.positions if stream.writes else None
        due = began = time.monotonic()
        for start, batch in self._packed(begin):
            if start.step == begin.step and begin.batch not in ("", _digest(batch)):
                self._say("has changed or was reordered since the last run here; its batches are different now")
                if written:
                    written.unlink()
            if start.step < start_step:
                continue
            if written and time.monotonic() >= due:
                due = time.monotonic() + max(RECORD_EVERY, (time.monotonic() - began) / 100)  # the file stays small
                _add_start(written, start._replace(batch=_digest(batch)))
            yield {name: array[rows] for name, array in batch.items()}

    def _packed(self, start: BatchStart) -> Iterator[tuple[BatchStart, Batch]]:
        """Yields each batch with its start, from the batch at `start` on, to which `items` has been moved.

        Documents form one row of tokens, in which samples overlap by one token.
        """
        items, shape, size = self.stream.items, self.stream.shape, (self.batch_size, self.sequence_length)
        need, offset = size[0] * size[1] + 1, start.offset
        item, read = items.position(), self._next()
        for step in itertools.count(start.step):
            start = BatchStart(step, item, offset)
            if isinstance(read, dict):
                yield start, read
                item, read = items.position(), self._next()
                continue
            parts = [read[offset : offset + need]]
            missing = need - len(parts[0])
            while missing:
                item, read, offset = items.position(), self._next(), 0
                if isinstance(read, dict):
                    raise DataError(f"{shape.name}, item {items.number}: is a batch; items before it are documents")
                parts.append(read[:missing])
                missing -= len(parts[-1])
            offset += len(parts[-1]) - 1  # the last token is the first one of the next batch
            tokens = np.concatenate(parts).astype(np.int32)
            weights = np.ones(size, np.float32)
            yield start, {"inputs": tokens[:-1].reshape(size), "labels": tokens[1:].reshape(size), "weights": weights}

    def _next(self) -> np.ndarray | Batch:
        item = next(self.stream.items)
        return self.stream.shape.read(item, self.stream.items.number)

    def _say(self, message: str) -> None:
        if self.stream.writes:
            print(f"{self.stream.shape.name}: {message}", file=sys.stderr, flush=True)


def _digest(batch: Batch) -> str:
    return hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest()[:16]


def _add_start(path: pathlib.Path, start: BatchStart) -> None:
    try:
        with writing(f"{path}:"), open_own(path, "a") as file:
            file.write(f"\n{json.dumps(start._asdict())}\n")  # the first newline ends a line that a kill has cut
    except DataError:
        raise
    except (TypeError, ValueError) as error:
        raise DataError(f"train_data: get_state must return bytes, or a value that JSON can store ({error})") from None


def _last_start(path: pathlib.Path | None, step: int) -> BatchStart:
    """Returns the last recorded start at or before update `step`; that of the first batch if there is none."""
    found = BatchStart()
    if path is None or not path.exists():
        return found
    with file_errors_as(f"{path}: cannot be read"):
        lines = read_own(path).splitlines()
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):  # a line that is blank, or cut by a kill
            start = BatchStart(**json.loads(line))
            found = start if found.step <= start.step <= step else found
    return found
