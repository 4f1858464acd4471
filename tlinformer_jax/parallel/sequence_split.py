"""How the sequences of a batch are split over the mesh's axes `window` and `context` in training.

Every device has a share of the sum over windows: those of the axis `window` take windows of their own, those of the
axis `context` hold the history in parts and take rows of their own of a window's loss. The shares' sum is the loss,
and the sum of the shares' gradients its gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.parallel.split_rows import SplitRows

# Marks a place of `assign_windows` that no window takes.
NO_WINDOW = -1


@dataclasses.dataclass(frozen=True)
class SplitWindows:
    """Windows split over an axis of the mesh, manual where this is used; `parts` is its size."""

    axis: str
    parts: int

    def mine(self, assigned: np.ndarray) -> jax.Array:
        """This device's column of [rounds, parts], int32 [rounds]."""
        return jnp.asarray(assigned, jnp.int32)[:, jax.lax.axis_index(self.axis)]


@dataclasses.dataclass(frozen=True)
class SequenceSplit:
    """The two splits; None where sequences are not split in this way."""

    windows: SplitWindows | None = None
    rows: SplitRows | None = None

    @property
    def window_parts(self) -> int:
        """Devices that windows are split over."""
        return self.windows.parts if self.windows else 1

    @property
    def row_parts(self) -> int:
        """Devices that rows are split over."""
        return self.rows.parts if self.rows else 1

    @property
    def axes(self) -> tuple[str, ...]:
        """Of the mesh, that split sequences."""
        return tuple(split.axis for split in (self.windows, self.rows) if split)


WHOLE = SequenceSplit()


def assign_windows(count: int, parts: int, loads: np.ndarray, first: int = 0) -> np.ndarray:
    """Deals windows out in rounds of `parts` neighbours, whose shapes are alike.

    Of a round, whoever has least so far gets the longest window: its cost grows with its index.

    Args:
      count: of windows.
      parts: devices.
      loads: float64 [parts], what each has so far; changed.
      first: index of the first window.

    Returns:
      places 0 .. count - 1, int32 [rounds, parts]; NO_WINDOW in the first round where they do not go into whole rounds.
    """
    rounds = -(-count // parts)
    assigned = np.full((rounds, parts), NO_WINDOW, np.int32)
    places = np.arange(rounds * parts, dtype=np.int32) - (rounds * parts - count)
    for number in reversed(range(rounds)):
        for place in reversed(places[number * parts : (number + 1) * parts]):
            if place < 0:
                break
            free = np.flatnonzero(assigned[number] == NO_WINDOW)
            device = free[np.argmin(loads[free])]
            assigned[number, device] = place
            loads[device] += first + place + 1
    return assigned
