"""Windows in pairs, whose histories share one array: a long history and a short one fill it exactly.

A loop over windows has static shapes. One window at a time, each would cost as much as the longest of its loop. In
pairs (w, s - w) both histories together always have s * W_og rows. The equations of `models.block` see two windows that
run together; only the history differs. It has the rows of the long history from the front, and those of the short one
from the back, in reverse order:

    rows of the long history ->  0 1 2 3 4 5 6 7 8 | 2 1 0  <- rows of the short history

Attention does not depend on the order of keys, and everything else works row by row.

Not timed yet, so no `model.memory` chooses it. Compiled for an H100, a training step of the 41M model at N = 8,192 has
13% fewer operations and accesses a fifth fewer bytes (docs/performance.md).
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
from tlinformer_jax.models.layers import Dropout, LayerParams, part_of, project
from tlinformer_jax.models.streams import History, Stream, attention_options
from tlinformer_jax.models.windows import PerWindow, repeat_for_windows, slice_rows


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

    @property
    def pairs(self) -> int:
        """Pairs of windows that run together."""
        return len(self.length) // 2

    def both(self, array: Array) -> Array:
        """Returns the rows of both histories in one array for each pair, given those of each sequence or pair."""
        rows, first = array.shape[1], array.shape[1] - self.longest_second
        array = array if self.restored else repeat_for_windows(array, array.shape[0] * self.pairs)
        always, sometimes = jax.lax.split(array, (first, self.longest_second), axis=1)
        short = jnp.flip(array[:, : self.longest_second], 1)
        long = np.arange(first, rows) < self.length[::2, None]
        long = jnp.tile(long, (array.shape[0] // self.pairs, 1)).reshape(*short.shape[:2], *(1,) * (array.ndim - 2))
        return jnp.concatenate([always, jnp.where(long, sometimes, short)], axis=1)

    def slice(self, array: Array, start: PerWindow, length: int, batch: int | None = None) -> Array:
        """Returns rows start .. start + length - 1 of each window's history: [batch, length, ...]; `start` is [2]."""
        if not self.restored:
            return slice_rows(array, start, length, batch)
        parts = [
            slice_rows(rows, start[number::2], length, len(array)) for number, rows in enumerate((array, self.second(array)))
        ]
        return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])

    def read(
        self, query: Float[Array, "b m h k"], config: ModelConfig, dropout: Dropout | None, *readers: Stream
    ) -> Float[Array, "b m h k"]:
        """Returns attend(Q, Kc, Vc), where each window's queries read its own history."""
        documents = None if self.documents is None else self.documents[:, : self.longest_second]
        short = dataclasses.replace(self, K=self.second(self.K), V=self.second(self.V), documents=documents)
        found = []
        for number, keys in enumerate((dataclasses.replace(self, never_empty=True), short)):
            repeated = (keys.K, keys.V, keys.documents)
            K, V, documents = jax.tree.map(lambda array: repeat_for_windows(array, len(query) // 2), repeated)
            keys = dataclasses.replace(keys, length=self.length[number::2], K=K, V=V, documents=documents)
            own = [Stream(None, documents=_of_window(number, reader.documents)) for reader in readers]
            options = attention_options(config, part_of(dropout, number), keys, *own)
            found.append(attend(_of_window(number, query), keys.K, keys.V, **options))
        return jnp.stack(found, axis=1).reshape(query.shape)

    def restore(
        self, restore_rows: Callable[..., Array], shared: Any, fixed: Any, next_layer: LayerParams, parts: str
    ) -> "PairedHistory":
        """Returns C', projected by `next_layer`; see `History.restore`. Every z must be full."""
        _, read, dropout = fixed
        assert self.rope is not None
        count = self.rows.shape[1]
        rope = jax.tree.map(lambda table: dataclasses.replace(self, restored=False).both(table[None, :count]), self.rope)
        rope = rope if self.pairs > 1 else jax.tree.map(lambda table: table[0], rope)
        long = jnp.arange(count // self.size) < self.length[::2, None] // self.size
        long = jnp.tile(long, (len(shared[-1]) // len(self.length), 1))

        def blocks(array: Array) -> Array:
            return array.reshape(-1, self.size, *array.shape[2:])

        def attend_blocks(query: Array, key: Array, value: Array, **options: Any) -> Array:
            # Blocks of W_og rows are a batch, each with the keys of its window.
            return attend(blocks(query), choose(key, long), choose(value, long), **options).reshape(query.shape)

        documents = None
        if self.documents is not None:
            unrestored = dataclasses.replace(self, restored=False)
            documents, read = blocks(unrestored.both(self.documents)), choose(read, long)
        rows = (self.rows, self.Q) if self.restored else (self.both(self.rows), self.both(self.Q))
        restored = restore_rows(*rows, shared, (None, read, dropout), documents, attend=attend_blocks)
        projected = project(next_layer, restored, rope, parts)
        arrays: dict[str, Any] = {"rows": restored, "Q": None, **dict(zip(parts.upper(), projected))}
        return dataclasses.replace(self, restored=True, **arrays)


def _of_window(number: int, array: Any) -> Any:
    """Returns the rows of the first or the second window of each pair, [batch, ...] of [batch * 2, ...]."""
    return None if array is None else array.reshape(-1, 2, *array.shape[1:])[:, number]


@jax.custom_vjp
def choose(array: Array, long: Array) -> Array:
    """Returns for each block a copy of its window's rows: [batch * blocks, ...] of [batch * 2, ...]."""
    first, second = _of_window(0, array)[:, None], _of_window(1, array)[:, None]
    chosen = jnp.where(long.reshape(*long.shape, *(1,) * (array.ndim - 1)), first, second)
    return chosen.reshape(-1, *array.shape[1:])


def _choose_backward(long: Array, gradient: Array) -> tuple[Array, None]:
    # In bfloat16 a sum over all blocks would be rounded after each.
    each = gradient.reshape(*long.shape, *gradient.shape[1:]).astype(jnp.float32)
    long = long.reshape(*long.shape, *(1,) * (gradient.ndim - 1))
    sums = [jnp.sum(jnp.where(long == number, each, 0.0), axis=1) for number in (True, False)]
    return jnp.stack(sums, axis=1).reshape(-1, *gradient.shape[1:]).astype(gradient.dtype), None


choose.defvjp(lambda array, long: (choose(array, long), long), _choose_backward)
