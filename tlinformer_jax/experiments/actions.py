"""What can be done with a model right after its training, in the same process, while its parameters are in memory."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tlinformer_jax.errors import UserError

if TYPE_CHECKING:
    from tlinformer_jax.training.setup import Run

PROMPTS = ("The ", "It was ", '"I do not ', "In the beginning ")
SAMPLE_TOKENS = 120
SAMPLING = {"temperature": 0.8, "top_p": 0.95}


def evaluate(run: "Run", params: Any) -> dict[str, Any]:
    """The figures of the validation split."""
    from tlinformer_jax.training.evaluation import summary

    stream = run.split("validation")
    result = run.evaluate(params, stream)
    return {"tokens": result.tokens} | summary(result, stream, run.config.model.generation_window)


def samples(run: "Run", params: Any) -> dict[str, Any]:
    """Continuations of fixed prompts, drawn with seed 0: options and texts."""
    from tlinformer_jax.decoding.generator import Generator

    generator = Generator(run.model, {"params": params}, run.tokenizer)
    texts = generator.generate(PROMPTS, max_new_tokens=SAMPLE_TOKENS, seed=0, **SAMPLING)
    drawn = [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, texts)]
    return {"max_new_tokens": SAMPLE_TOKENS, "seed": 0, **SAMPLING, "samples": drawn}


ACTIONS: dict[str, Callable[["Run", Any], dict[str, Any]]] = {"evaluate": evaluate, "samples": samples}


def checked_actions(names: Sequence[str], where: str = "--then") -> tuple[str, ...]:
    """The names, if all are of ACTIONS.

    Raises:
      UserError: naming the one that is not.
    """
    for name in names:
        if name not in ACTIONS:
            raise UserError(f"{where}={','.join(names)}: {name!r} must be one of {', '.join(ACTIONS)}")
    return tuple(dict.fromkeys(names))
