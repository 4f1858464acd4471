"""Generation windows: their positions, how they are grouped into loops of equal shapes, and rows cut out of arrays."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.parallel.sharding import WHOLE, SequenceSplit

# A position or length: a number for all windows, or int32 [g] for g windows that run together.
PerWindow = Any


@flax.struct.dataclass
class WindowFrame:
    """Positions of generation windows and of their observation windows; g windows may run together.

    Attributes:
      history_length: n, the position of the first row that runs with the generation window.
      observed_start: h, the position of the first row of the observation window.
      observed_length: number of valid rows of the observation window, n - h.
      observed_width: number of computed rows of the observation window. Rows past the valid ones are the future; no
        query reads them.
      never_empty: whether every window observes a row, provided that `ModelConfig.always_observes`.
      stride: rows from one observation window's start to the next one's, if they run together; None if that varies.
      z_documents, x_documents: documents of the rows of the observation and the generation window, int32 [batch, rows];
        None if the sample is a single document.
    """

    history_length: PerWindow
    observed_start: PerWindow
    observed_length: PerWindow
    observed_width: int = flax.struct.field(pytree_node=False)
    never_empty: bool = flax.struct.field(pytree_node=False, default=True)
    stride: int | None = flax.struct.field(pytree_node=False, default=None)
    z_documents: jax.Array | None = None
    x_documents: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive windows that one loop computes with one static history length.

    Attributes:
      first: index of the first window.
      observed: each window's number of valid rows in the observation window.
      observed_width: the largest of `observed`.
      history_rows: rows of history that each window of the segment reads; the valid rows come first.
      history_chunk: rows of history that a device restores at a time, a divisor of its rows; 0 for all at once.
      together: windows that are computed together, like more sequences of a batch; divides the number of windows.
    """

    first: int
    observed: tuple[int, ...]
    observed_width: int
    history_rows: int
    history_chunk: int = 0
    together: int = 1

    @property
    def count(self) -> int:
        """The number of windows."""
        return len(self.observed)

    @property
    def windows(self) -> np.ndarray:
        """Indices of the windows, int32 [count / together, together], or [count] if `together` is 1."""
        windows = np.arange(self.first, self.first + self.count, dtype=np.int32)
        return windows if self.together == 1 else windows.reshape(-1, self.together)

    def overlap(self, config: ModelConfig) -> int:
        """Returns how many rows before each window run with it; none before the first window of a sequence."""
        return config.window_overlap if self.first else 0

    def starts(self, config: ModelConfig, windows: PerWindow) -> PerWindow:
        """Returns n, the position of the first row that runs with each window."""
        begin, overlap = windows * config.generation_window, self.overlap(config)
        return begin - overlap if overlap else begin

    def stride(self, config: ModelConfig) -> int | None:
        """Returns the rows between the starts of neighbouring windows that run together; None if that varies."""
        return config.generation_window

    def rows(self, config: ModelConfig, arrays: Any, overlap: int = 0) -> Any:
        """Returns the windows' rows, each with `overlap` rows before, of a pytree of arrays; see `window_rows`."""
        return jax.tree.map(
            lambda array: window_rows(config, array, self.first, self.count, self.together, overlap), arrays
        )

    def frame(self, config: ModelConfig, windows: PerWindow) -> WindowFrame:
        """Returns the frame of windows of this segment, given their indices.

        A length that all windows share is a plain number, so that attention knows which keys are never masked.
        """
        if self.count == self.together:
            windows = self.windows[0]
        length, stride = self.starts(config, windows), None
        if min(self.observed) == self.observed_width:
            observed: PerWindow = self.observed_width
            stride = self.stride(config)
        elif isinstance(windows, jax.Array):
            observed = jnp.asarray(self.observed, jnp.int32)[windows - self.first]
        else:
            observed = np.asarray(self.observed, np.int32)[windows - self.first]
        never_empty = self.count == 1 or min(self.observed) > 0
        return WindowFrame(length, length - observed, observed, self.observed_width, never_empty, stride)


