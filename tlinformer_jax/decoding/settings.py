"""What is asked of generation: how much, when to stop, what to report; how tokens are chosen is `sampling`'s."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from tlinformer_jax.decoding.loop import MAX_STEPS
from tlinformer_jax.decoding.sampling import SamplingConfig, is_int
from tlinformer_jax.errors import ConfigError

# Tokens that the device draws between two looks of the host where somebody waits for them.
STREAM_CHUNK = 16


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """One generation's options.

    Attributes:
      max_new_tokens: most tokens that a sequence gets, at least 0.
      stop_tokens: ids that end a sequence. None: the tokenizer's end of text where the prompts are texts, and none
        where they are tokens.
      stop_strings: texts that end a sequence as soon as one of them stands in what was generated; they need a
        tokenizer.
      logprobs: whether log-probabilities are returned, in nats, under the model's own distribution.
      chunk: tokens drawn on the device between two looks of the host, 1 to 256. Small ones stream soon and draw
        little in vain after a stop string. None: 16 where text is streamed or a stop string looked for, else 256.
      seeds: one seed for each prompt, instead of sampling.seed + i for prompt i.
      sampling: how tokens are chosen.
    """

    max_new_tokens: int = 256
    stop_tokens: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False
    chunk: int | None = None
    seeds: tuple[int, ...] | None = None
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        if not is_int(self.max_new_tokens) or self.max_new_tokens < 0:
            raise ConfigError("generation.max_new_tokens", self.max_new_tokens, "must be an integer >= 0")
        if self.chunk is not None and (not is_int(self.chunk) or not 1 <= self.chunk <= MAX_STEPS):
            raise ConfigError("generation.chunk", self.chunk, f"must be an integer from 1 to {MAX_STEPS}, or None")
        if self.stop_tokens is not None:
            allowed = "must be a list of token ids"
            object.__setattr__(self, "stop_tokens", _tuple("stop_tokens", self.stop_tokens, allowed))
            if not all(is_int(token) and token >= 0 for token in self.stop_tokens):
                raise ConfigError("generation.stop_tokens", list(self.stop_tokens), allowed)
        texts = _tuple("stop_strings", self.stop_strings, "must be a list of texts, none of them empty")
        object.__setattr__(self, "stop_strings", texts)
        for text in texts:
            if not isinstance(text, str) or not text:
                raise ConfigError("generation.stop_strings", text, "must be a text of at least one character")
        if not isinstance(self.logprobs, bool | np.bool_):
            raise ConfigError("generation.logprobs", self.logprobs, "must be True or False")


def generation_config(options: Mapping[str, Any]) -> GenerationConfig:
    """The configuration that keyword options describe: fields of GenerationConfig and of SamplingConfig together.

    `seed` may also be a list, one for each prompt.

    Raises:
      ConfigError: for an option that does not exist, and for every value that is not allowed.
    """
    ours = {field.name for field in dataclasses.fields(GenerationConfig)} - {"seeds", "sampling"}
    choice = {field.name for field in dataclasses.fields(SamplingConfig)}
    for name, value in options.items():
        if name not in ours | choice:
            raise ConfigError(
                f"generation.{name}", value, f"no such option; there are {', '.join(sorted(ours | choice))}"
            )
    seeds, sampling = None, {name: value for name, value in options.items() if name in choice}
    if isinstance(sampling.get("seed"), list | tuple | np.ndarray):
        seeds = tuple(sampling.pop("seed"))
    given = {name: value for name, value in options.items() if name in ours}
    return GenerationConfig(seeds=seeds, sampling=SamplingConfig(**sampling), **given)


def _tuple(field: str, value: Any, allowed: str) -> tuple[Any, ...]:
    """A list as a tuple; a text is a list of characters to Python, and never meant so here."""
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise ConfigError(f"generation.{field}", value, allowed)
    return tuple(value)
