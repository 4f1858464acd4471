"""The decoder: the token step, the loop that generates on the device, and one interface to all architectures.

`prefill` and `slide` are in `windowed`; the baselines' `prefill` is in `layered`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.decoding import context_parallel, layered, windowed
from tlinformer_jax.decoding.cache import (
    Cache,
    LayeredCache,
    WindowedCache,
    capacity_for,
    history_of,
    length_class,
    stored_rows,
)
from tlinformer_jax.decoding.params import DecoderParams, decoder_params, embed, logits_of
from tlinformer_jax.decoding.sampling import MAX_STEPS, Sampler, mark_seen, sample
from tlinformer_jax.kernels.key_value import KeyValue
from tlinformer_jax.models.cached_attention import token_layer
from tlinformer_jax.models.delta import DeltaParams, DeltaState, delta_mixer
from tlinformer_jax.models.layers import update
from tlinformer_jax.models.model import LanguageModel
from tlinformer_jax.models.rope import rope_table

# Steps between two tests of the loop's condition. Each test waits for the host.
STEPS_PER_TEST = 4


def step(
    params: DecoderParams,
    config: ModelConfig,
    cache: Cache,
    tokens: Int[Array, " batch"],
    active: Bool[Array, " batch"],
) -> tuple[Cache, Float[Array, "batch V"]]:
    """Feeds one token to every active sequence; returns the cache and the next tokens' logits.

    Full windows must slide first. Inactive sequences do not change; their logits have no meaning.
    """
    before = cache.last_token() if config.token_shift else None
    embedded, rope = (
        embed(params, tokens, before),
        rope_table(cache.position, config.head_dim, config.longest_wavelength),
    )
    x, key_rows = embedded.rows, embedded.key_rows
    rows: list[KeyValue] = []
    states: list[DeltaState] = []
    for index, layer in enumerate(params.layers):
        index_in_kind = config.index_in_kind(index)
        if isinstance(layer, DeltaParams):
            assert isinstance(cache, LayeredCache)
            mixed, state = delta_mixer(layer, x[:, None], cache.state_of(index_in_kind))
            x = update(layer, x[:, None], mixed)[:, 0]
            states.append(state)
        else:
            x, row = token_layer(layer, config, x, rope, *cache.read_by(config, index_in_kind), key_rows=key_rows)
            rows.append(row)
        key_rows = None  # only the first layer has key rows
    if isinstance(cache, LayeredCache):
        cache = cache.with_states(states, active)
    own: Any = jax.tree.map(lambda *layers: jnp.stack(layers), *rows) if rows else None
    return cache.with_token(tokens, own, active), logits_of(params, x)


@flax.struct.dataclass
class Sequences:
    """State of each sequence besides its cache.

    Attributes:
      token: the last sampled token, which has not been fed yet.
      keys: random keys.
      active: false for sequences that have ended.
      seen: which tokens occur in prompt and continuation; None without a repetition penalty.
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
    active: Bool[Array, " batch"],
    positions: Int[Array, " batch"],
    logits: Float[Array, "batch V"],
) -> tuple[Sequences, Int[Array, " batch"], Float[Array, " batch"] | None]:
    """Samples a token for every active sequence; a stop token ends its sequence (-1 in `stop_tokens` is padding).

    Returns:
      the sequences; the tokens; and the log-probabilities, None if not requested. The token is -1 for inactive
      sequences, and for logits that are not finite, which end the sequence.
    """
    token, logprobs = sample(logits, sequences.keys, positions, sequences.seen, sampler)
    token = jnp.where(active, token, -1)
    ended = active & ((token < 0) | jnp.isin(token, stop_tokens))
    after = Sequences(
        token=jnp.where(active, jnp.maximum(token, 0), sequences.token),
        keys=sequences.keys,
        active=sequences.active & ~ended,
        seen=None if sequences.seen is None else mark_seen(sequences.seen, token, active),
    )
    return after, token, logprobs


jit_sample_next = jax.jit(sample_next)


def run_steps(
    params: DecoderParams,
    config: ModelConfig,
    cache: Cache,
    sequences: Sequences,
    sampler: Sampler,
    stop_tokens: Int[Array, " stops"],
    limit: Int[Array, ""],
) -> tuple[Cache, Sequences, Tokens, LogProbs]:
    """Feeds and samples up to `limit` <= MAX_STEPS tokens for every active sequence.

    The loop ends early if no sequence is active. No active sequence's window may fill up before the last step.

    Returns:
      the cache; the sequences; and tokens and log-probabilities (or None) of MAX_STEPS steps, -1 and 0 for steps in
      which nothing was sampled.
    """
    batch = sequences.token.shape[0]
    tokens = jnp.full((MAX_STEPS, batch), -1, jnp.int32)
    logprobs = jnp.zeros((MAX_STEPS, batch), jnp.float32) if sampler.logprobs else None

    def one_step(number: Int[Array, ""], state: Any) -> Any:  # changes nothing past the limit
        cache, sequences, tokens, logprobs = state
        active = sequences.active & (number < limit)
        cache, logits = step(params, config, cache, sequences.token, active)
        sequences, token, logprob = sample_next(sampler, stop_tokens, sequences, active, cache.position, logits)
        tokens = tokens.at[number].set(token, mode="drop")
        if logprob is not None:
            logprobs = logprobs.at[number].set(jnp.where(token >= 0, logprob, 0.0), mode="drop")
        return cache, sequences, tokens, logprobs

    def more(carry: Any) -> Bool[Array, ""]:
        number, (_, sequences, *_) = carry
        return (number < limit) & jnp.any(sequences.active)

    def some_steps(carry: Any) -> Any:
        first, state = carry
        state = jax.lax.fori_loop(0, STEPS_PER_TEST, lambda offset, state: one_step(first + offset, state), state)
        return first + STEPS_PER_TEST, state

    return jax.lax.while_loop(more, some_steps, (jnp.int32(0), (cache, sequences, tokens, logprobs)))[1]


