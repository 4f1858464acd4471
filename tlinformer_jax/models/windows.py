"""Generation windows: where each stands, and how a sequence's windows are cut into scans."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.models.config import ModelConfig


@flax.struct.dataclass
class ContextState:
    """The scan's carry: the position of the context, never the context itself.

    A carry that held the growing history would be saved once per window by reverse-mode differentiation.

    Attributes:
      window: index w of the generation window, int32 [].
      history_length: n, tokens before the window, int32 [].
    """

    window: jax.Array
    history_length: jax.Array

    def next(self, generation_window: int) -> "ContextState":
        """The state of the following window."""
        return ContextState(self.window + 1, self.history_length + generation_window)


@flax.struct.dataclass
class WindowFrame:
    """Where one generation window and its historical observation window stand.

    Attributes:
      history_length: n, the first position of the generation window, int32 [].
      observed_start: h, the first row of the observation window, int32 [].
      observed_length: rows of the observation window that are valid, n - h, int32 [].
      observed_width: rows that are computed for it (static), at least `observed_length`; the rows past the
        valid ones belong to the future and are never attended to.
    """

    history_length: jax.Array
    observed_start: jax.Array
    observed_length: jax.Array
    observed_width: int = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Segment:
    """Consecutive windows that one scan handles with one static history length.

    Attributes:
      first: index of the first window.
      observed: valid rows of the observation window, one number per window.
      observed_width: the largest of `observed`.
      history_rows: rows of history that every window of the segment reads, the valid ones first.
    """

    first: int
    observed: tuple[int, ...]
    observed_width: int
    history_rows: int

    @property
    def count(self) -> int:
        """Number of windows."""
        return len(self.observed)

    def initial_state(self, generation_window: int) -> ContextState:
        """The carry before the segment's first window."""
        return ContextState(jnp.int32(self.first), jnp.int32(self.first * generation_window))

    def frame(self, state: ContextState, observed: jax.Array) -> WindowFrame:
        """The frame of the window at `state` whose observation window has `observed` valid rows."""
        start = state.history_length - observed
        return WindowFrame(state.history_length, start, observed, self.observed_width)


def num_windows(config: ModelConfig, length: int) -> int:
    """Generation windows of a sequence of `length` tokens; the last may be shorter."""
    return -(-length // config.generation_window)


def plan_segments(config: ModelConfig, windows: int) -> tuple[Segment, ...]:
    """Cuts windows 1 .. windows - 1 into at most `config.history_segments` runs; window 0 has no history."""
    if windows <= 1:
        return ()
    parts = np.array_split(np.arange(1, windows), min(config.history_segments, windows - 1))
    return tuple(_segment(config, part) for part in parts)


def padded_length(config: ModelConfig, windows: int, segments: tuple[Segment, ...]) -> int:
    """Rows to which a sequence is padded so that every slice a window takes lies inside it."""
    return max([windows * config.generation_window] + [segment.history_rows for segment in segments])


def _segment(config: ModelConfig, windows: np.ndarray) -> Segment:
    lengths = windows * config.generation_window
    observed = np.array([config.observed_rows(int(length)) for length in lengths])
    width = int(max(observed.max(), 1))
    # With the dynamic window a slice of the segment's common width can reach past its own history's end.
    reach = int((lengths - observed).max()) + width
    return Segment(int(windows[0]), tuple(map(int, observed)), width, max(int(lengths[-1]), reach))
