"""Windows in pairs, whose histories share one array: a long history and a short one fill it exactly.

A loop over windows has static shapes. One window at a time, each would cost as much as the longest of its loop. In
pairs (w, s - w) both histories together always have s * W_og rows. The equations of `models.block` see two windows that
run together; only the history differs. It has the rows of the long history from the front, and those of the short one
from the back, in reverse order:

    rows of the long history ->  0 1 2 3 4 5 6 7 8 | 2 1 0  <- rows of the short history

Attention does not depend on the order of keys, and everything else works row by row.

On an H200 at N = 8,192 a training step takes 8% less time with 41M parameters and 12% less with 125M. With at most 8
windows it is no faster than groups (docs/performance.md).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.attention import attend
from tlinformer_jax.models.history import History, RestoreLayer, ZMask, keyed
from tlinformer_jax.models.layers import Dropout, LayerParams, part_of, project
from tlinformer_jax.models.streams import Stream, attention_options
from tlinformer_jax.models.windows import PerWindow, slice_rows


@flax.struct.dataclass
class PairedHistory(History):
    """The histories of two windows that run together, of each of `batch` sequences.

    At first both are the beginning of the same sequence, and the arrays hold each row once. `restore` puts them side by
    side: windows read different observation windows, so their rows of C' differ.

    Attributes:
      size: W_og; each history has a multiple of it.
      longest_second: most rows that the short history can have.
      restored: whether the arrays hold the rows of both histories, as drawn above.
      never_empty: whether the short history always has a row; the long one has.
    """

    size: int = flax.struct.field(pytree_node=False, default=0)
    longest_second: int = flax.struct.field(pytree_node=False, default=0)
    restored: bool = flax.struct.field(pytree_node=False, default=False)

    def second(self, array: Array) -> Array:
        """Returns the rows of the short history in order, with others after them; `longest_second` rows."""
        return jnp.flip(array, 1)[:, : self.longest_second] if self.restored else array[:, : self.longest_second]

    def both(self, array: Array, axis: int = 1) -> Array:
        """Returns the rows of both histories in one array, given those of the sequence."""
        rows, first = array.shape[axis], array.shape[axis] - self.longest_second
        always, sometimes = jax.lax.split(array, (first, self.longest_second), axis=axis)
        short = jnp.flip(jax.lax.slice_in_dim(array, 0, self.longest_second, axis=axis), axis)
        shape = [1] * array.ndim
        shape[axis] = self.longest_second
        long = (np.arange(first, rows) < self.length[0]).reshape(shape)
        return jnp.concatenate([always, jnp.where(long, sometimes, short)], axis=axis)

    def slice(
        self, array: Array, start: PerWindow, length: int, batch: int | None = None, stride: int | None = None
    ) -> Array:
        """Returns rows start .. start + length - 1 of each window's history: [batch, length, ...]; `start` is [2]."""
        if not self.restored:
            return slice_rows(array, start, length, batch)
        long, short = (
            jax.lax.dynamic_slice_in_dim(rows, first, length, axis=1)
            for rows, first in zip((array, self.second(array)), start)
        )
        return jnp.stack([long, short], axis=1).reshape(-1, *long.shape[1:])

    def read(
        self, query: Float[Array, "b m h k"], config: ModelConfig, dropout: Dropout | None, *readers: Stream
    ) -> Float[Array, "b m h k"]:
        """Returns attend(Q, Kc, Vc), where each window's queries read its own history."""
        documents = None if self.documents is None else self.documents[:, : self.longest_second]
        short = dataclasses.replace(self, K=self.second(self.K), V=self.second(self.V), documents=documents)
        found = []
        for number, keys in enumerate((dataclasses.replace(self, never_empty=True), short)):
            keys = dataclasses.replace(keys, length=self.length[number])
            own = [Stream(None, documents=_of_window(number, reader.documents)) for reader in readers]
            options = attention_options(config, part_of(dropout, number), keys, *own)
            found.append(attend(_of_window(number, query), keys.K, keys.V, **options))
        return jnp.stack(found, axis=1).reshape(query.shape)

    def restore(
        self, restore_rows: Callable[..., Array], layer: RestoreLayer, mask: ZMask, next_layer: LayerParams, parts: str
    ) -> "PairedHistory":
        """Returns C', projected by `next_layer`; see `History.restore`. Every z must be full."""
        assert self.rope is not None
        count = self.rows.shape[1]
        rope = jax.tree.map(lambda table: self.both(table[:count], 0), self.rope)
        long = jnp.arange(count // self.size) < self.length[0] // self.size

        def blocks(array: Array) -> Array:
            return array.reshape(-1, self.size, *array.shape[2:])

        def attend_blocks(query: Array, key: Array, value: Array, **options: Any) -> Array:
            # Blocks of W_og rows are a batch, each with the keys of its window.
            return attend(blocks(query), choose(key, long), choose(value, long), **options).reshape(query.shape)

        documents, mask = None, mask._replace(length=None)
        if self.documents is not None:
            documents = blocks(self.both(self.documents))
            mask = mask._replace(documents=choose(mask.documents, long))
        rows, sums = (self.rows, self.Q), self.key_sums
        if not self.restored:
            rows, sums = jax.tree.map(self.both, (rows, sums))
        restored = restore_rows(*rows, layer, mask, documents, attend=attend_blocks)
        projected = project(next_layer, restored, rope, parts, keyed(restored, sums))
        arrays: dict[str, Any] = {"rows": restored, "Q": None, **dict(zip(parts.upper(), projected))}
        return dataclasses.replace(self, restored=True, key_sums=sums[1:], **arrays)


def _of_window(number: int, array: Any) -> Any:
    """Returns the rows of the first or the second window of each pair, [batch, ...] of [batch * 2, ...]."""
    return None if array is None else array.reshape(-1, 2, *array.shape[1:])[:, number]


@jax.custom_vjp
def choose(array: Array, long: Array) -> Array:
    """Returns for each block a copy of its window's rows: [batch * blocks, ...] of [batch * 2, ...]."""
    first, second = _of_window(0, array)[:, None], _of_window(1, array)[:, None]
    chosen = jnp.where(long.reshape(-1, *(1,) * (array.ndim - 1)), first, second)
    return chosen.reshape(-1, *array.shape[1:])


def _choose_backward(long: Array, gradient: Array) -> tuple[Array, None]:
    # In bfloat16 a sum over all blocks would be rounded after each.
    each = gradient.reshape(-1, len(long), *gradient.shape[1:]).astype(jnp.float32)
    long = long.reshape(-1, *(1,) * (gradient.ndim - 1))
    sums = [jnp.sum(jnp.where(long == number, each, 0.0), axis=1) for number in (True, False)]
    return jnp.stack(sums, axis=1).reshape(-1, *gradient.shape[1:]).astype(gradient.dtype), None


choose.defvjp(lambda array, long: (choose(array, long), long), _choose_backward)
