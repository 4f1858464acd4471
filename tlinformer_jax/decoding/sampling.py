"""The choice of the next token from its logits: pure functions, safe under `jit`, `vmap` and loops.

What is applied, in this order (that of Hugging Face transformers, so that settings carry over):

1. repetition penalty: logits of tokens seen before are divided (if positive) or multiplied (if negative) by it;
2. temperature: logits are divided by it; at 0 the largest one is taken (greedy) and the rest does not apply;
3. top_k: the k largest logits stay;
4. top_p: of what is left, renormalised, the smallest set of the likeliest tokens whose mass is at least p stays;
5. min_p: tokens stay whose probability is at least min_p times the largest;
6. a token is drawn from what is left, by Gumbel noise that belongs to (key, position, token id).

Where logits are equal, the lower token ids win: in greedy choice, and at the borders of top_k and top_p.
The largest logit always stays. The settings come in two halves: `SamplingMode` says what is on and is static under
`jit`, so that what is off is not compiled; `SamplingValues` are arrays, so that other values compile nothing anew.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.errors import ConfigError, UserError

# Far inside float32's range, so that neither these nor their reciprocals overflow or are flushed to zero.
_LEAST, _MOST = 1e-30, 1e30
_SEEDS = 2**32
NO_TOKEN = -1


@flax.struct.dataclass
class SamplingValues:
    """How strongly each setting that is on applies; of settings that are off, nothing is read.

    Attributes:
      temperature: float32 [].
      top_p: float32 [].
      min_p: float32 [].
      repetition_penalty: float32 [].
    """

    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition_penalty: jax.Array


@dataclasses.dataclass(frozen=True)
class SamplingMode:
    """Which settings are on; hashable, static under `jit`.

    Attributes:
      greedy: the largest logit is taken; only `repetition_penalty` can be on beside it.
      top_k: how many tokens stay, None for all of them.
      top_p: whether it is on. min_p: likewise. repetition_penalty: likewise; it needs the mask of seen tokens.
      logprobs: whether log-probabilities of the chosen tokens are computed.
    """

    greedy: bool = True
    top_k: int | None = None
    top_p: bool = False
    min_p: bool = False
    repetition_penalty: bool = False
    logprobs: bool = False


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen; the module's docstring says in which order.

    Attributes:
      temperature: 0 is greedy, 1 the model's own distribution; at 0, top_k, top_p and min_p change nothing.
      top_k: tokens that stay, None for all.
      top_p: mass that stays, in (0, 1]; None or 1 for all.
      min_p: least probability relative to the largest, in [0, 1]; None or 0 for none.
      repetition_penalty: above 1 discourages tokens of the prompt and of the text so far, 1 is off.
      seed: sequence i of a batch draws with seed + i, see `sequence_keys`.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not is_number(self.temperature) or not (self.temperature == 0 or _LEAST <= self.temperature <= _MOST):
            raise ConfigError(
                "sampling.temperature", self.temperature, f"must be 0 (greedy) or a number from {_LEAST} to {_MOST}"
            )
        if self.top_k is not None and (not is_int(self.top_k) or self.top_k < 1):
            raise ConfigError("sampling.top_k", self.top_k, "must be an integer >= 1; left out, all tokens stay")
        if self.top_p is not None and (not is_number(self.top_p) or not 0 < self.top_p <= 1):
            raise ConfigError("sampling.top_p", self.top_p, "must be a number in (0, 1]; left out, all tokens stay")
        if self.min_p is not None and (not is_number(self.min_p) or not 0 <= self.min_p <= 1):
            raise ConfigError("sampling.min_p", self.min_p, "must be a number in [0, 1]; left out, there is no minimum")
        if not is_number(self.repetition_penalty) or not _LEAST <= self.repetition_penalty <= _MOST:
            raise ConfigError(
                "sampling.repetition_penalty",
                self.repetition_penalty,
                f"must be 1 (no penalty) or another number > 0, from {_LEAST} to {_MOST}",
            )
        if not _is_seed(self.seed):
            raise ConfigError("sampling.seed", self.seed, f"must be an integer from 0 to {_SEEDS - 1}")

    def mode(self, logprobs: bool = False) -> SamplingMode:
        """What is on, with log-probabilities if asked for; settings that would change nothing are off."""
        greedy = self.temperature == 0
        return SamplingMode(
            greedy=greedy,
            top_k=None if greedy or self.top_k is None else int(self.top_k),
            top_p=not greedy and self.top_p not in (None, 1),
            min_p=not greedy and self.min_p not in (None, 0),
            repetition_penalty=self.repetition_penalty != 1,
            logprobs=logprobs,
        )

    def values(self) -> SamplingValues:
        """The values, those of settings that are None being what changes nothing."""
        top_p = 1.0 if self.top_p is None else self.top_p
        min_p = 0.0 if self.min_p is None else self.min_p
        numbers = (self.temperature, top_p, min_p, self.repetition_penalty)
        return SamplingValues(*(jnp.asarray(number, jnp.float32) for number in numbers))


def sample(
    logits: jax.Array,
    keys: jax.Array,
    positions: jax.Array,
    seen: jax.Array | None,
    mode: SamplingMode,
    values: SamplingValues,
) -> tuple[jax.Array, jax.Array | None]:
    """Chooses one token for each sequence.

    A row's token depends on that row of the arguments only: not on the other rows, their number or its place.
    Noise belongs to token ids, not to ranks, so that rounding that swaps two tail tokens changes no other draw.

    Args:
      logits: float32 [batch, V]; -inf for tokens that must not be chosen.
      keys: typed threefry keys [batch], one per sequence, the same at every step; greedy choice does not read them.
      positions: int32 [batch], of the tokens being chosen; they make the draws of one sequence differ.
      seen: bool [batch, V], tokens that the repetition penalty is for; read only where that is on.
      mode: what is on.
      values: how strongly.

    Returns:
      tokens, int32 [batch]: NO_TOKEN (-1) where a row has no distribution, for the caller to check on the host:
        it holds NaN or +inf, or nothing but -inf, or the penalty makes it so.
      log-probabilities of the tokens, float32 [batch], under the softmax of `logits` as given (no penalty,
        temperature or filter); NaN where the token is -1. None unless mode.logprobs.

    Raises:
      ValueError: for a penalty without `seen`, or keys that are not threefry keys.
    """
    penalised = _penalise(logits.astype(jnp.float32), seen, mode, values)
    peak = jnp.max(penalised, axis=-1)  # NaN if any logit is
    if mode.greedy:
        tokens = jnp.argmax(penalised, axis=-1)
    else:
        if jax.random.key_impl(keys) != "threefry2x32":
            # Draws of other generators change with the batch when they are vectorised.
            raise ValueError(f"sample: keys must be threefry2x32 keys, not {jax.random.key_impl(keys)}")
        tokens = jax.vmap(_draw)(keys, positions, _filter(penalised, mode, values))
    tokens = jnp.where(jnp.isfinite(peak), tokens, NO_TOKEN).astype(jnp.int32)
    return tokens, _log_probabilities(logits.astype(jnp.float32), tokens) if mode.logprobs else None


def filtered_logits(logits: jax.Array, seen: jax.Array | None, mode: SamplingMode, values: SamplingValues) -> jax.Array:
    """Logits of the distribution that `sample` draws from, for a mode that is not greedy.

    Args:
      logits: float32 [batch, V].
      seen: bool [batch, V], or None where the repetition penalty is off.
      mode: what is on.
      values: how strongly.

    Returns:
      float32 [batch, V], the largest of a row 0 and what is filtered out -inf; undefined where `sample` gives -1.
    """
    return _filter(_penalise(logits.astype(jnp.float32), seen, mode, values), mode, values)


def _penalise(logits: jax.Array, seen: jax.Array | None, mode: SamplingMode, values: SamplingValues) -> jax.Array:
    """Logits [batch, V] after the repetition penalty."""
    if not mode.repetition_penalty:
        return logits
    if seen is None:
        raise ValueError("sample: the repetition penalty needs the mask of seen tokens")
    penalty = values.repetition_penalty
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _filter(logits: jax.Array, mode: SamplingMode, values: SamplingValues) -> jax.Array:
    """Temperature, top_k, top_p and min_p: logits [batch, V], a row's largest 0 and -inf what does not stay."""
    peak = jnp.max(logits, axis=-1, keepdims=True)
    # Shifted before the division, a low temperature can overflow to -inf only, which is right.
    scaled = (logits - jnp.where(jnp.isfinite(peak), peak, 0.0)) / values.temperature
    places = scaled.shape[-1] if mode.top_k is None else min(mode.top_k, scaled.shape[-1])
    kept = scaled
    if mode.top_p or places < scaled.shape[-1]:
        # One ordering serves both: top_p looks at what top_k has left only.
        ordered = jax.lax.top_k(scaled, places)[0] if mode.top_k is not None else -jnp.sort(-scaled, axis=-1)
        count = _nucleus_size(ordered, values.top_p) if mode.top_p else jnp.full_like(peak, places, jnp.int32)
        kept = jnp.where(_largest(scaled, ordered, count), kept, -jnp.inf)
    if mode.min_p:
        kept = jnp.where(jnp.exp(scaled) >= values.min_p, kept, -jnp.inf)
    return kept


