"""The device loop: feeds tokens and samples the next ones without the host until a window is full."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import Cache
from tlinformer_jax.decoding.decoder import step
from tlinformer_jax.decoding.params import DecoderParams
from tlinformer_jax.decoding.sampling import Sampler, mark_seen, sample
from tlinformer_jax.decoding.spread import over_devices

# Most tokens that one call returns for each sequence.
MAX_STEPS = 256
# Steps between two tests of the loop's condition: each test waits for the host, longer than a short step takes.
STEPS_PER_TEST = 4


@flax.struct.dataclass
class Sequences:
    """State of each sequence beside its cache.

    Attributes:
      token: sampled last and not yet fed.
      keys: of the random numbers.
      active: false for sequences that have ended.
      seen: tokens of prompt and continuation; None without a repetition penalty.
    """

    token: Int[Array, " batch"]
    keys: Key[Array, " batch"]
    active: Bool[Array, " batch"]
    seen: Bool[Array, "batch V"] | None


Tokens = Int[Array, "steps batch"]
LogProbs = Float[Array, "steps batch"] | None


def sample_next(
    sampler: Sampler,
    stop_tokens: Int[Array, " stops"],
    sequences: Sequences,
    positions: Int[Array, " batch"],
    logits: Float[Array, "batch V"],
) -> tuple[Sequences, Int[Array, " batch"], Float[Array, " batch"] | None]:
    """Samples tokens at `positions` for all active sequences; a stop token (-1 is none) ends its sequence.

    Returns:
      the sequences; the tokens, -1 for inactive sequences and for logits that are not finite, which end their
      sequence; log-probabilities, or None if not asked for.
    """
    token, logprobs = sample(logits, sequences.keys, positions, sequences.seen, sampler)
    token = jnp.where(sequences.active, token, -1)
    active = sequences.active & (token >= 0) & ~jnp.isin(token, stop_tokens)
    seen = None if sequences.seen is None else mark_seen(sequences.seen, token, sequences.active)
    return Sequences(jnp.maximum(token, 0), sequences.keys, active, seen), token, logprobs


def run_steps(
    params: DecoderParams,
    config: ModelConfig,
    cache: Cache,
    sequences: Sequences,
    sampler: Sampler,
    stop_tokens: Int[Array, " stops"],
    limit: Int[Array, ""],
) -> tuple[Cache, Sequences, Tokens, LogProbs]:
    """Feeds and samples up to `limit` tokens for every active sequence; ends early when none is active.

    No active sequence's window may fill up before the last step. `limit` is at most MAX_STEPS, `stop_tokens` has at
    least one element (-1 is none).

    Returns:
      the cache, the sequences, and for each of MAX_STEPS steps tokens and log-probabilities (or None); -1 and 0 where
      nothing was sampled.
    """
    batch = sequences.token.shape[0]
    tokens = jnp.full((MAX_STEPS, batch), -1, jnp.int32)
    logprobs = jnp.zeros((MAX_STEPS, batch), jnp.float32) if sampler.logprobs else None

    def one_step(number: Int[Array, ""], state):  # past the limit it changes nothing
        cache, sequences, tokens, logprobs = state
        active = sequences.active & (number < limit)
        cache, logits = step(params, config, cache, sequences.token, active)
        fed = dataclasses.replace(sequences, active=active)
        after, token, logprob = sample_next(sampler, stop_tokens, fed, cache.position, logits)
        sequences = dataclasses.replace(
            after,
            token=jnp.where(active, after.token, sequences.token),
            active=jnp.where(active, after.active, sequences.active),
        )
        tokens = tokens.at[number].set(token, mode="drop")
        if logprob is not None:
            logprobs = logprobs.at[number].set(jnp.where(token >= 0, logprob, 0.0), mode="drop")
        return cache, sequences, tokens, logprobs

    def more(carry):
        number, (_, sequences, *_) = carry
        return (number < limit) & jnp.any(sequences.active)

    def some_steps(carry):
        first, state = carry
        return first + STEPS_PER_TEST, jax.lax.fori_loop(
            0, STEPS_PER_TEST, lambda offset, state: one_step(first + offset, state), state
        )

    return jax.lax.while_loop(more, some_steps, (jnp.int32(0), (cache, sequences, tokens, logprobs)))[1]


@functools.partial(jax.jit, static_argnums=(0, 2), donate_argnums=(3, 4))
def jit_run_steps(
    mesh: Mesh | None, params: DecoderParams, config: ModelConfig, cache: Cache, *arrays: Any
) -> tuple[Cache, Sequences, Tokens, LogProbs]:
    """`run_steps` on the devices of a mesh (None for one device); cache and sequences are donated."""
    return over_devices(run_steps, mesh)(params, config, cache, *arrays)


jit_sample_next = functools.partial(jax.jit, donate_argnums=2)(sample_next)
