"""The options of a generation, and sampling of the next token from its logits.

Sampling applies its settings in the order of Hugging Face transformers, so that values carry over:

1. repetition_penalty divides positive logits of tokens seen before, and multiplies negative ones;
2. temperature divides all logits; 0 means the largest logit (greedy), and the later settings do not apply;
3. top_k keeps the k largest logits;
4. top_p keeps the smallest set of most probable remaining tokens with a renormalised mass of at least p;
5. min_p keeps tokens with at least min_p times the largest probability;
6. a token is drawn with Gumbel noise that depends only on (key, position, token id).

Among equal logits the lower token id wins. The largest logit is always kept.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from tlinformer_jax.config.model import LARGEST_VOCABULARY
from tlinformer_jax.config.train import NUM_SEEDS
from tlinformer_jax.errors import TRUE_OR_FALSE, ConfigError, Rule, check_fields, integer, number, one_of

# Bounds of factors: neither these numbers nor their reciprocals overflow or flush to zero.
_LEAST, _MOST = 1e-30, 1e30
# Stands for a token where the logits are not finite.
NOT_DRAWN = -1
# Most tokens that one call of the device returns for each sequence.
MAX_STEPS = 256
# Dtypes of cached keys and values that grow with a sequence: the model's compute dtype, or int8.
INT8 = "int8"
CACHE_DTYPES = ("auto", INT8)

Logits = Float[Array, "B V"]
Mask = Bool[Array, "B V"]


@flax.struct.dataclass
class Sampler:
    """Settings of sampling, as a pytree for compiled code.

    A setting of None is off and not compiled; without a temperature sampling is greedy. A different value needs no new
    compilation, except for `top_k` and `logprobs`, which are static.
    """

    temperature: Float[Array, ""] | None = None
    top_p: Float[Array, ""] | None = None
    min_p: Float[Array, ""] | None = None
    repetition_penalty: Float[Array, ""] | None = None
    top_k: int | None = flax.struct.field(pytree_node=False, default=None)
    logprobs: bool = flax.struct.field(pytree_node=False, default=False)


def _or_none(rule: Rule) -> Rule:
    return Rule(rule.allowed, lambda value: value is None or rule.holds(value))


def are_integers(values: Any, end: int) -> bool:
    """Returns whether `values` is a list of integers from 0 to end - 1."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of unequal lengths
        return False
    valid = array.dtype.kind in "iu" and bool(((array >= 0) & (array < end)).all())
    return array.ndim == 1 and (valid or not array.size)


def _are_texts(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(text, str) and text for text in values)


