"""An evaluation as one small JSON object: figures, losses by position, and figures by sequence length."""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax

from tlinformer_jax.data.batches import num_samples
from tlinformer_jax.data.tasks import Split, TaskSplit
from tlinformer_jax.errors import ConfigError, UserError
from tlinformer_jax.evaluation.positions import accuracy_by_position, by_position, by_window_position
from tlinformer_jax.evaluation.trained import TrainedRun
from tlinformer_jax.files import finite, local_path
from tlinformer_jax.training.evaluation import summary
from tlinformer_jax.training.memory import advised, evaluation_advice

Report = dict[str, Any]
LONGEST = 2**31 - 1  # positions are int32


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """What is asked of an evaluation.

    Attributes:
      length: tokens of a sample, all tokens being evaluated; None for whole samples of data.sequence_length.
      lengths: lengths at which all tokens are evaluated once more, each.
      by_position: whether losses by position in the sample and in the window are told, too.
      batch_size: sequences at a time, at every length; None for as many as have the tokens of the configured batch.
    """

    length: int | None = None
    lengths: tuple[int, ...] = ()
    by_position: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        given = [
            ("length", self.length),
            ("batch_size", self.batch_size),
            *(("lengths", size) for size in self.lengths),
        ]
        for name, value in given:
            if value is not None and (not isinstance(value, int) or not 1 <= value <= LONGEST):
                raise ConfigError(f"evaluation.{name}", value, f"must be an integer from 1 to {LONGEST}")


@dataclasses.dataclass(frozen=True)
class Source:
    """The tokens that are evaluated.

    Attributes:
      name: in messages.
      stream: its first token is context only.
      counted: what words, lines and bytes are counted of.
      whole: whether every token counts, the rest after the last whole sample too, and a stream shorter than a sample
        is one.
    """

    name: str
    stream: Split
    counted: Split
    whole: bool = False


def evaluate_run(
    trained: TrainedRun,
    stream: Split,
    options: EvaluationOptions = EvaluationOptions(),
    *,
    split: str,
    command: Sequence[str] = (),
) -> Report:
    """Evaluates parameters on a split.

    Without `options.length` the figures are over the split's whole samples, as training's own evaluations are: the
    first token is not predicted, and what follows the last whole sample is left out. Those of `options.length` and of
    each of `options.lengths` are over every token but the first, in samples of that length from the split's start, the
    last one shorter: so all lengths share the same tokens, and what differs is how much of the text before it each
    token sees.

    Args:
      trained: the run; right after training, `TrainedRun(run, state.params, step)`.
      stream: the split, as `Run.split` gives it.
      options: what is asked for.
      split: the split's name, for the report.
      command: that asked for it, for the report.

    Returns:
      command, workdir_config (sections model, train, data), step, split, device, devices, jax; length, batch_size,
      tokens (that were predicted) and figures (see `training.evaluation.summary`). If asked for, by_position,
      by_window_position (see `evaluation.positions`), and by_length, a list of objects with length, batch_size,
      tokens, figures and the same. Of a task also answers (`training.answers.Answers.counts`), and with by_position,
      accuracy_by_position. Numbers that are not finite are None, so that all of it is JSON.

    Raises:
      ConfigError: for a length that leaves no whole sample.
      OutOfMemoryError: if a device's memory does not suffice.
    """
    source = Source(f"the {split} split", stream, stream)
    return finite(describe(trained, command) | {"split": split} | evaluate_source(trained, source, options))


def describe(trained: TrainedRun, command: Sequence[str]) -> Report:
    """What a report says of the run, the machine and the command."""
    config = trained.run.config.to_dict()
    return {
        "command": list(command),
        "workdir_config": {name: config[name] for name in ("model", "train", "data")},
        "step": trained.step,
        "device": jax.devices()[0].device_kind,
        "devices": trained.run.mesh.size,
        "jax": jax.__version__,
    }


def evaluate_source(trained: TrainedRun, source: Source, options: EvaluationOptions) -> Report:
    """What `evaluate_run` returns from `length` on, and raises, with infinite numbers and NaN as they are."""
    for name, length in (("length", options.length), *(("lengths", length) for length in options.lengths)):
        may_be_short = source.whole and name == "length"
        if length is not None and not may_be_short and num_samples(source.stream, length) < 1:
            assert not isinstance(source.stream, TaskSplit)  # which has samples of any length
            most = len(source.stream.tokens) - 1
            raise ConfigError(f"evaluation.{name}", length, f"must be at most {most}, what {source.name} can fill")
    length = options.length or trained.run.config.data.sequence_length
    every = source.whole or options.length is not None
    report = _at_length(trained, source, length, every, options)
    if options.lengths:
        report["by_length"] = [_at_length(trained, source, size, True, options) for size in options.lengths]
    return report


def _at_length(trained: TrainedRun, source: Source, length: int, rest: bool, options: EvaluationOptions) -> Report:
    """Evaluates in samples of `length` tokens; with `rest`, the shorter last one too."""
    run, padded = trained.run, length
    if rest and not isinstance(source.stream, TaskSplit):
        labels = len(source.stream.tokens) - 1
        # A short text is padded to a power of two, so that texts of all lengths compile few programs.
        padded, length = min(length, 1 << (labels - 1).bit_length()), min(length, labels)
    batch_size = run.evaluation_batch_size(padded, num_samples(source.stream, padded, rest), options.batch_size)
    with advised(lambda: evaluation_advice(batch_size)):
        result = run.evaluate(trained.params, source.stream, length=padded, batch_size=batch_size, rest=rest)
    result = dataclasses.replace(result, losses=result.losses[:length], weights=result.weights[:length])
    window = run.config.model.generation_window
    figures = summary(result, source.counted, window)
    report: Report = {"length": length, "batch_size": batch_size, "tokens": result.tokens, "figures": figures}
    if result.answers is not None:
        report["answers"] = result.answers.counts()
    if options.by_position:
        report["by_position"] = by_position(result)
        report["by_window_position"] = by_window_position(result, window)
        if result.answers is not None:
            report["accuracy_by_position"] = accuracy_by_position(result.answers)
    return report


def writable_file(path: str, flag: str = "--out") -> pathlib.Path:
    """The file that `flag` names, if it can be written; nothing is left of the trial.

    Raises:
      UserError: else.
    """
    target = local_path(path, flag)
    try:
        if target.is_dir():
            raise UserError(f"{flag}={path}: must be a file, not a directory")
        draft = _draft(target)
        draft.write_bytes(b"")
        draft.unlink()
    except OSError as error:
        raise UserError(f"{flag}={path}: must be a file that can be written ({error.strerror})") from None
    return target


def write_report(report: Report, target: pathlib.Path) -> None:
    """Writes a report as JSON; the file appears, or is replaced, when it is complete.

    Raises:
      UserError: if it cannot be written.
    """
    draft = _draft(target)
    text = json.dumps(report, indent=1, allow_nan=False)
    # Lists of numbers stay on one line each.
    text = re.sub(r"\[\n[^][{}\"]+\]", lambda found: " ".join(found[0].split()), text)
    try:
        draft.write_text(text + "\n", encoding="ascii")
        draft.replace(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror})") from None
    finally:
        draft.unlink(missing_ok=True)


def _draft(target: pathlib.Path) -> pathlib.Path:
    return target.with_name(f".{target.name}.{os.getpid()}.draft")
