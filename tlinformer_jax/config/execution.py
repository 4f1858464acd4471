"""How a model is executed: in which order and groups windows run, and what is stored for the backward pass."""

import dataclasses

from tlinformer_jax.errors import TRUE_OR_FALSE, check_fields, integer


@dataclasses.dataclass(frozen=True)
class ExecutionPlan:
    """How a model is executed. Equal plans of equal models give equal programs.

    Attributes:
      segments: number of loops over windows, each with one static history length. Masked history wastes at most
        1 / segments of the work; each loop is compiled separately.
      together: windows with history that are computed together, like more sequences of a batch; each costs as much as
        the one with the longest history, unless a kernel skips masked keys.
      chunk: rows of the history that `restore` computes at a time, and again in the backward pass; 0 for all at once.
      scan_layers: whether equal layers are compiled once and looped over, which compiles faster and runs slower.
      checkpointing: whether activations are computed again in the backward pass instead of stored. Then a window stores
        only its gradients, and a layer of a baseline only its input.
      paired: whether a device that trains all windows of whole sequences computes them in pairs, the longest history
        with the shortest (`models.paired`), instead of in segments; needs `ModelConfig.pairable` and `checkpointing`.
    """

    segments: int = 1
    together: int = 1
    chunk: int = 0
    scan_layers: bool = True
    checkpointing: bool = False
    paired: bool = False

    def __post_init__(self) -> None:
        rules = dict.fromkeys(("scan_layers", "checkpointing", "paired"), TRUE_OR_FALSE)
        rules |= {"segments": integer(1), "together": integer(1), "chunk": integer(0)}
        check_fields("model.memory", self, rules)

    @property
    def one_at_a_time(self) -> "ExecutionPlan":
        """This plan where windows are sampled, or devices split sequences: each window runs alone."""
        return dataclasses.replace(self, together=1, paired=False)

    def __str__(self) -> str:
        parts = [f"{self.segments} segment{'s' if self.segments > 1 else ''} of windows", f"{self.together} at a time"]
        parts = ["windows in pairs of a long and a short history"] if self.paired else parts
        parts.append(f"history in chunks of {self.chunk:,} rows" if self.chunk else "history whole")
        parts.append("layers scanned" if self.scan_layers else "layers unrolled")
        return ", ".join((*parts, "checkpointing" if self.checkpointing else "no checkpointing"))