_BOUNDS = f"from {_LEAST} to {_MOST}"
RULES = {
    "temperature": number(
        f"must be 0 (greedy) or a number {_BOUNDS}", lambda value: value == 0 or _LEAST <= value <= _MOST
    ),
    "top_k": _or_none(integer(1, also=", or left out to keep all tokens")),
    "top_p": _or_none(
        number("must be a number in (0, 1], or left out to keep all tokens", lambda value: 0 < value <= 1)
    ),
    "min_p": _or_none(number("must be a number in [0, 1], or left out for no minimum", lambda value: 0 <= value <= 1)),
    "repetition_penalty": number(
        f"must be 1 (no penalty) or another number > 0, {_BOUNDS}", lambda value: _LEAST <= value <= _MOST
    ),
    "seed": Rule(
        f"must be an integer from 0 to {NUM_SEEDS - 1}, or one for each sequence",
        lambda value: are_integers(value if np.iterable(value) else [value], NUM_SEEDS),
    ),
    "max_new_tokens": integer(0),
    "stop_tokens": _or_none(Rule("must be a list of token ids", lambda value: are_integers(value, LARGEST_VOCABULARY))),
    "stop_strings": Rule("must be a list of texts, none of them empty", _are_texts),
    "logprobs": TRUE_OR_FALSE,
    "chunk": _or_none(integer(1, MAX_STEPS, also=", or None")),
    "cache_dtype": one_of(*CACHE_DTYPES),
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Options of a generation.

    Attributes:
      temperature: divides the logits; 0 is greedy, 1 the model's own distribution.
      top_k: number of tokens to keep; None keeps all.
      top_p: probability mass to keep, in (0, 1]; None or 1 keeps all.
      min_p: smallest probability relative to the largest, in [0, 1]; None or 0 keeps all.
      repetition_penalty: above 1 discourages tokens that occur in prompt or continuation; 1 is off.
      seed: an integer, with which sequence i of a batch draws by seed + i; or a list with one seed per sequence.
      max_new_tokens: most new tokens of a sequence.
      stop_tokens: ids that end a sequence. None: the tokenizer's end of text if prompts are texts.
      stop_strings: texts that end a sequence as soon as its continuation contains one of them.
      logprobs: whether to return log-probabilities, in nats, under the model's own distribution.
      chunk: most tokens per device call. A small value streams sooner and draws fewer tokens after a stop string. None:
        16 when streaming or with stop strings, else 256.
      cache_dtype: dtype of cached keys and values that grow with a sequence. 'auto' is the model's compute dtype;
        'int8' needs little more than half of bfloat16's memory and changes logits a little. On an NVIDIA GPU a
        token after a long text takes less time, a slide and a prompt more.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | Sequence[int] = 0
    max_new_tokens: int = 256
    stop_tokens: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False
    chunk: int | None = None
    cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        check_fields("generation", self, RULES)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "GenerationConfig":
        """Returns the configuration for keyword options.

        Raises:
          ConfigError: if an option is unknown or a value is not allowed.
        """
        known = sorted(field.name for field in dataclasses.fields(cls))
        for name, value in options.items():
            if name not in known:
                raise ConfigError(f"generation.{name}", value, f"no such option; the options are {', '.join(known)}")
        return cls(**options)

    def sampler(self) -> Sampler:
        """Returns the settings that are not off, as arrays."""

        def unless(off: float, value: float | None) -> Array | None:
            return None if value is None or value == off else jnp.float32(value)

        penalty = unless(1, self.repetition_penalty)
        sampler = Sampler(repetition_penalty=penalty, logprobs=bool(self.logprobs))
        if self.temperature == 0:
            return sampler
        return dataclasses.replace(
            sampler,
            temperature=jnp.float32(self.temperature),
            top_p=unless(1, self.top_p),
            min_p=unless(0, self.min_p),
            top_k=None if self.top_k is None else int(self.top_k),
        )


def sample(
    logits: Logits,
    keys: Key[Array, " B"],
    positions: Int[Array, " B"],
    seen: Mask | None,
    sampler: Sampler,
) -> tuple[Int[Array, " B"], Float[Array, " B"] | None]:
    """Samples one token per sequence; the token depends only on the sequence's own row of the arguments.

    A sequence's key is the same at every step; its position makes the draws differ. Noise is drawn for token ids, not
    for ranks: if rounding swaps two improbable tokens, no other draw changes.

    Returns:
      tokens; NOT_DRAWN (-1) for rows with NaN or +inf, or with only -inf.
      log-probabilities under the softmax of `logits`, NaN for NOT_DRAWN; None if not requested.
    """
    scores = penalised(logits, seen, sampler)
    if sampler.temperature is None:
        tokens = jnp.argmax(scores, axis=-1)
    else:
        tokens = jax.vmap(_draw)(keys, positions, filtered(scores, sampler))
    # The maximum is NaN if any logit is.
    tokens = jnp.where(jnp.isfinite(jnp.max(scores, axis=-1)), tokens, NOT_DRAWN).astype(jnp.int32)
    if not sampler.logprobs:
        return tokens, None
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
    return tokens, jnp.where(tokens >= 0, chosen - jax.nn.logsumexp(logits, axis=-1), jnp.nan)


def penalised(logits: Logits, seen: Mask | None, sampler: Sampler) -> Logits:
    """Applies the repetition penalty to logits."""
    penalty = sampler.repetition_penalty
    if penalty is None:
        return logits
    if seen is None:
        raise ValueError("sample: the repetition penalty needs the mask of seen tokens")
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: Logits, sampler: Sampler) -> Logits:
    """Applies temperature, top_k, top_p and min_p; the largest logit becomes 0, dropped logits become -inf."""
    assert sampler.temperature is not None
    size = logits.shape[-1]
    peak = jnp.max(logits, axis=-1, keepdims=True)
    # Subtract the peak first: then a low temperature can only overflow to -inf, which is correct.
    scaled = (logits - jnp.where(jnp.isfinite(peak), peak, 0.0)) / sampler.temperature
    top_k = min(sampler.top_k or size, size)
    kept = scaled
    if sampler.top_p is not None or top_k < size:
        # top_p applies to the tokens that top_k keeps, so both use one sorted array.
        ordered = -jnp.sort(-scaled, axis=-1) if sampler.top_k is None else jax.lax.top_k(scaled, top_k)[0]
        count = jnp.full_like(peak, top_k, jnp.int32)
        if sampler.top_p is not None:
            count = _nucleus(ordered, sampler.top_p)
        kept = jnp.where(_largest(scaled, ordered, count), kept, -jnp.inf)
    if sampler.min_p is not None:
        kept = jnp.where(jnp.exp(scaled) >= sampler.min_p, kept, -jnp.inf)
    return kept


