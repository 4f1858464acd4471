"""What keys know of the tokens before theirs: `config.token_shift` and `config.key_taps`.

Rows of the history C never read each other, so a query could not find a row by the tokens before it. Both options add
learned multiples of the embeddings e_(t-1), e_(t-2), ... to the input of a `compress` layer's keys:

    token shift, block 0, keys of C and x:   e_t + s * e_(t-1)
    key taps, later blocks, keys of C':      C'_t + sum over k = 1..K of s_k * e_(t-k)

Recall then takes one layer: no layer has to copy the token before to a row first. The sums of the key taps use
embeddings, not rows of C', so they are computed once for a sequence, and no device or chunk needs rows of another.
"""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tlinformer_jax.models.layers import Embedded

# Id for a token before position 0 or before the first token of a document: there is none.
NO_TOKEN = -1
# Factor from a parameter to s. An update of Adam changes a parameter by about the learning rate: at 3e-4 and without
# this factor, s would hardly leave 0 in a run, but must reach the order of 1.
SHIFT_SCALE = 10.0


def embedded(
    shift: Float[Array, " D"] | None,
    taps: Sequence[Float[Array, "K D"]],
    rows: Float[Array, "*shape D"],
    before: Sequence[Float[Array, "*shape D"]] | None = None,
    documents: Int[Array, "batch whole"] | None = None,
) -> Embedded:
    """Returns embeddings with what the options need.

    Args:
      shift: the parameter; None without `config.token_shift`.
      taps: the parameter of each later block; empty without `config.key_taps`.
      rows: e_t.
      before: e_(t-1), e_(t-2), ..., as far as the options need them; zeros where there is no token. None if `rows` are
        sequences [batch, length, D] from position 0 on.
      documents: see `Embedded`; tokens of another document count as none.
    """
    if before is None:
        most = max([0 if shift is None else 1, *map(len, taps)])
        before = [rows_before(rows, back, documents) for back in range(1, most + 1)]
    key_rows = None if shift is None else plus(rows, weighted_sum(shift[None], before))
    return Embedded(rows, key_rows, documents, tuple(tap_sum(vectors, before) for vectors in taps))


def rows_before(
    rows: Float[Array, "batch length D"], back: int, documents: Int[Array, "batch whole"] | None = None
) -> Float[Array, "batch length D"]:
    """Returns the row `back` positions before each row of a sequence; zeros where there is none."""
    before = jnp.pad(rows, ((0, 0), (back, 0), (0, 0)))[:, : rows.shape[1]]
    return before if documents is None else jnp.where(begins(documents, back)[..., None], 0, before)


def tokens_before(
    tokens: Int[Array, "batch length"], documents: Int[Array, "batch length"] | None = None, back: int = 1
) -> Int[Array, "batch length"]:
    """Returns the id `back` positions before each token; NO_TOKEN where there is none in the same document."""
    before = jnp.pad(tokens, ((0, 0), (back, 0)), constant_values=NO_TOKEN)[:, : tokens.shape[1]]
    return before if documents is None else jnp.where(begins(documents, back), NO_TOKEN, before)


def begins(documents: Int[Array, "batch length"], back: int = 1) -> Bool[Array, "batch length"]:
    """Returns whether each row is among the first `back` rows of its document."""
    return documents != jnp.pad(documents, ((0, 0), (back, 0)), constant_values=-1)[:, : documents.shape[1]]


def weighted_sum(vectors: Float[Array, "K D"], before: Sequence[Float[Array, "*shape D"]]) -> Float[Array, "*shape D"]:
    """Returns the sum over k = 1..K of s_k * before_k in float32, where s = SHIFT_SCALE * vectors."""
    scales = SHIFT_SCALE * vectors.astype(jnp.float32)
    return functools.reduce(jnp.add, [scale * rows.astype(jnp.float32) for scale, rows in zip(scales, before)])


def tap_sum(vectors: Float[Array, "K D"], before: Sequence[Float[Array, "*shape D"]]) -> Float[Array, "*shape D"]:
    """Returns what the key taps of a block add to the input of the keys of C', in the dtype of the embeddings."""
    return weighted_sum(vectors, before).astype(before[0].dtype)


def plus(rows: Float[Array, "*shape D"], total: Float[Array, "*shape D"]) -> Float[Array, "*shape D"]:
    """Returns rows + total, summed in float32, in the rows' dtype."""
    return (rows.astype(jnp.float32) + total.astype(jnp.float32)).astype(rows.dtype)