@dataclasses.dataclass(frozen=True)
class PairedSegment(Segment):
    """Consecutive windows in pairs, the longest history with the shortest; see `models.paired`.

    Each pair's histories together have `history_rows` rows. The first of a pair is the longer one.
    """

    @property
    def windows(self) -> np.ndarray:
        """Indices of the windows, int32 [count / 2, 2]."""
        windows = np.arange(self.first, self.first + self.count, dtype=np.int32).reshape(2, -1)
        return np.stack([windows[1, ::-1], windows[0]], axis=1)

    def overlap(self, config: ModelConfig) -> int:
        """Returns 0: windows with an overlap do not run in pairs."""
        return 0

    def stride(self, config: ModelConfig) -> None:
        """Returns None: it varies from pair to pair."""

    def rows(self, config: ModelConfig, arrays: Any, overlap: int = 0) -> Any:
        """Returns the windows' rows of a pytree of arrays, [count / 2, batch * 2, W_og, ...]."""
        size, half = config.generation_window, self.count // 2

        def paired(array: jax.Array) -> jax.Array:
            rows = array[:, self.first * size : (self.first + self.count) * size]
            rows = rows.reshape(len(rows), 2, half, size, *array.shape[2:])
            pairs = jnp.stack([jnp.flip(rows[:, 1], 1), rows[:, 0]], axis=2)
            return jnp.moveaxis(pairs, 1, 0).reshape(half, -1, size, *array.shape[2:])

        return jax.tree.map(paired, arrays)


# The first window has no history.
FIRST_WINDOW = Segment(first=0, observed=(0,), observed_width=0, history_rows=0)


