"""Evaluates a trained model: `python -m tlinformer_jax evaluate --workdir=DIR [--split=validation | --text_file=FILE]`.

Prints figures of a split or of any text; with --by_position, losses by position; with --lengths, figures at other
sequence lengths than the trained one. --out=FILE.json stores all of these, with a description of run and machine.
"""

import json
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags

from tlinformer_jax.commands import cli
from tlinformer_jax.config.run import load_config
from tlinformer_jax.errors import UserError

if TYPE_CHECKING:
    from tlinformer_jax.evaluation.report import EvaluationOptions

cli.define_process_flags()
WORKDIR, STEP = cli.run_flags()
SPLIT = flags.DEFINE_enum("split", "validation", ["train", "validation", "test"], "Split to evaluate on.")
TEXT_FILE = flags.DEFINE_string("text_file", None, "UTF-8 file to evaluate on instead of a split.")
LENGTH = flags.DEFINE_integer("length", None, "Evaluate all tokens in samples of this length.", lower_bound=1)
LENGTHS = flags.DEFINE_list("lengths", [], "Evaluate all tokens once more in samples of each of these lengths.")
BY_POSITION = flags.DEFINE_bool("by_position", False, "Print the loss by position in the sample and in the window.")
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Sequences at a time; if not given, as in the evaluations of training.", lower_bound=1
)
JSON = flags.DEFINE_bool("json", False, "Print the figures as one JSON object.")
OUT = flags.DEFINE_string("out", None, "File to write the whole result to as JSON.")
# Parts of a report that --json prints before its figures, and after them.
JSON_PARTS = (
    ("step", "split", "text_file", "tokens"),
    ("by_document", "expert_load", "answers", "by_position", "by_window_position", "accuracy_by_position", "by_length"),
)


def main() -> None:
    """Restores a checkpoint's parameters, evaluates a split or a text, and prints the figures."""
    from tlinformer_jax.evaluation.report import EvaluationOptions
    from tlinformer_jax.parallel.processes import joined
    from tlinformer_jax.training.device_memory import EVALUATION_ADVICE, memory_advice
    from tlinformer_jax.training.setup import use_compilation_cache

    workdir = cli.given_path(WORKDIR, "the directory of a run")
    lengths = tuple(dict.fromkeys(cli.integers(LENGTHS, 1))) if LENGTHS.value else ()
    with cli.errors_by_flag():
        options = EvaluationOptions(LENGTH.value, lengths, BY_POSITION.value, BATCH_SIZE.value)
    text = None
    if TEXT_FILE.value is not None:
        if flags.FLAGS["split"].present:
            raise UserError("--split, --text_file: give one of the two")
        text = cli.text_of_file(TEXT_FILE.value, "--text_file")
    cluster = cli.cluster()
    load_config(workdir)  # refuses a wrong directory before JAX is imported
    use_compilation_cache()
    if cluster is not None:
        import jax

        # That service would keep SIGTERM for a training loop; this command ends at once.
        jax.config.update("jax_enable_preemption_service", False)
    with joined(cluster), memory_advice(EVALUATION_ADVICE), cli.errors_by_flag():
        _evaluate(workdir, text, options)


def _evaluate(workdir: pathlib.Path, text: str | None, options: "EvaluationOptions") -> None:
    """Evaluates; the first process prints the report, and writes it to --out."""
    import jax

    from tlinformer_jax.evaluation.report import evaluate_run, evaluate_text, lines, write_report
    from tlinformer_jax.training.checkpoint import load_run
    from tlinformer_jax.training.workdir import tell_changed_texts

    is_first = jax.process_index() == 0
    out = cli.writable_file(OUT.value) if OUT.value is not None and is_first else None  # checked before the work
    command = ["tlinformer_jax evaluate", *sys.argv[1:]]
    trained = load_run(workdir, STEP.value)
    if text is not None:
        report = evaluate_text(trained, text, options, text_file=TEXT_FILE.value or "", command=command)
    else:
        # `evaluate_run` checks an explicit length under its own name.
        stream = trained.run.split(SPLIT.value, None if options.length is None else 1)
        tell_changed_texts({SPLIT.value: stream}, workdir)
        report = evaluate_run(trained, stream, options, split=SPLIT.value, command=command)
    if out is not None:
        write_report(report, out)
    if is_first and JSON.value:
        head, tail = ({name: report[name] for name in names if name in report} for names in JSON_PARTS)
        cli.print_result(json.dumps(head | report["figures"] | tail))
    elif is_first:
        cli.print_result("\n".join(lines(report)))