def _nucleus(ordered: Float[Array, "B k"], top_p: Float[Array, ""]) -> Int[Array, "B 1"]:
    """Returns how many of the largest logits together have a mass of at least top_p; `ordered` descends from 0."""
    # A token is dropped if it and all after it have at most a mass of 1 - p. The sum starts at the small end, where
    # rounding of a mass near 1 cannot lose the tail.
    tails = jax.lax.cumsum(jnp.exp(ordered), axis=1, reverse=True)
    stay = tails > (1.0 - top_p) * tails[:, :1]
    return jnp.maximum(jnp.sum(stay, axis=-1, keepdims=True, dtype=jnp.int32), 1)


def _largest(logits: Logits, ordered: Float[Array, "B k"], count: Int[Array, "B 1"]) -> Mask:
    """Returns which logits are among the first `count` of `ordered`; lower ids come first."""
    threshold = jnp.take_along_axis(ordered, count - 1, axis=-1)
    above, tied = logits > threshold, logits == threshold
    left = count - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= left))


def _draw(key: Key[Array, ""], position: Int[Array, ""], logits: Float[Array, " V"]) -> Int[Array, ""]:
    # JAX's default Gumbel noise is at most about 16, which distorts the odds of tokens rarer than 1e-7.
    return jax.random.categorical(jax.random.fold_in(key, position), logits, mode="high")


def sequence_keys(seed: int | Sequence[int], batch: int) -> Key[Array, " B"]:
    """Returns one key per sequence, from a list of seeds or, for sequence i, from seed + i (modulo 2^32)."""
    if not RULES["seed"].holds(seed) or np.shape(seed) not in ((), (batch,)):
        raise ConfigError("generation.seed", seed, f"must be one integer or {batch} of them, one for each sequence")
    # With JAX's other generators, draws under `vmap` depend on the batch.
    make = functools.partial(jax.random.key, impl="threefry2x32")
    seeds = seed if np.ndim(seed) else (np.asarray(seed) + np.arange(batch)) % NUM_SEEDS
    return jax.vmap(make)(np.asarray(seeds, np.uint32))


def seen_tokens(prompts: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    """Returns which tokens each prompt contains, bool [B, V], for the repetition penalty."""
    seen = np.zeros((len(prompts), vocab_size), bool)
    for row, prompt in zip(seen, prompts):
        row[prompt] = True
    return seen


def mark_seen(seen: Mask, tokens: Int[Array, " B"], active: Bool[Array, " B"]) -> Mask:
    """Marks the new tokens of active sequences in `seen`; NOT_DRAWN marks nothing."""
    # An index past the end is ignored; -1 would count from the end.
    columns = jnp.where(active & (tokens >= 0), tokens, seen.shape[-1])
    return seen.at[jnp.arange(seen.shape[0]), columns].set(True, mode="drop")