def num_windows(config: ModelConfig, length: int) -> int:
    """Returns the number of generation windows of a sequence of `length` tokens; the last may be shorter."""
    return -(-length // config.generation_window)


def trained_tokens(config: ModelConfig, length: int, sampled_windows: int) -> float:
    """Returns how many tokens of a sequence a step predicts; their expected number if windows are sampled."""
    windows = num_windows(config, length)
    return length * sampled_windows / windows if 0 < sampled_windows < windows else float(length)


def training_plan(
    config: ModelConfig, length: int, first: int = 0, alone: bool = False, packed: bool = False
) -> ExecutionPlan:
    """Returns the plan by which a step trains the windows from index `first` on of sequences of `length` tokens.

    `alone` says whether each window runs alone, because windows are sampled or devices split sequences. `packed` says
    whether sequences hold several documents, which the kernel by which windows share keys cannot mask.
    """
    if packed:
        config = dataclasses.replace(config, attention="xla")
    plan = config.plan(num_windows(config, length) - first, alone)
    if alone:
        return plan.one_at_a_time
    # Pairs need all windows of a sequence, since the shortest histories fill up the longest. They also need a loop over
    # windows, which only checkpointing makes.
    return dataclasses.replace(plan, paired=plan.paired and config.pairable and plan.checkpointing and not first)


def plan_segments(
    config: ModelConfig, windows: int, plan: ExecutionPlan, split: SequenceSplit = WHOLE, first: int = 0
) -> tuple[Segment, ...]:
    """Groups windows first .. windows - 1 into segments. Window 0 has no history: only a paired segment contains it.

    There are at most `plan.segments` segments, and one more for windows that fill no group of `plan.together`. If
    windows are split over devices, each segment except the first contains whole rounds of one window per device.
    """
    if plan.paired and config.pairable and split == WHOLE and first == 0 and windows > 2:
        return _paired_segments(config, windows)
    first = max(first, 1)
    count = windows - first
    if count < 1:
        return ()
    together = min(plan.together, count)
    alone = count % together  # the first windows, whose histories are the shortest
    groups = np.arange(first + alone, windows).reshape(-1, together)
    missing = -len(groups) % split.window_parts  # devices without a window in the first round
    rounds = np.arange((len(groups) + missing) // split.window_parts)
    parts = np.array_split(rounds, min(plan.segments, len(rounds)))
    ends = [(part[-1] + 1) * split.window_parts - missing for part in parts]
    segments = [(groups[start:end].reshape(-1), together) for start, end in zip([0, *ends], ends)]
    if alone:
        segments = [(np.arange(first, first + alone), alone), *segments]
    return tuple(_segment(config, part, size, plan.chunk, split.row_parts) for part, size in segments)


def _paired_segments(config: ModelConfig, windows: int) -> tuple[Segment, ...]:
    """Returns one segment of all windows, in pairs; without window 0 if their number is odd."""
    first, size = windows % 2, config.generation_window
    observed = tuple(config.observed_rows(window * size) for window in range(first, windows))
    return (PairedSegment(first, observed, max(observed), (first + windows - 1) * size, together=2),)


def padded_length(config: ModelConfig, windows: int, segments: tuple[Segment, ...], row_parts: int = 1) -> int:
    """Returns the rows of a padded sequence: enough for every window's slices, and divisible by `row_parts`."""
    rows = max([windows * config.generation_window] + [segment.history_rows for segment in segments])
    return rows + -rows % row_parts


def _segment(config: ModelConfig, windows: np.ndarray, together: int, chunk: int, row_parts: int) -> Segment:
    lengths = windows * config.generation_window - config.window_overlap
    observed = np.array([config.observed_rows(int(length)) for length in lengths])
    width = int(max(observed.max(), 1))
    # With history_window 'auto' a slice of the segment's common width can reach past the end of a window's history.
    rows = max(int(lengths[-1]), int((lengths - observed).max()) + width)
    chunk = chunk if chunk * row_parts < rows else 0
    rows += -rows % (max(chunk, 1) * row_parts)
    return Segment(int(windows[0]), tuple(map(int, observed)), width, rows, chunk, together)


# ---- Rows of an array


def pad_rows(array: jax.Array, count: int) -> jax.Array:
    """Appends `count` rows of zeros to an array [batch, rows, ...]."""
    return jnp.pad(array, ((0, 0), (0, count), *((0, 0),) * (array.ndim - 2)))


def in_chunks(array: jax.Array, chunk: int) -> jax.Array:
    """Splits [batch, length, ...] into [length / chunk, batch, chunk, ...]."""
    return jnp.moveaxis(array.reshape(array.shape[0], -1, chunk, *array.shape[2:]), 1, 0)


def joined(chunks: jax.Array) -> jax.Array:
    """Inverts `in_chunks`."""
    array = jnp.moveaxis(chunks, 0, 1)
    return array.reshape(array.shape[0], -1, *array.shape[3:])


def window_rows(
    config: ModelConfig, array: jax.Array, first: int, count: int, together: int = 1, overlap: int = 0
) -> jax.Array:
    """Returns the rows of windows first .. first + count - 1 of an array [batch, rows, ...].

    Each window begins with the `overlap` rows before it; before the first window these are zeros. The result is
    [count / together, batch * together, overlap + W_og, ...].
    """
    batch, size = array.shape[0], config.generation_window
    rows = array[:, first * size : (first + count) * size]
    if overlap:
        before = array[:, max(first - 1, 0) * size : (first + count - 1) * size]
        if not first:
            before = jnp.pad(before, ((0, 0), (size, 0), *((0, 0),) * (array.ndim - 2)))
        before, rows = (part.reshape(batch, count, size, *array.shape[2:]) for part in (before, rows))
        rows = jnp.concatenate([before[:, :, size - overlap :], rows], axis=2)
        rows = rows.reshape(batch, -1, *array.shape[2:])
    groups = in_chunks(rows, together * (overlap + size))
    return groups.reshape(-1, batch * together, overlap + size, *array.shape[2:])


def slice_rows(
    array: jax.Array, start: PerWindow, length: int, batch: int | None = None, stride: int | None = None
) -> jax.Array:
    """Returns rows start .. start + length - 1 of an array [sequences, rows, ...].

    For g windows that run together, `start` is [g], the result is [batch = sequences * g, length, ...], and the array
    may be [batch, rows, ...], too. `stride` is the distance of neighbouring starts, None if it is not known.
    """
    if not np.ndim(start):
        return jax.lax.dynamic_slice_in_dim(array, start, length, axis=1)
    assert batch is not None
    count = len(start)
    parts = array.reshape(batch // count, -1, *array.shape[1:])
    if parts.shape[1] == 1 and stride == length:  # neighbours: one slice, whose gradient is no sum over windows
        rows = jax.lax.dynamic_slice_in_dim(parts[:, 0], start[0], count * length, axis=1)
        return rows.reshape(batch, length, *array.shape[2:])
    # Slices one by one: a batched slice is a gather, whose gradient would be a scatter.
    slices = [
        jax.lax.dynamic_slice_in_dim(parts[:, i % parts.shape[1]], start[i], length, axis=1) for i in range(count)
    ]
    return jnp.stack(slices, axis=1).reshape(batch, length, *array.shape[2:])


def repeat_for_windows(array: jax.Array, batch: int) -> jax.Array:
    """Repeats an array [sequences, ...], which windows of a sequence share, for each window: [batch, ...]."""
    return array if array.shape[0] == batch else jnp.repeat(array, batch // array.shape[0], axis=0)
