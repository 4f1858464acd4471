"""Actions on a model right after its training, while its parameters are in memory."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tlinformer_jax.data.tokenizers import NUMBERS
from tlinformer_jax.errors import UserError

if TYPE_CHECKING:
    from tlinformer_jax.config.run import RunConfig
    from tlinformer_jax.training.setup import Run

# None ends in a space: a word's first token includes the space before it.
PROMPTS = ("The", "It was", '"I do not', "In the beginning")
SAMPLE_TOKENS = 120
SAMPLING = {"temperature": 0.8, "top_p": 0.95}
# Parts of an evaluation that a record already has.
OF_RUN = ("command", "workdir_config", "step", "device", "devices", "jax")


def evaluate(run: "Run", params: Any, length: int | None = None) -> dict[str, Any]:
    """Figures and losses by position in samples of `length` tokens (None: as trained); see `evaluate_run`.

    Of a text: all tokens of the validation split but the first, at every length. Of a task: the test split, because
    validation may have stopped the run.
    """
    from tlinformer_jax.evaluation.report import EvaluationOptions, evaluate_run
    from tlinformer_jax.evaluation.trained import TrainedRun

    data = run.config.data
    split = "test" if data.is_task else "validation"
    options = EvaluationOptions(length=length or data.sequence_length, by_position=True)
    stream = run.split(split, None if length is None else 1)
    report = evaluate_run(TrainedRun(run, params, run.horizon.steps), stream, options, split=split)
    return {name: part for name, part in report.items() if name not in OF_RUN}


def samples(run: "Run", params: Any) -> dict[str, Any]:
    """Continuations of fixed prompts, drawn with seed 0: options and texts."""
    from tlinformer_jax.decoding.generator import Generator

    generator = Generator(run.model, {"params": params}, run.tokenizer)
    texts = generator.generate(PROMPTS, max_new_tokens=SAMPLE_TOKENS, seed=0, **SAMPLING)
    drawn = [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, texts)]
    return {"max_new_tokens": SAMPLE_TOKENS, "seed": 0, **SAMPLING, "samples": drawn}


def history(run: "Run", params: Any, length: int | None = None) -> dict[str, Any]:
    """`evaluation.history` on the validation split, in samples of `length` tokens (None: as trained)."""
    from tlinformer_jax.evaluation.history import HistoryOptions, measure_history
    from tlinformer_jax.evaluation.trained import TrainedRun

    stream = run.split("validation", length)
    return measure_history(TrainedRun(run, params, run.horizon.steps), stream, HistoryOptions(length=length))


ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {"evaluate": evaluate, "samples": samples, "history": history}
# Those that take a number, as in evaluate@8192.
NUMBERED = ("evaluate", "history")


def run_action(name: str, run: "Run", params: Any) -> dict[str, Any]:
    """Carries out an action whose name `checked_actions` has passed; returns JSON."""
    kind, _, number = name.partition("@")
    return ACTIONS[kind](run, params, *([int(number)] if number else []))


def checked_actions(names: Sequence[str], where: str = "--then") -> tuple[str, ...]:
    """The names, each once; UserError for one that is not in ACTIONS, nor in NUMBERED with @LENGTH."""
    for name in names:
        kind, at, number = name.partition("@")
        if kind not in ACTIONS or (at and (kind not in NUMBERED or not number.isdecimal() or int(number) < 1)):
            allowed = ", ".join([*ACTIONS, *(f"{kind}@LENGTH" for kind in NUMBERED)])
            raise UserError(f"{where}={','.join(names)}: {name!r} must be one of {allowed}")
    return tuple(dict.fromkeys(names))


def check_possible(names: Sequence[str], config: "RunConfig") -> None:
    """Checks before the training that its model and data allow the actions, else raises UserError."""
    tokenizer = config.data.tokenizer
    for name in names:
        kind, _, number = name.partition("@")
        if kind == "history":
            from tlinformer_jax.evaluation.history import check_measurable

            check_measurable(config.model, int(number) if number else config.data.sequence_length)
        if kind == "samples" and tokenizer.startswith(NUMBERS):
            raise UserError(f"samples: data.tokenizer = {tokenizer!r}: must be one of texts")
