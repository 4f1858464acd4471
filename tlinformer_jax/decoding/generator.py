"""The generator: prompts in, tokens or text out, at once or as they come."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tlinformer_jax.data.tokenizers import Tokenizer, check_vocab, load_tokenizer
from tlinformer_jax.decoding.accounting import warn_of_continuation
from tlinformer_jax.decoding.batch import Batch
from tlinformer_jax.decoding.decoder import Decoder
from tlinformer_jax.decoding.loop import MAX_STEPS
from tlinformer_jax.decoding.sampling import sequence_keys
from tlinformer_jax.decoding.settings import STREAM_CHUNK, GenerationConfig, generation_config
from tlinformer_jax.decoding.spread import split_of
from tlinformer_jax.decoding.stream import Generation, Stream
from tlinformer_jax.decoding.text import TextStream
from tlinformer_jax.errors import ConfigError, UserError
from tlinformer_jax.files import local_path
from tlinformer_jax.models.model import LanguageModel, build_model

Prompts = Sequence[str] | Sequence[Sequence[int] | np.ndarray]


class Generator:
    """Generates with a trained model of any architecture, on one device, or with the history spread over several.

    The options of all methods are the fields of `settings.GenerationConfig` and of `sampling.SamplingConfig`, by
    name: max_new_tokens, stop_tokens, stop_strings, logprobs, chunk; temperature, top_k, top_p, min_p,
    repetition_penalty, seed. `seed` may be a list, one for each prompt; one number stands for seed + i.

    Prompts are generated together, whatever their lengths, and each gets the tokens it would get alone (in float32 on
    the CPU exactly; elsewhere as far as rounding decides no choice). Each has a window phase of its own: a sequence
    whose window is full slides alone, one after another, while the others wait. So a batch of B sequences out of
    step costs B short calls in generation_window tokens, and B slides, each as long as that of a sequence alone.

    Attributes:
      decoder: the model's parameters, in the compute dtype on the devices used, and its compiled functions.
      tokenizer: or None.
    """

    def __init__(
        self,
        model: LanguageModel,
        variables: Mapping[str, Any],
        tokenizer: Tokenizer | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Takes a model and its variables.

        Args:
          model: of any architecture.
          variables: {"params": ...} as `model.init` gives them.
          tokenizer: needed for prompts that are texts, and for stop strings.
          mesh: of devices, as `Decoder` takes it (`decoding.context_mesh` makes one); None: the default device.

        Raises:
          ConfigError: if the tokenizer has more ids than the model, or the model has no history to spread.
        """
        if tokenizer is not None:
            check_vocab(tokenizer, model.config.vocab_size)
        # From the host: parameters split over a mesh would spread the cache, and compile everything twice.
        host = jax.device_get(dict(variables))
        self.decoder = Decoder(model, jax.tree.map(jnp.asarray, host) if mesh is None else host, mesh)
        self.tokenizer = tokenizer
        # Of the call before: prompts, and new tokens as they come.
        self._before: list[tuple[np.ndarray, list[int]]] = []

    @classmethod
    def from_workdir(
        cls, workdir: str | pathlib.Path, step: int | None = None, mesh: Mesh | None = None
    ) -> "Generator":
        """The newest good checkpoint of a training run, or that of `step`; `mesh` as the class takes it.

        Raises:
          UserError: if the directory holds no run, no checkpoint or no tokenizer that fits, or the model has no history
            to spread.
        """
        from tlinformer_jax.config import load_config
        from tlinformer_jax.training.checkpoint import check_size, restore_params

        workdir = local_path(workdir, "workdir")
        config, tokenizer = load_config(workdir), load_tokenizer(workdir)
        check_vocab(tokenizer, config.model.vocab_size)
        check_size(workdir, config.model, step)
        model = build_model(config.model)
        split_of(mesh, config.model)  # before anything is loaded
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
        _, params = restore_params(workdir, abstract, step)
        return cls(model, {"params": params}, tokenizer, mesh)

    def generate_tokens(self, prompts: Sequence[Sequence[int] | np.ndarray], **options: Any) -> list[list[int]]:
        """The new tokens of each prompt, the stop token included.

        Args:
          prompts: lists of token ids, of any lengths >= 1.
          options: see the class.

        Raises:
          UserError: for prompts and options that are not allowed, and for logits that are not finite.
        """
        stream = self._stream(prompts, options, show_text=False)
        for _ in stream:
            pass
        return [generation.tokens for generation in stream.generations]

    def generate(self, texts: Sequence[str], **options: Any) -> list[str]:
        """The continuation of each text: what comes before the end of the text or a stop string.

        Takes and raises what `generate_tokens` does, texts for token ids.
        """
        stream = self._stream(texts, options)
        for _ in stream:
            pass
        return [generation.text for generation in stream.generations]

    def run(self, prompts: Prompts, **options: Any) -> list[Generation]:
        """Tokens, text, log-probabilities and costs of each prompt.

        Ctrl-C ends it early: what there was until then comes back, with finish_reason 'interrupted'.

        Args:
          prompts: texts, or lists of token ids.
          options: see the class.

        Raises:
          UserError: for prompts and options that are not allowed, and for logits that are not finite.
        """
        stream = self._stream(prompts, options)
        try:
            for _ in stream:
                pass
        except KeyboardInterrupt:
            stream.stop()
        return stream.generations

    def stream(self, prompts: Prompts, **options: Any) -> Stream:
        """The same as an iterator of pieces, which come as soon as they are drawn.

        Takes and raises what `run` does (for logits that are not finite, its iteration does); Ctrl-C passes through,
        see `Stream`.
        """
        return self._stream(prompts, options, streaming=True)

    def _stream(
        self, prompts: Prompts, options: Mapping[str, Any], *, streaming: bool = False, show_text: bool = True
    ) -> Stream:
        """Checks everything, then prepares a stream."""
        config = generation_config(options)
        tokens = [self._tokens_of(number, prompt) for number, prompt in enumerate(_listed(prompts))]
        if config.stop_tokens is None:
            of_texts = any(isinstance(prompt, str) for prompt in prompts)
            ends = (self.tokenizer.end_of_text,) if self.tokenizer is not None and of_texts else ()
            config = dataclasses.replace(config, stop_tokens=ends)
        self._check(config)
        keys = sequence_keys(config.sampling.seed if config.seeds is None else config.seeds, len(tokens))
        before = [np.concatenate([prompt, np.array(new, np.int32)]) for prompt, new in self._before]
        warn_of_continuation(self.decoder.config, before, tokens)
        texts: list[TextStream | None] = [None] * len(tokens)
        if self.tokenizer is not None and (show_text or config.stop_strings):
            texts = [TextStream(self.tokenizer, prompt.tolist(), config.stop_strings) for prompt in tokens]
        chunk = config.chunk or (STREAM_CHUNK if streaming or config.stop_strings else MAX_STEPS)
        stream = Stream(Batch(self.decoder, tokens, config, keys), config, chunk, texts)
        self._before = list(zip(tokens, stream.new_tokens))
        return stream

    def _tokens_of(self, number: int, prompt: Any) -> np.ndarray:
        """The ids of a prompt, int32 [length >= 1].

        Raises:
          UserError: naming the prompt.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError(f"prompt {number}: must be a list of token ids, because the generator has no tokenizer")
            try:
                prompt = self.tokenizer.encode(prompt)
            except UnicodeEncodeError:
                raise UserError(f"prompt {number}: must be text; it holds parts of characters (surrogates)") from None
        try:
            tokens = np.asarray(prompt)
        except ValueError:  # lists of unequal lengths
            tokens = np.zeros((1, 1))
        if tokens.size == 0:
            raise UserError(f"prompt {number}: must hold at least one token; it is empty")
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise UserError(f"prompt {number}: must be a text or a list of token ids")
        size = self.decoder.config.vocab_size
        outside = tokens[(tokens < 0) | (tokens >= size)]
        if outside.size:
            raise UserError(f"prompt {number}: token {outside[0]} is not one of the vocabulary's 0 .. {size - 1}")
        return tokens.astype(np.int32)

    def _check(self, config: GenerationConfig) -> None:
        """Refuses what only the model or the tokenizer can tell.

        Raises:
          ConfigError: naming the option.
        """
        size = self.decoder.config.vocab_size
        if any(token >= size for token in config.stop_tokens or ()):
            allowed = f"must be ids of the vocabulary, 0 .. {size - 1}"
            raise ConfigError("generation.stop_tokens", list(config.stop_tokens or ()), allowed)
        if config.stop_strings and self.tokenizer is None:
            allowed = "must be empty, because the generator has no tokenizer"
            raise ConfigError("generation.stop_strings", list(config.stop_strings), allowed)


def _listed(prompts: Any) -> Prompts:
    """The prompts, if they are several; a single one would be taken for a list of its characters or tokens.

    Raises:
      UserError: else.
    """
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Sequence | np.ndarray):
        raise UserError("prompts: must be a list of texts, or of lists of token ids")
    return prompts  # type: ignore[return-value]
