"""The generator: prompts in, tokens or text out, all at once or as a stream."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tlinformer_jax.data.tokenizers import Tokenizer, check_vocab, load_tokenizer
from tlinformer_jax.decoding.cache import check_cache_dtype
from tlinformer_jax.decoding.context_parallel import split_of
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.decoding.sampling import MAX_STEPS, GenerationConfig, are_integers
from tlinformer_jax.decoding.stream import Generation, GenerationStream
from tlinformer_jax.errors import ConfigError, UserError
from tlinformer_jax.files import local_path
from tlinformer_jax.models.model import LanguageModel, build_model

Prompts = Sequence[str] | Sequence[Sequence[int] | np.ndarray]

# Most tokens per device call when streaming.
STREAM_CHUNK = 16


class Generator:
    """Generates with a trained model of any architecture, on one device or several.

    The options of all methods are the fields of `sampling.GenerationConfig`.

    Prompts of any lengths run as one batch, and each prompt gets the tokens that it would get alone: exactly in float32
    on the CPU, elsewhere unless rounding changes a choice.
    """

    def __init__(
        self,
        model: LanguageModel,
        variables: Mapping[str, Any],
        tokenizer: Tokenizer | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Prepares generation with a model and its variables, {"params": ...}.

        Text and stop strings need a tokenizer; several devices need a mesh from `decoding.context_mesh`.
        """
        if tokenizer is not None:
            check_vocab(tokenizer, model.config.vocab_size)
        # Take the parameters from the host: if they were split over a mesh, the cache would be, too.
        host = jax.device_get(dict(variables))
        self.decoder = Decoder(model, jax.tree.map(jnp.asarray, host) if mesh is None else host, mesh)
        self.tokenizer = tokenizer

    @classmethod
    def from_workdir(
        cls, workdir: str | pathlib.Path, step: int | None = None, mesh: Mesh | None = None
    ) -> "Generator":
        """Loads a training run's checkpoint of `step`, or by default its newest valid checkpoint."""
        from tlinformer_jax.config.run import load_config
        from tlinformer_jax.training.checkpoint import load_params

        workdir = local_path(workdir, "workdir")
        config, tokenizer = load_config(workdir).model, load_tokenizer(workdir)
        check_vocab(tokenizer, config.vocab_size)
        split_of(mesh, config)  # raises errors before anything is loaded
        _, params = load_params(workdir, config, step)
        return cls(build_model(config), {"params": params}, tokenizer, mesh)

    def generate_tokens(self, prompts: Sequence[Sequence[int] | np.ndarray], **options: Any) -> list[list[int]]:
        """Returns the new tokens of each prompt (one or more token ids), including the stop token.

        Raises:
          UserError: if a prompt or option is not allowed, or logits are not finite.
        """
        return [generation.tokens for generation in _completed(self._stream(prompts, options))]

    def generate(self, texts: Sequence[str], **options: Any) -> list[str]:
        """Returns the continuation of each text, up to the end-of-text token or a stop string."""
        return [generation.text for generation in _completed(self._stream(texts, options))]

    def run(self, prompts: Prompts, **options: Any) -> list[Generation]:
        """Returns tokens, text, log-probabilities and costs of each prompt.

        After Ctrl-C it returns the results so far, with finish_reason 'interrupted'.
        """
        stream = self._stream(prompts, options)
        try:
            return _completed(stream)
        except KeyboardInterrupt:
            stream.stop()
            return stream.generations

    def stream(self, prompts: Prompts, **options: Any) -> GenerationStream:
        """Returns an iterator of pieces, which yields each piece as soon as it is drawn."""
        return self._stream(prompts, options, chunk=STREAM_CHUNK)

    def _stream(self, prompts: Prompts, options: Mapping[str, Any], chunk: int = MAX_STEPS) -> GenerationStream:
        """Checks prompts and options, then prepares a stream; `chunk` is the default of the option."""
        config = GenerationConfig.of(options)
        check_cache_dtype(self.decoder.config, config.cache_dtype)
        # A single text would be taken for a list of its characters.
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence | np.ndarray):
            raise UserError("prompts: must be a list of texts, or of lists of token ids")
        tokens = [self._tokens_of(number, prompt) for number, prompt in enumerate(prompts)]
        ends = config.stop_tokens
        if ends is None:
            of_texts = any(isinstance(prompt, str) for prompt in prompts)
            ends = (self.tokenizer.end_of_text,) if self.tokenizer is not None and of_texts else ()
        chunk = config.chunk or (STREAM_CHUNK if config.stop_strings else chunk)
        config = dataclasses.replace(config, stop_tokens=ends, chunk=chunk)
        size = self.decoder.config.vocab_size
        if not are_integers(ends, size):
            allowed = f"must be ids of the vocabulary, 0 .. {size - 1}"
            raise ConfigError("generation.stop_tokens", list(ends), allowed)
        if config.stop_strings and self.tokenizer is None:
            allowed = "must be empty, because the generator has no tokenizer"
            raise ConfigError("generation.stop_strings", list(config.stop_strings), allowed)
        return GenerationStream(self.decoder, tokens, config, self.tokenizer)

    def _tokens_of(self, number: int, prompt: Any) -> np.ndarray:
        """Checks a prompt and returns its ids, int32 [length >= 1]."""
        size = self.decoder.config.vocab_size
        if isinstance(prompt, str) and self.tokenizer is not None:
            try:
                prompt = self.tokenizer.encode(prompt)
            except UnicodeEncodeError:
                raise UserError(f"prompt {number}: must be text; it holds parts of characters (surrogates)") from None
        if not are_integers(prompt, size) or not len(prompt):
            allowed = (
                f"must be a text, if there is a tokenizer, or a list of one or more token ids from 0 to {size - 1}"
            )
            raise UserError(f"prompt {number}: {allowed}")
        return np.asarray(prompt, np.int32)


def _completed(stream: GenerationStream) -> list[Generation]:
    for _ in stream:
        pass
    return stream.generations
