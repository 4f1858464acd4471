"""Actions on a model directly after its training, while its parameters are in memory."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from tlinformer_jax.data.batches import check_holds_a_sample
from tlinformer_jax.data.sources import load_split
from tlinformer_jax.data.tasks import Split, TaskSplit
from tlinformer_jax.data.tokenizers import NUMBERS, Tokenizer, build_tokenizer
from tlinformer_jax.errors import UserError

if TYPE_CHECKING:
    from tlinformer_jax.config.data import DataConfig
    from tlinformer_jax.config.run import RunConfig
    from tlinformer_jax.training.setup import TrainedRun

# No prompt ends in a space: a word's first token includes the space before it.
PROMPTS = ("The", "It was", '"I do not', "In the beginning")
SAMPLE_TOKENS = 120
SAMPLING = {"temperature": 0.8, "top_p": 0.95}
FindSplit = Callable[["DataConfig", str, Tokenizer], Split | None]


def evaluate(trained: "TrainedRun", length: int | None = None) -> dict[str, Any]:
    """Returns figures and losses by position in samples of `length` tokens (None: as trained); see `evaluate_run`.

    A text is evaluated on all tokens of a split but the first, at every length. The result is that of the first of
    `evaluated_splits`; if there is a second, its result is the entry with its name.
    """
    from tlinformer_jax.evaluation.report import EvaluationOptions, Source, evaluate_source

    data = trained.run.config.data
    options = EvaluationOptions(length=length or data.sequence_length, by_position=True)

    def evaluated(split: str) -> dict[str, Any]:
        stream = trained.run.split(split, None if length is None else 1)
        return {"split": split} | evaluate_source(trained, Source(f"the {split} split", stream, stream), options)

    first, *others = evaluated_splits(data)
    return evaluated(first) | {split: evaluated(split) for split in others}


def evaluated_splits(data: "DataConfig") -> tuple[str, ...]:
    """Returns the splits that `evaluate` evaluates.

    These are the test split of a task, because its validation accuracy may have stopped the run, and the validation
    split of a text, with the test split if `data.test_files` names its files.
    """
    if data.is_task:
        return ("test",)
    return ("validation", "test") if data.test_files else ("validation",)


def samples(trained: "TrainedRun") -> dict[str, Any]:
    """Continues fixed prompts, drawing with seed 0; returns the options and the texts."""
    from tlinformer_jax.decoding.generator import Generator

    generator = Generator(trained.run.model, {"params": trained.params}, trained.run.tokenizer)
    texts = generator.generate(PROMPTS, max_new_tokens=SAMPLE_TOKENS, seed=0, **SAMPLING)
    drawn = [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, texts)]
    return {"max_new_tokens": SAMPLE_TOKENS, "seed": 0, **SAMPLING, "samples": drawn}


def history(trained: "TrainedRun", length: int | None = None) -> dict[str, Any]:
    """Measures `evaluation.history` on the validation split, in samples of `length` tokens (None: as trained)."""
    from tlinformer_jax.evaluation.history import measure_history

    return measure_history(trained, trained.run.split("validation", length), length)


ACTIONS: dict[str, Callable[..., dict[str, Any]]] = {"evaluate": evaluate, "samples": samples, "history": history}
# Actions that take a number, as in evaluate@8192.
NUMBERED = ("evaluate", "history")


def run_action(name: str, trained: "TrainedRun") -> dict[str, Any]:
    """Performs an action whose name `checked_actions` has accepted; returns its result as JSON."""
    kind, *lengths = name.split("@")
    return ACTIONS[kind](trained, *map(int, lengths))


def checked_actions(names: Sequence[str], where: str = "--then") -> tuple[str, ...]:
    """Returns the names without repetitions; raises a UserError for an unknown name or a wrong @LENGTH."""
    for name in names:
        kind, at, number = name.partition("@")
        counted = number.isascii() and number.isdecimal() and int(number) > 0
        if kind not in ACTIONS or (at and not (kind in NUMBERED and counted)):
            allowed = ", ".join([*ACTIONS, *(f"{kind}@LENGTH" for kind in NUMBERED)])
            raise UserError(f"{where}={','.join(names)}: {name!r} must be one of {allowed}")
    return tuple(dict.fromkeys(names))


def possible_actions(names: Sequence[str], config: "RunConfig") -> tuple[str, ...]:
    """Returns the actions without `history` of samples that fit into a window: the runs of a sweep may differ."""

    def possible(name: str) -> bool:
        kind, *lengths = name.split("@")
        length = int(lengths[0]) if lengths else config.data.sequence_length
        return kind != "history" or length > config.model.generation_window

    return tuple(filter(possible, names))


def check_possible(names: Sequence[str], config: "RunConfig", find: FindSplit = load_split) -> None:
    """Checks, before training, that model and data allow the actions; raises a UserError if not.

    `find` is `load_split` or `find_split`. With `find_split` nothing is written, and a split that is not tokenised yet
    is not checked.
    """
    data, tokenizer = config.data, config.data.tokenizer
    for name in names:
        kind, *lengths = name.split("@")
        length = int(lengths[0]) if lengths else data.sequence_length
        if kind == "evaluate":
            for split in evaluated_splits(data):
                if lengths or split != "validation":  # training checks that one for samples of its own length
                    _check_split(find, data, split, length, name)
        if kind == "history":
            from tlinformer_jax.evaluation.history import MASKED, check_measurable

            if data.document_masking:
                raise UserError(MASKED)
            check_measurable(config.model, length)
            if lengths:
                _check_split(find, data, "validation", length, name)
        if kind == "samples" and tokenizer.startswith(NUMBERS):
            raise UserError(f"samples: data.tokenizer = {tokenizer!r}: must be one of texts")


def _check_split(find: FindSplit, data: "DataConfig", name: str, length: int, action: str) -> None:
    """Checks that a split has samples of `length` tokens for the action; raises a UserError if not."""
    split = find(data, name, build_tokenizer(data.tokenizer))
    if split is None:
        return
    try:
        if isinstance(split, TaskSplit):
            split.task.check(length)
        else:  # masked documents are packed into samples of any length
            check_holds_a_sample(split, length, f"{name} split", rest=data.document_masking)
    except UserError as error:
        raise UserError(f"{action}: {error}") from None
