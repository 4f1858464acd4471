"""The options of a generation, and the choice of the next token from its logits.

Settings of the choice apply in this order, that of Hugging Face transformers, so that settings carry over:

1. repetition_penalty divides positive logits of tokens seen before, and multiplies negative ones;
2. temperature divides all logits; at 0 the largest is taken (greedy) and the rest does not apply;
3. top_k keeps the k largest logits;
4. top_p keeps the smallest set of the likeliest remaining tokens whose renormalised mass is at least p;
5. min_p keeps tokens with at least min_p times the largest probability;
6. a token is drawn with Gumbel noise that depends on (key, position, token id) only.

Among equal logits lower token ids win. The largest logit is always kept.
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

from tlinformer_jax.errors import ConfigError

# Neither these nor their reciprocals overflow or flush to zero.
_LEAST, _MOST = 1e-30, 1e30
# JAX keeps 32 bits of a seed; larger seeds would repeat others.
_SEEDS = 2**32
NO_TOKEN = -1
# Most tokens that one call of the device returns for each sequence.
MAX_STEPS = 256
# How keys and values that grow with a sequence are kept: in the model's compute dtype, or in int8.
INT8 = "int8"
CACHE_DTYPES = ("auto", INT8)

Logits = Float[Array, "B V"]
Mask = Bool[Array, "B V"]


@flax.struct.dataclass
class Sampler:
    """How tokens are chosen, as compiled code takes it.

    None is off and not compiled; without a temperature the choice is greedy. Other values do not
    compile again, except of `top_k` and `logprobs`, which are static.
    """

    temperature: Float[Array, ""] | None = None
    top_p: Float[Array, ""] | None = None
    min_p: Float[Array, ""] | None = None
    repetition_penalty: Float[Array, ""] | None = None
    top_k: int | None = flax.struct.field(pytree_node=False, default=None)
    logprobs: bool = flax.struct.field(pytree_node=False, default=False)


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Options of a generation.

    Attributes:
      temperature: 0 is greedy, 1 the model's own distribution.
      top_k: tokens to keep; None keeps all.
      top_p: mass to keep, in (0, 1]; None or 1 keeps all.
      min_p: least probability relative to the largest, in [0, 1]; None or 0 keeps all.
      repetition_penalty: above 1 discourages tokens of prompt and continuation; 1 is off.
      seed: sequence i of a batch draws with seed + i; or a list with one seed per sequence.
      max_new_tokens: most tokens that a sequence gets.
      stop_tokens: ids that end a sequence. None: the tokenizer's end of text if prompts are texts.
      stop_strings: texts that end a sequence as soon as its continuation holds one of them.
      logprobs: whether log-probabilities are returned, in nats, under the model's own distribution.
      chunk: most tokens per device call. Small ones stream sooner and draw fewer tokens after a stop
        string. None: 16 if text is streamed or a stop string looked for, else 256.
      cache_dtype: of the cached keys and values that grow with a sequence: 'auto' is the model's compute dtype; 'int8'
        takes little more than half of bfloat16's memory and of the time to read it, and moves logits a little.
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
        bounds = f"from {_LEAST} to {_MOST}"
        if not is_number(self.temperature, 0, _MOST) or 0 < self.temperature < _LEAST:
            raise self._refusal("temperature", f"must be 0 (greedy) or a number {bounds}")
        if self.top_k is not None and not is_integer(self.top_k, 1):
            raise self._refusal("top_k", "must be an integer >= 1; left out, all tokens stay")
        if self.top_p is not None and not (is_number(self.top_p, 0, 1) and self.top_p > 0):
            raise self._refusal("top_p", "must be a number in (0, 1]; left out, all tokens stay")
        if self.min_p is not None and not is_number(self.min_p, 0, 1):
            raise self._refusal("min_p", "must be a number in [0, 1]; left out, there is no minimum")
        if not is_number(self.repetition_penalty, _LEAST, _MOST):
            raise self._refusal("repetition_penalty", f"must be 1 (no penalty) or another number > 0, {bounds}")
        _seeds(self.seed)
        if not is_integer(self.max_new_tokens, 0):
            raise self._refusal("max_new_tokens", "must be an integer >= 0")
        if self.chunk is not None and not is_integer(self.chunk, 1, MAX_STEPS):
            raise self._refusal("chunk", f"must be an integer from 1 to {MAX_STEPS}, or None")
        self._make_tuple("stop_tokens", "must be a list of token ids")
        self._make_tuple("stop_strings", "must be a list of texts, none of them empty")
        if not all(is_integer(token, 0) for token in self.stop_tokens or ()):
            raise self._refusal("stop_tokens", "must be a list of token ids")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise ConfigError("generation.stop_strings", text, "must be a text of at least one character")
        if self.cache_dtype not in CACHE_DTYPES:
            raise self._refusal("cache_dtype", f"must be one of {', '.join(CACHE_DTYPES)}")
        if not isinstance(self.logprobs, bool | np.bool_):
            raise self._refusal("logprobs", "must be True or False")

    def _refusal(self, name: str, allowed: str) -> ConfigError:
        return ConfigError(f"generation.{name}", getattr(self, name), allowed)

    def _make_tuple(self, name: str, allowed: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):  # a text is a list of its characters
            raise self._refusal(name, allowed)
        object.__setattr__(self, name, tuple(value))

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "GenerationConfig":
        """The configuration that keyword options describe.

        Raises:
          ConfigError: for an unknown option or a value that is not allowed.
        """
        known = sorted(field.name for field in dataclasses.fields(cls))
        for name, value in options.items():
            if name not in known:
                raise ConfigError(f"generation.{name}", value, f"no such option; there are {', '.join(known)}")
        return cls(**options)

    def sampler(self) -> Sampler:
        """The settings of the choice that change something, as arrays."""

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
    """Chooses one token per sequence; a row's choice depends on that row of the arguments only.

    A sequence's key is the same at every step; positions make its draws differ. Noise belongs to token
    ids, not to ranks: rounding that swaps two unlikely tokens changes no other draw.

    Returns:
      tokens; NO_TOKEN (-1) for rows with NaN, +inf, or nothing but -inf.
      log-probabilities under the softmax of `logits`, NaN for NO_TOKEN; None unless asked for.
    """
    scores = penalised(logits, seen, sampler)
    if sampler.temperature is None:
        tokens = jnp.argmax(scores, axis=-1)
    else:
        tokens = jax.vmap(_draw)(keys, positions, filtered(scores, sampler))
    # The maximum is NaN if any logit is.
    tokens = jnp.where(jnp.isfinite(jnp.max(scores, axis=-1)), tokens, NO_TOKEN).astype(jnp.int32)
    if not sampler.logprobs:
        return tokens, None
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
    return tokens, jnp.where(tokens >= 0, chosen - jax.nn.logsumexp(logits, axis=-1), jnp.nan)


def penalised(logits: Logits, seen: Mask | None, sampler: Sampler) -> Logits:
    """Logits after the repetition penalty."""
    penalty = sampler.repetition_penalty
    if penalty is None:
        return logits
    if seen is None:
        raise ValueError("sample: the repetition penalty needs the mask of seen tokens")
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: Logits, sampler: Sampler) -> Logits:
    """Logits after temperature, top_k, top_p and min_p: the largest is 0, dropped ones are -inf."""
    assert sampler.temperature is not None
    size = logits.shape[-1]
    peak = jnp.max(logits, axis=-1, keepdims=True)
    # Shifted before the division, a low temperature can overflow to -inf only, which is right.
    scaled = (logits - jnp.where(jnp.isfinite(peak), peak, 0.0)) / sampler.temperature
    top_k = min(sampler.top_k or size, size)
    kept = scaled
    if sampler.top_p is not None or top_k < size:
        # One sorted array serves both: top_p applies to what top_k has kept.
        ordered = -jnp.sort(-scaled, axis=-1) if sampler.top_k is None else jax.lax.top_k(scaled, top_k)[0]
        count = jnp.full_like(peak, top_k, jnp.int32)
        if sampler.top_p is not None:
            count = _nucleus(ordered, sampler.top_p)
        kept = jnp.where(_largest(scaled, ordered, count), kept, -jnp.inf)
    if sampler.min_p is not None:
        kept = jnp.where(jnp.exp(scaled) >= sampler.min_p, kept, -jnp.inf)
    return kept


def _nucleus(ordered: Float[Array, "B k"], top_p: Float[Array, ""]) -> Int[Array, "B 1"]:
    """How many of the descending logits, of which the first is 0, make up a mass of top_p."""
    # A token is dropped if it and all after it weigh at most 1 - p. Summed from the small end, the tail
    # is not lost in the rounding of a mass near 1.
    tails = jax.lax.cumsum(jnp.exp(ordered), axis=1, reverse=True)
    stay = tails > (1.0 - top_p) * tails[:, :1]
    return jnp.maximum(jnp.sum(stay, axis=-1, keepdims=True, dtype=jnp.int32), 1)


def _largest(logits: Logits, ordered: Float[Array, "B k"], count: Int[Array, "B 1"]) -> Mask:
    """Which logits are the first `count` of `ordered`, lower ids first."""
    threshold = jnp.take_along_axis(ordered, count - 1, axis=-1)
    above, tied = logits > threshold, logits == threshold
    left = count - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (tied & (jnp.cumsum(tied, axis=-1, dtype=jnp.int32) <= left))


def _draw(key: Key[Array, ""], position: Int[Array, ""], logits: Float[Array, " V"]) -> Int[Array, ""]:
    # JAX's default Gumbel noise ends at about 16, which distorts the odds of tokens rarer than 1e-7.
    return jax.random.categorical(jax.random.fold_in(key, position), logits, mode="high")


def sequence_keys(seed: int | Sequence[int], batch: int) -> Key[Array, " B"]:
    """One key per sequence, from one seed each or, for sequence i, seed + i (modulo 2^32)."""
    seeds = _seeds(seed)
    if seeds is None:
        seeds = [(int(seed) + i) % _SEEDS for i in range(batch)]  # type: ignore[arg-type]
    if len(seeds) != batch:
        allowed = f"must be one integer or {batch} of them, one for each sequence"
        raise ConfigError("generation.seed", seeds, allowed)
    # Draws of JAX's other generators depend on the batch under `vmap`.
    make = functools.partial(jax.random.key, impl="threefry2x32")
    return jax.vmap(make)(jnp.asarray(np.array(seeds, np.uint32)))


def _seeds(seed: int | Sequence[int]) -> list[int] | None:
    """The checked seeds of a list; None for one number."""
    seeds = list(seed) if isinstance(seed, list | tuple | np.ndarray) else None
    for one in [seed] if seeds is None else seeds:
        if not is_integer(one, 0, _SEEDS - 1):
            raise ConfigError("generation.seed", one, f"must be an integer from 0 to {_SEEDS - 1}")
    return seeds


def seen_tokens(prompts: Sequence[np.ndarray], vocab_size: int) -> np.ndarray:
    """Which tokens of the vocabulary each prompt holds, for the repetition penalty: bool [B, V]."""
    seen = np.zeros((len(prompts), vocab_size), bool)
    for row, prompt in zip(seen, prompts):
        row[prompt] = True
    return seen


def mark_seen(seen: Mask, tokens: Int[Array, " B"], active: Bool[Array, " B"]) -> Mask:
    """`seen` with the tokens just chosen by active sequences; NO_TOKEN marks nothing."""
    # An index past the end is dropped; -1 would count from the end.
    columns = jnp.where(active & (tokens >= 0), tokens, seen.shape[-1])
    return seen.at[jnp.arange(seen.shape[0]), columns].set(True, mode="drop")


def is_number(value: Any, least: float, most: float) -> bool:
    """Whether it is a number in that range, NumPy's included; bool and NaN are not."""
    numeric = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    return numeric and bool(least <= value <= most)


def is_integer(value: Any, least: int, most: float = float("inf")) -> bool:
    """Whether it is an integer in that range, NumPy's included; bool is not."""
    return isinstance(value, int | np.integer) and is_number(value, least, most)
