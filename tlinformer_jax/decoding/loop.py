"""The device loop: feeds tokens and samples the next ones without a word to the host until a window is full."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding.cache import Cache
from tlinformer_jax.decoding.decoder import step
from tlinformer_jax.decoding.params import DecoderParams
from tlinformer_jax.decoding.sampling import SamplingMode, SamplingValues, mark_seen, sample
from tlinformer_jax.decoding.spread import over_devices

# Tokens that one call can return for each sequence.
MAX_STEPS = 256
# Steps between two looks at whether to go on: each look waits for the host, longer than a short step takes.
STEPS_PER_LOOK = 4


@flax.struct.dataclass
class Sequences:
    """What generation keeps of each sequence beside its cache.

    Attributes:
      token: sampled last and not yet fed, int32 [batch].
      keys: of the random numbers, one typed key per sequence [batch].
      active: bool [batch]; the others have stopped, or their place in the batch is empty.
      seen: bool [batch, V], tokens of prompt and continuation; None where no repetition penalty asks for it.
    """

    token: jax.Array
    keys: jax.Array
    active: jax.Array
    seen: jax.Array | None


def sample_next(
    mode: SamplingMode,
    values: SamplingValues,
    stop_tokens: jax.Array,
    sequences: Sequences,
    positions: jax.Array,
    logits: jax.Array,
) -> tuple[Sequences, jax.Array, jax.Array | None]:
    """Samples the token after `logits` for every active sequence; a stop token ends its sequence.

    Args:
      mode: what kind of sampling (static).
      values: its parameters.
      stop_tokens: int32 [one or more]; -1 stands for none.
      sequences: of the batch.
      positions: of the tokens to sample, int32 [batch].
      logits: float32 [batch, V].

    Returns:
      the sequences; the tokens int32 [batch], -1 for sequences that are not active (and for logits that are not
      finite, whose sequence ends); their log-probabilities float32 [batch], or None where `mode` asks for none.
    """
    token, logprobs = sample(logits, sequences.keys, positions, sequences.seen, mode, values)
    token = jnp.where(sequences.active, token, -1)
    active = sequences.active & (token >= 0) & ~jnp.isin(token, stop_tokens)
    seen = None if sequences.seen is None else mark_seen(sequences.seen, token, sequences.active)
    return Sequences(jnp.maximum(token, 0), sequences.keys, active, seen), token, logprobs


def run_steps(
    params: DecoderParams,
    config: ModelConfig,
    cache: Cache,
    sequences: Sequences,
    values: SamplingValues,
    stop_tokens: jax.Array,
    limit: jax.Array,
    *,
    mode: SamplingMode,
) -> tuple[Cache, Sequences, jax.Array, jax.Array | None]:
    """Feeds and samples up to `limit` tokens for every active sequence; ends early when none is active.

    Args:
      params: of the model.
      config: of the model (static).
      cache: donated; no active sequence's window may fill up before the last of the steps.
      sequences: donated.
      values: parameters of the sampling.
      stop_tokens: int32 [one or more]; -1 stands for none.
      limit: steps, at most MAX_STEPS, int32 [].
      mode: what kind of sampling (static).

    Returns:
      the cache, the sequences, and of each step the tokens int32 [MAX_STEPS, batch] and log-probabilities
      float32 [MAX_STEPS, batch] (or None); -1 and 0 where nothing was sampled.
    """
    batch = sequences.token.shape[0]
    tokens = jnp.full((MAX_STEPS, batch), -1, jnp.int32)
    logprobs = jnp.zeros((MAX_STEPS, batch), jnp.float32) if mode.logprobs else None

    def more(carry):
        number, (_, sequences, *_) = carry
        return (number < limit) & jnp.any(sequences.active)

    def some_steps(carry):
        first, state = carry
        one = functools.partial(_one_step, params, config, mode, values, stop_tokens, limit, first)
        return first + STEPS_PER_LOOK, jax.lax.fori_loop(0, STEPS_PER_LOOK, one, state)

    return jax.lax.while_loop(more, some_steps, (jnp.int32(0), (cache, sequences, tokens, logprobs)))[1]


def _one_step(params, config, mode, values, stop_tokens, limit, first, offset, state):
    """Step `first + offset` of `run_steps`; past the limit it changes nothing."""
    cache, sequences, tokens, logprobs = state
    number = first + offset
    wanted = sequences.active & (number < limit)
    cache, logits = step(params, config, cache, sequences.token, wanted)
    fed = dataclasses.replace(sequences, active=wanted)
    after, token, logprob = sample_next(mode, values, stop_tokens, fed, cache.position, logits)
    sequences = dataclasses.replace(
        after,
        token=jnp.where(wanted, after.token, sequences.token),
        active=jnp.where(wanted, after.active, sequences.active),
    )
    tokens = tokens.at[number].set(token, mode="drop")
    if logprobs is not None and logprob is not None:
        logprobs = logprobs.at[number].set(jnp.where(token >= 0, logprob, 0.0), mode="drop")
    return cache, sequences, tokens, logprobs


def spread_run_steps(
    mesh: Mesh | None, mode: SamplingMode, params: DecoderParams, config: ModelConfig, cache: Cache, *arrays: Any
) -> tuple[Cache, Sequences, jax.Array, jax.Array | None]:
    """`run_steps` on the devices of a mesh (static; None for one device); the other arguments are its own."""
    return over_devices(functools.partial(run_steps, mode=mode), mesh)(params, config, cache, *arrays)


jit_run_steps = functools.partial(jax.jit, static_argnums=(0, 1, 3), donate_argnums=(4, 5))(spread_run_steps)
jit_sample_next = functools.partial(jax.jit, static_argnums=0, donate_argnums=3)(sample_next)
