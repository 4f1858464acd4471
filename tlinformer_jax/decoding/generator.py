"""The generator: prompts in, tokens or text out, all at once or as a stream."""

import dataclasses
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tlinformer_jax.data.tokenizers import Tokenizer, check_vocab, load_tokenizer
from tlinformer_jax.decoding.cache import check_cache_dtype
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.decoding.sampling import MAX_STEPS, GenerationConfig
from tlinformer_jax.decoding.spread import split_of
from tlinformer_jax.decoding.stream import Generation, Stream, TextStream
from tlinformer_jax.errors import ConfigError, UserError
from tlinformer_jax.files import local_path
from tlinformer_jax.models.model import LanguageModel, build_model

Prompts = Sequence[str] | Sequence[Sequence[int] | np.ndarray]

# Most tokens per device call when streaming.
STREAM_CHUNK = 16


class CacheWarning(UserWarning):
    """A cache is rebuilt although the previous call's cache could have been continued."""


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
        # Prompts and new tokens (which grow while streaming) of the previous call.
        self._before: list[tuple[np.ndarray, list[int]]] = []

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
        stream = self._stream(prompts, options, show_text=False)
        return [generation.tokens for generation in _completed(stream)]

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

    def stream(self, prompts: Prompts, **options: Any) -> Stream:
        """Returns an iterator of pieces, which yields each piece as soon as it is drawn."""
        return self._stream(prompts, options, chunk=STREAM_CHUNK)

    def _stream(
        self,
        prompts: Prompts,
        options: Mapping[str, Any],
        *,
        chunk: int = MAX_STEPS,
        show_text: bool = True,
    ) -> Stream:
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
        if any(token >= size for token in ends):
            allowed = f"must be ids of the vocabulary, 0 .. {size - 1}"
            raise ConfigError("generation.stop_tokens", list(ends), allowed)
        if config.stop_strings and self.tokenizer is None:
            allowed = "must be empty, because the generator has no tokenizer"
            raise ConfigError("generation.stop_strings", list(config.stop_strings), allowed)
        tokenizer = self.tokenizer if show_text or config.stop_strings else None
        texts = [TextStream(tokenizer, prompt.tolist(), config.stop_strings) for prompt in tokens]
        stream = Stream(self.decoder, tokens, config, texts)
        self._warn_of_continuation(tokens)
        self._before = [(prompt, new.tokens) for prompt, new in zip(tokens, stream.generations)]
        return stream

    def _tokens_of(self, number: int, prompt: Any) -> np.ndarray:
        """Checks a prompt and returns its ids, int32 [length >= 1]."""
        where = f"prompt {number}"
        if isinstance(prompt, str):
            if self.tokenizer is None:
                allowed = "must be a list of token ids, because the generator has no tokenizer"
                raise UserError(f"{where}: {allowed}")
            try:
                prompt = self.tokenizer.encode(prompt)
            except UnicodeEncodeError:
                allowed = "must be text; it holds parts of characters (surrogates)"
                raise UserError(f"{where}: {allowed}") from None
        try:
            tokens = np.asarray(prompt)
        except ValueError:  # lists of unequal lengths
            tokens = np.zeros((1, 1))
        if tokens.size == 0:
            raise UserError(f"{where}: must hold at least one token; it is empty")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise UserError(f"{where}: must be a text or a list of token ids")
        size = self.decoder.config.vocab_size
        outside = tokens[(tokens < 0) | (tokens >= size)]
        if outside.size:
            raise UserError(f"{where}: token {outside[0]} is outside the vocabulary, 0 .. {size - 1}")
        return tokens.astype(np.int32)

    def _warn_of_continuation(self, prompts: Sequence[np.ndarray]) -> None:
        """Warns if a prompt repeats all tokens of the previous call and adds fewer tokens than a window has."""
        size, windowed = self.decoder.config.generation_window, self.decoder.config.windowed
        for row, prompt in enumerate(prompts if windowed else ()):
            for old, new in self._before:
                length = len(old) + len(new)
                added = len(prompt) - length
                if not 0 <= added < size:
                    continue
                if np.array_equal(prompt[:length], np.concatenate([old, np.array(new, int)])):
                    warnings.warn(
                        f"prompt {row} repeats the {length} tokens of the previous call and adds {added}, fewer than "
                        f"model.generation_window = {size}, but its whole cache is computed again; generate more "
                        "tokens in one call and read them from stream()",
                        CacheWarning,
                        stacklevel=4,
                    )
                    return


def _completed(stream: Stream) -> list[Generation]:
    for _ in stream:
        pass
    return stream.generations
