"""Which attention weights are dropped: a function of a key and of the weight's place, cheap enough for a GPU kernel.

A row of weights, that is a query of one head, has a state of 64 bits: Threefry-2x32, `jax.random`'s own generator, of
(batch row times heads + head, query) under the key. A weight's 32 bits are the state and the key's number through two
rounds of shift, xor and multiplication, about eight integer operations; the row's second word joins in between, so that
rows whose first words happen to lie a few steps apart share nothing. A weight is dropped where its bits are below the
rate times 2^32.
"""

import jax
import jax.numpy as jnp
import numpy as np

# Step of the first word from key to key (2^32 over the golden ratio), and two multipliers that mix 32 bits well.
STEP, FIRST, SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B


def dropout_mask(words: jax.Array, batch: int, heads: int, queries: int, keys: int, rate: float) -> jax.Array:
    """Which weights the kernels keep, bool [batch, heads, queries, keys], for the key `words` uint32 [2]."""
    softmax = jnp.arange(batch * heads, dtype=jnp.uint32).reshape(batch, heads, 1, 1)
    row = jnp.arange(queries, dtype=jnp.uint32)[:, None]
    state = threefry(words[0], words[1], *jnp.broadcast_arrays(softmax, row))
    return kept(*state, jnp.arange(keys), rate)


def threefry(first: jax.Array, second: jax.Array, *counter: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds of a pair of counters under a key of two words, all uint32."""
    schedule = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    x, y = counter[0] + first, counter[1] + second
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = ((y << np.uint32(turn)) | (y >> np.uint32(32 - turn))) ^ x
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x, y


def kept(first: jax.Array, second: jax.Array, keys: jax.Array, rate: float) -> jax.Array:
    """Whether weights are kept, by their row's state and their key's number, which broadcast."""
    bits = first + keys.astype(jnp.uint32) * np.uint32(STEP)
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(FIRST)
    bits = (bits ^ (bits >> np.uint32(15)) ^ second) * np.uint32(SECOND)
    return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
