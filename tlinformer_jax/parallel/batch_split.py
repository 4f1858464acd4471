"""A batch split over a mesh: each device's program is explicit, and what they exchange is one sum.

Axes over which parameters are copies (`data`, `window`, `context`) are manual in one `jax.shard_map` around loss and
gradient. Over `fsdp` and `tensor`, which split parameters, the compiler partitions. So on meshes without these two a
device runs the program of one device, with the kernels that only such programs can use.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from tlinformer_jax.parallel.constraints import BATCH_AXES
from tlinformer_jax.parallel.sequence_split import WHOLE, SequenceSplit, SplitWindows
from tlinformer_jax.parallel.split_rows import SplitRows

PARTITIONED = ("fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class BatchSplit:
    """How a batch is split.

    Attributes:
      manual: axes of the mesh that are manual; empty where the compiler partitions everything, or there is one device.
      batch: those of them that split the batch.
      sequence: how each sequence is split.
    """

    manual: tuple[str, ...] = ()
    batch: tuple[str, ...] = ()
    sequence: SequenceSplit = WHOLE

    @classmethod
    def of(cls, mesh: AbstractMesh) -> "BatchSplit":
        """That over a mesh."""
        sizes = dict(mesh.shape)
        manual = tuple(name for name, size in sizes.items() if name not in PARTITIONED or size == 1)
        if all(sizes[name] == 1 for name in manual):
            return cls()
        window, context = sizes.get("window", 1), sizes.get("context", 1)
        split = SequenceSplit(
            SplitWindows("window", window) if window > 1 else None,
            SplitRows("context", context) if context > 1 else None,
        )
        return cls(manual, tuple(name for name in BATCH_AXES if name in manual and sizes[name] > 1), split)

    def shard_index(self) -> jax.Array | int:
        """Of this device's part of the batch."""
        return jax.lax.axis_index(self.batch) if self.batch else 0

    def psum(self, values: Any) -> Any:
        """The sums over the parts of the batch and of its sequences, of a pytree of each device's values."""
        axes = (*self.batch, *self.sequence.axes)
        return jax.lax.psum(values, axes) if axes else values

    def over_devices(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(batch, *whole)`, run by every device.

        Args:
          function: of this device's part of the batch, a pytree of arrays [batch, ...], and of what all have whole; its
            results are the same on all.
        """
        if not self.manual:
            return function

        def spread(batch: Any, *whole: Any) -> Any:
            specs = (PartitionSpec(self.batch or None), *(PartitionSpec() for _ in whole))
            mapped = jax.shard_map(
                function, axis_names=set(self.manual), in_specs=specs, out_specs=PartitionSpec(), check_vma=False
            )
            return mapped(batch, *whole)

        return spread


# On one device.
UNSPLIT = BatchSplit()