def _nucleus_size(ordered: jax.Array, top_p: jax.Array) -> jax.Array:
    """How many of the descending logits [batch, C] (the first of them 0) make up a mass of top_p, int32 [batch, 1]."""
    # Summed from the small end: a token goes if it and all after it weigh 1 - p at most. The sums that decide are
    # then sums of small numbers, and the tail is not lost in the rounding of a mass near 1.
    tails = jax.lax.cumsum(jnp.exp(ordered), axis=1, reverse=True)
    stay = tails > (1.0 - top_p) * tails[:, :1]
    return jnp.maximum(jnp.sum(stay, axis=-1, keepdims=True, dtype=jnp.int32), 1)


def _largest(logits: jax.Array, ordered: jax.Array, count: jax.Array) -> jax.Array:
    """Which logits [batch, V] are the first `count` [batch, 1] of `ordered`, lower ids first: bool [batch, V]."""
    threshold = jnp.take_along_axis(ordered, count - 1, axis=-1)
    above, tied = logits > threshold, logits == threshold
    places = count - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= places))


def _draw(key: jax.Array, position: jax.Array, logits: jax.Array) -> jax.Array:
    """A token drawn from the softmax of logits [V]."""
    # The default Gumbel noise ends at about 16, which would distort the odds of tokens rarer than 1e-7.
    return jax.random.categorical(jax.random.fold_in(key, position), logits, mode="high")


