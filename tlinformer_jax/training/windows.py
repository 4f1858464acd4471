"""Window sampling: a training step on k of a sequence's n generation windows.

Windows are independent given the embeddings, so the gradient of k of them, drawn without replacement with equal
probabilities and weighted by n / k, is right in expectation; a step on a very long sequence then costs its embeddings,
block 0's projections and k windows. All sequences of a micro-batch take the same windows.
"""

import jax
import jax.numpy as jnp

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.windows import num_windows


def draw_windows(key: jax.Array, config: ModelConfig, length: int, count: int) -> jax.Array | None:
    """`count` different windows of a sequence of `length` tokens, int32 [count]; None if those are all.

    They are sorted, so that a loop through them goes from short histories to long ones.
    """
    windows = num_windows(config, length)
    if count == 0 or count >= windows:
        return None
    return jnp.sort(jax.random.permutation(key, windows)[:count]).astype(jnp.int32)


def window_weight(config: ModelConfig, length: int, windows: jax.Array | None) -> float:
    """n / k, by which the sampled windows' losses count."""
    return 1.0 if windows is None else num_windows(config, length) / windows.shape[0]


def trained_tokens(config: ModelConfig, length: int, sampled_windows: int) -> float:
    """Tokens of a sequence that a step predicts: all, or the expected number of those of the sampled windows.

    The last window may be shorter than the others.
    """
    windows = num_windows(config, length)
    return length * sampled_windows / windows if 0 < sampled_windows < windows else float(length)
