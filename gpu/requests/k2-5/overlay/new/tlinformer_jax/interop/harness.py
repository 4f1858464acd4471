"""A trained model for EleutherAI's lm-evaluation-harness, the package lm-eval (extra `lm-eval`).

    from lm_eval import simple_evaluate
    from tlinformer_jax.interop.harness import HarnessModel

    results = simple_evaluate(model=HarnessModel("runs/tiny"), tasks=["piqa"])

or its own command with our model, `tlinformer`, among the others:

    python -m tlinformer_jax.interop.harness run --model tlinformer --model_args workdir=runs/tiny --tasks piqa
"""

import functools
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from tlinformer_jax.decoding.generator import Generator
from tlinformer_jax.errors import ConfigError, UserError
from tlinformer_jax.models.model import LanguageModel
from tlinformer_jax.training.checkpoint import load_run
from tlinformer_jax.training.loss import LOSS_CHUNK, token_losses_and_hits


def _fail(error: UserError) -> NoReturn:
    """Raises the error, or in a command prints it and exits."""
    if __name__ != "__main__":
        raise error from None
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.status)


try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError:
    needed = "needs the package lm-eval: pip install 'tlinformer-jax[lm-eval]'"
    _fail(UserError(f"tlinformer_jax.interop.harness: {needed}"))

# Options that a task may set for a generation; `Generator.run` has the same names.
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


@register_model("tlinformer")
class HarnessModel(TemplateLM):
    """The model of a working directory, on one device."""

    def __init__(
        self,
        workdir: str,
        step: int | None = None,
        max_length: int | None = None,
        batch_size: int | str = 8,
        max_gen_toks: int = 256,
        **others: Any,
    ) -> None:
        """Loads the newest intact checkpoint, or the one at `step`; `others` are arguments that all models get.

        A sample has `max_length` tokens (None: as in training), a continuation `max_gen_toks` unless a task sets it.
        """
        super().__init__()
        trained = load_run(workdir, step)
        run = trained.run
        for name, value in (("max_length", max_length), ("batch_size", batch_size), ("max_gen_toks", max_gen_toks)):
            if value is not None and (not str(value).isdecimal() or int(value) < 1):
                raise ConfigError(f"lm-eval.{name}", value, "must be an integer >= 1")
        self.max_length = int(max_length or run.config.data.sequence_length)
        self.batch_size, self.max_gen_toks = int(batch_size), int(max_gen_toks)
        self._tokens, self._model = run.tokenizer, run.model
        self._variables = {"params": jax.device_put(trained.params, jax.local_devices()[0])}
        self._named = f"{workdir}, step {trained.step}"

    @property
    def eot_token_id(self) -> int:  # precedes a text, as in training
        return self._tokens.end_of_text

    @property
    def tokenizer_name(self) -> str:  # part of lm-eval's cache keys
        return self._tokens.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        return self._tokens.encode(string).tolist()

    def get_model_info(self) -> dict[str, Any]:
        return {"model_name": self._named, "max_length": self.max_length}

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each text, in samples like those of `evaluate --text_file`."""
        samples, owners = [], []
        for number, (text,) in enumerate(request.args for request in requests):
            tokens = [self.eot_token_id, *self.tok_encode(text)]
            for start in range(0, len(tokens) - 1, self.max_length):
                samples.append(tokens[start : start + self.max_length + 1])
                owners.append(number)
        totals = np.zeros(len(requests))
        for owner, (losses, _) in zip(owners, self._scores(samples)):
            totals[owner] -= losses.sum(dtype=np.float64)
        return totals.tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **others: Any
    ) -> list[tuple[float, bool]]:
        """Returns the log-probability of each continuation, and whether it is the likeliest."""
        lengths = [len(continuation) for _, _, continuation in requests]
        samples = [
            [*context, *continuation][-(max(self.max_length, length) + 1) :]
            for length, (_, context, continuation) in zip(lengths, requests)
        ]
        found = zip(lengths, self._scores(samples))
        return [
            (-float(losses[len(losses) - length :].sum(dtype=np.float64)), bool(hits[len(hits) - length :].all()))
            for length, (losses, hits) in found
        ]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continues each context up to one of the task's stop strings."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            options = self._generation_options(requests[numbers[0]].args[1])
            for part in self._batches(numbers):
                contexts = [self.tok_encode(requests[number].args[0])[-self.max_length :] for number in part]
                prompts = [context or [self.eot_token_id] for context in contexts]
                for number, generation in zip(part, self._generator.run(prompts, **options)):
                    texts[number] = generation.text
        return texts

    def _generation_options(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Converts a task's options to those of `Generator.run`; greedy by default."""
        until = asked.get("until") or []
        options = {name: value for name, value in asked.items() if name in SAMPLING and value is not None}
        if not asked.get("do_sample", bool(options.get("temperature"))):
            options = {}
        elif "temperature" not in options:
            options["temperature"] = 1.0
        return options | {
            "max_new_tokens": int(asked.get("max_gen_toks", asked.get("max_new_tokens", self.max_gen_toks))),
            "stop_strings": [until] if isinstance(until, str) else [text for text in until if text],
            "stop_tokens": (self.eot_token_id,),
        }

    def _batches(self, numbers: list[int]) -> list[list[int]]:
        return [numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size)]

    @functools.cached_property
    def _generator(self) -> Generator:
        return Generator(self._model, self._variables, self._tokens)

    def _scores(self, samples: Sequence[list[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns, for every token of a sample but the first, its loss in nats and whether it is the likeliest.

        Samples of similar lengths are computed together, padded to a power of two, so that few programs are compiled.
        """
        found: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0), np.zeros(0, bool))] * len(samples)
        order = sorted((n for n, sample in enumerate(samples) if len(sample) > 1), key=lambda n: -len(samples[n]))
        for part in self._batches(order):
            width = max(16, 1 << (len(samples[part[0]]) - 2).bit_length())
            tokens = np.zeros((self.batch_size, width + 1), np.int32)
            for row, number in enumerate(part):
                tokens[row, : len(samples[number])] = samples[number]
            losses, hits = map(np.asarray, _losses_and_hits(self._model, self._variables, tokens))
            for row, number in enumerate(part):
                labels = len(samples[number]) - 1
                found[number] = losses[row, :labels], hits[row, :labels]
        return found


@functools.partial(jax.jit, static_argnums=0)
def _losses_and_hits(
    model: LanguageModel, variables: Mapping[str, Any], tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the losses and hits of tokens [batch, length + 1] but the first of each row."""
    hidden: Any = model.apply(variables, tokens[:, :-1], method=model.hidden_states)
    return token_losses_and_hits(hidden, variables["params"]["embedding"], tokens[:, 1:], LOSS_CHUNK)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        _fail(error)