class Decoder:
    """A model's parameters, on every device of the mesh, with the operations on a cache.

    The methods donate their cache argument: use the returned cache. The caller tracks the lengths of the sequences, and
    decides when to slide.
    """

    def __init__(self, model: LanguageModel, variables: Mapping[str, Any], mesh: Mesh | None = None) -> None:
        """Converts the variables, {"params": ...}, of a model of any architecture.

        The mesh's axis `context` splits the rows of the history; the other axes hold copies.
        """
        self.config, self.mesh = model.config, mesh
        split = context_parallel.split_of(mesh, self.config)
        self.devices = 1 if split is None else split.parts
        typed = model.apply(context_parallel.replicate(dict(variables), mesh), method=model.parameters)
        sharding = None if mesh is None else NamedSharding(mesh, context_parallel.REPLICATED)
        self.params = jax.jit(decoder_params, static_argnums=1, out_shardings=sharding)(typed, self.config)

    def init_cache(self, batch: int, tokens: int, cache_dtype: str = "auto") -> Cache:
        """Returns an empty cache for sequences of up to `tokens` tokens; for `cache_dtype` see `GenerationConfig`."""
        capacity = capacity_for(self.config, tokens, self.devices)
        return context_parallel.init_split_cache(self.config, batch, capacity, self.mesh, cache_dtype)

    def prefill(self, cache: Cache, row: int, prompt: np.ndarray) -> tuple[Cache, Float[Array, " V"]]:
        """Fills sequence `row` from its prompt, int [length >= 1]; returns the cache and the next token's logits.

        Raises:
          ValueError: if the prompt is empty or the cache has no room for it.
        """
        length = len(prompt)
        if not length:
            raise ValueError("Decoder.prefill: the prompt must have at least one token")
        self._check_room("prefill", cache, length)
        room = cache.tokens.shape[1] if isinstance(cache, WindowedCache) else length_class(length)
        padded = np.zeros((room,), np.int32)
        padded[:length] = prompt
        arrays = [np.int32(row), padded, np.int32(length)]
        if not self.config.windowed:
            return self._call(layered.prefill, cache, *arrays)
        observed = self.config.observed_rows(history_of(self.config, length))
        return self._call(windowed.prefill, cache, *arrays, np.int32(observed))

    def step(
        self, cache: Cache, tokens: Int[Array, " batch"], active: Bool[Array, " batch"]
    ) -> tuple[Cache, Float[Array, "batch V"]]:
        """Feeds tokens to the active sequences; returns the cache and the next tokens' logits."""
        return self._call(step, cache, tokens, active)

    def run_steps(self, cache: Cache, *arguments: Any) -> tuple[Cache, Sequences, Tokens, LogProbs]:
        """Calls `run_steps` with the arguments after `cache`: sequences, sampler, stop tokens and limit."""
        return self._call(run_steps, cache, *arguments)

    def slide(self, cache: WindowedCache, row: int, tokens: int) -> WindowedCache:
        """Slides the full window of sequence `row`, which has `tokens` tokens.

        Raises:
          ValueError: if the window is not full or the cache has no room for its rows.
        """
        if tokens < 1 or tokens % self.config.generation_window:
            size = self.config.generation_window
            raise ValueError(f"Decoder.slide: {tokens:,} tokens do not fill windows of {size:,}")
        self._check_room("slide", cache, tokens + 1)
        observed = np.int32(self.config.observed_rows(history_of(self.config, tokens + 1)))
        return self._call(windowed.slide, cache, np.int32(row), observed)

    def grow(self, cache: Cache, tokens: int) -> Cache:
        """Copies a cache to one for sequences of up to `tokens` tokens; returns it unchanged if it has the room."""
        capacity = capacity_for(self.config, tokens, self.devices)
        return cache if capacity <= cache.capacity else context_parallel.grow(self.config, cache, capacity)

    def _check_room(self, method: str, cache: Cache, tokens: int) -> None:
        """Raises a ValueError if a cache cannot store so many tokens: compiled code would overwrite other rows."""
        rows = stored_rows(self.config, tokens)
        if self.config.grows and rows > cache.capacity:
            needed = f"the cache has {cache.capacity:,} rows, and {rows:,} are needed"
            raise ValueError(f"Decoder.{method}: {needed}; call Decoder.grow first")

    def _call(self, function: Callable[..., Any], cache: Cache, *rest: Any) -> Any:
        return context_parallel.on_devices(function, self.mesh, self.params, self.config, cache, *rest)
