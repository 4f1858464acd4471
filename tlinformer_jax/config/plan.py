"""How a model is executed: what trades memory, speed and compile time against each other, and changes no result."""

import dataclasses

MEMORY = ("auto", "low")
# A sequence of at most so many windows is differentiated as a whole. Of a longer one each window's gradients are made
# along with its loss, since what differentiation keeps grows with the square of the sequence.
FEW_WINDOWS = 8
# Masked rows of so short a history cost less than a second program, and one window at a time leaves a device idle.
SHORT_SEQUENCE = 1024
# More layers than this are compiled once and looped over, in one segment: libtpu takes an hour otherwise.
MOST_UNROLLED = 20
# The inner values of more rows than this do not fit beside a history of a million tokens on one device.
WHOLE_HISTORY, CHUNK = 1 << 20, 1 << 16


@dataclasses.dataclass(frozen=True)
class ExecutionPlan:
    """An explicit plan; equal plans of equal models are equal programs.

    Attributes:
      segments: loops that the windows are cut into, each with one static history length; masked history wastes at most
        1 / segments of the work, and each loop is a program of its own.
      together: generation windows with history that are computed together, as if they were more sequences; they share
        what the longest history of them costs.
      chunk: rows of the history that `restore` computes at a time, each chunk again in the backward pass; 0 for all.
      scan_layers: compile runs of equal layers once and loop over them, which compiles faster and runs slower.
      checkpointing: keep nothing of a window for the backward pass but its gradients, and of the baselines' layers
        their inputs only.
    """

    segments: int = 1
    together: int = 1
    chunk: int = 0
    scan_layers: bool = True
    checkpointing: bool = False

    def __str__(self) -> str:
        parts = [f"{self.segments} segment{'s' if self.segments > 1 else ''} of windows", f"{self.together} at a time"]
        parts.append(f"history in chunks of {self.chunk:,} rows" if self.chunk else "history whole")
        parts.append("layers scanned" if self.scan_layers else "layers unrolled")
        return ", ".join((*parts, "checkpointing" if self.checkpointing else "no checkpointing"))


def make_plan(memory: str, platform: str, windows: int, window: int, layers: int, windowed: bool) -> ExecutionPlan:
    """The plan for a sequence.

    Args:
      memory: 'auto', or 'low' for the longest sequences that one device can hold.
      platform: 'cpu', 'gpu' or 'tpu'.
      windows: generation windows of the sequence that are wanted.
      window: tokens of each.
      layers: of the model.
      windowed: whether the architecture works by generation windows.
    """
    low, few, length = memory == "low", windows <= FEW_WINDOWS, windows * window
    deep = layers > MOST_UNROLLED
    several = 8 if low and not few else 2 - deep
    return ExecutionPlan(
        segments=1 if length <= SHORT_SEQUENCE else several,
        together=windows if platform != "cpu" and not low and (few or length <= SHORT_SEQUENCE) else 1,
        chunk=CHUNK if low and length > WHOLE_HISTORY else 0,
        scan_layers=platform == "cpu" or deep,
        checkpointing=low or (windowed and not few),
    )
