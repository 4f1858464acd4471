"""What runs through a dual-window block besides the generation window: the history stream and projections of rows."""

import flax.struct
import jax

from tlinformer_jax.models.layers import LayerParams, project
from tlinformer_jax.models.rope import Rope
from tlinformer_jax.models.windows import Place, slice_rows
from tlinformer_jax.parallel.split_rows import SplitRows


@flax.struct.dataclass
class BlockParams:
    """Parameters of one block."""

    compress: LayerParams
    hidden: tuple[LayerParams, ...]
    restore: LayerParams

    def layers(self) -> tuple[LayerParams, ...]:
        """All layers of the block in order."""
        return (self.compress, *self.hidden, self.restore)


@flax.struct.dataclass
class Projected:
    """Queries, keys and values of the same rows under one layer, each [batch, rows, heads, d_h], q and k rotated.

    The queries are None where nobody reads them.
    """

    query: jax.Array | None
    key: jax.Array
    value: jax.Array

    @classmethod
    def of(cls, params: LayerParams, rows: jax.Array, rope: Rope, parts: str = "qkv") -> "Projected":
        """`layers.project` of rows, 'qkv' or 'kv'."""
        return cls(*((None,) if parts == "kv" else ()), *project(params, rows, rope, parts))

    def rows(self, start: Place, length: int, folded: int | None = None) -> "Projected":
        """Rows start .. start + length - 1, by `slice_rows`."""
        return jax.tree.map(lambda array: slice_rows(array, start, length, folded), self)


@flax.struct.dataclass
class History:
    """The history stream at a block's entrance.

    Attributes:
      rows: C, [batch, rows, D]; rows past the frame's history_length are the future and never attended to. Where g
        windows run together, either [batch, ...], which they share, or [batch * g, ...].
      projected: of C under the block's `compress` layer; with queries where the block restores the history.
      split: how rows are dealt out over devices, each of which holds only its own; None where each holds all.
    """

    rows: jax.Array
    projected: Projected
    split: SplitRows | None = flax.struct.field(pytree_node=False, default=None)

    def part(self, array: jax.Array, start: Place, length: int, folded: int | None = None) -> jax.Array:
        """Rows start .. start + length - 1 of the sequence, of one of these arrays, on every device; `folded` as in
        `slice_rows`."""
        if self.split is None:
            return slice_rows(array, start, length, folded)
        return self.split.gather(array, start, length)


@flax.struct.dataclass
class Following:
    """The block that reads the restored history.

    Attributes:
      compress: its first layer.
      parts: what that projects of all rows: 'qkv' where it restores them in its turn, else 'kv'.
    """

    compress: LayerParams
    parts: str = flax.struct.field(pytree_node=False)