def _log_probabilities(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """log softmax of logits [batch, V] at the tokens [batch]; NaN where there is no token."""
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(tokens >= 0, chosen - jax.nn.logsumexp(logits, axis=-1), jnp.nan)


def sequence_keys(seeds: int | Sequence[int] | np.ndarray, batch: int) -> jax.Array:
    """One random key for each sequence.

    Args:
      seeds: one seed for each sequence, or one number: sequence i then has seed + i (modulo 2^32), so that
        it can be drawn again alone.
      batch: sequences.

    Returns:
      typed threefry keys [batch].

    Raises:
      ConfigError: for a seed that is not an integer from 0 to 2^32 - 1, or another number of seeds than `batch`.
    """
    listed = isinstance(seeds, list | tuple | np.ndarray)
    each: list[Any] = list(seeds) if listed else [seeds]  # type: ignore[arg-type]
    for seed in each:
        if not _is_seed(seed):
            raise ConfigError("sampling.seed", seed, f"must be an integer from 0 to {_SEEDS - 1}")
    if not listed:
        each = [(int(each[0]) + i) % _SEEDS for i in range(batch)]
    if len(each) != batch:
        raise ConfigError("sampling.seed", each, f"must be one integer or {batch} of them, one for each sequence")
    return jax.vmap(lambda seed: jax.random.key(seed, impl="threefry2x32"))(jnp.asarray(np.array(each, np.uint32)))


def seen_tokens(prompts: Sequence[Sequence[int]], vocab_size: int) -> np.ndarray:
    """Which tokens each prompt holds, for the repetition penalty: bool [batch, V], on the host.

    Raises:
      UserError: for a token that is not in the vocabulary.
    """
    seen = np.zeros((len(prompts), vocab_size), bool)
    for number, prompt in enumerate(prompts):
        tokens = np.asarray(prompt, np.int64)
        outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
        if outside.size:
            raise UserError(f"prompt {number}: token {outside[0]} is not one of the vocabulary's 0 .. {vocab_size - 1}")
        seen[number, tokens] = True
    return seen


def mark_seen(seen: jax.Array, tokens: jax.Array, active: jax.Array) -> jax.Array:
    """`seen` with the tokens chosen by sequences that are active.

    Args:
      seen: bool [batch, V].
      tokens: int32 [batch]; NO_TOKEN marks nothing.
      active: bool [batch], sequences that have not ended.

    Returns:
      bool [batch, V].
    """
    # An index past the end is dropped; -1 would count from the end.
    columns = jnp.where(active & (tokens >= 0), tokens, seen.shape[-1])
    return seen.at[jnp.arange(seen.shape[0]), columns].set(True, mode="drop")


def is_number(value: object) -> bool:
    """Whether it is an integer or a float, NumPy's too; bool is neither. NaN is one, and outside of every range."""
    return is_int(value) or isinstance(value, float | np.floating)


def is_int(value: object) -> bool:
    """Whether it is an integer, NumPy's too; bool is not."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_seed(value: Any) -> bool:
    """Whether it can seed a sequence: JAX keeps 32 bits of a seed, so larger ones would repeat others."""
    return is_int(value) and 0 <= int(value) < _SEEDS
