"""The report: a directory of records of runs as one Markdown document with figures. Without JAX.

Every number is made from the records; the same records give the same text. It has no conclusions: people write those.
"""

import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tlinformer_jax.errors import DataError
from tlinformer_jax.experiments.contribution import contribution_lines
from tlinformer_jax.experiments.curves import (
    Group,
    Result,
    cache_bytes,
    groups_of,
    observed_share,
    perplexity,
    tokens_per_second,
    total_window,
    wall_seconds,
)
from tlinformer_jax.experiments.job import essence
from tlinformer_jax.experiments.plots import plot_curves, plot_sweep
from tlinformer_jax.experiments.positions import position_lines
from tlinformer_jax.experiments.results import RESULT_FILE, read_result
from tlinformer_jax.experiments.retrieval import length_lines, question_lines, retrieval_lines
from tlinformer_jax.experiments.tables import (
    device,
    duration,
    knee_lines,
    markdown,
    numbers,
    scaled,
    windows_table,
    with_spread,
)
from tlinformer_jax.files import write_text

HEAD = """# Results

Written by `python -m tlinformer_jax.report --results=DIR --out=FILE` from the records of runs (`result.json`) in DIR;
nothing here is typed by hand. Perplexities are those of the validation split, per token, after the last step. A figure
of several seeds is the mean, ± the sample standard deviation. Speed is the median of the logged steps, wall time that
of the whole training with compilation, evaluation and saving. The cache is what one sequence of N tokens takes in
generation.
"""
RETRIEVAL = """Two tables for each setting. The first counts the runs with more than 0.9 of the answers right, one for
each seed, with the Clopper-Pearson interval at 95%. The second lists every run; a seed that was run again is listed but
not counted. Where the split is 'validation', the same samples have stopped the run, so that a share just above the
wanted accuracy is a little too high; newer records have a test split of their own. Chance is that of a guess among the
answers of the sample that are not yet used.

An answer's source lies in the generation window of its question, in the W_oh rows before that, or before those. There
TConstFormer has only what was compressed; the window of TLinFormer, and full attention, read the source itself, and a
sliding window must relay it from layer to layer.
"""
QUESTIONS = """The share of answers that are right, by where in the sample the question stands. In 'recall' all pairs
come first, so a later question is farther from its answer; and late questions are rare, so that they count little in
the shares above, and are trained on less.
"""


def write_report(folder: pathlib.Path, out: pathlib.Path) -> list[pathlib.Path]:
    """Writes the report of all records in a directory, and its figures beside it in `figures`.

    Args:
      folder: that holds one `.json` file a run, and no other.
      out: the Markdown file.

    Returns:
      the figures.

    Raises:
      DataError: if there are no records, one is none, or something cannot be written.
      ImportError: where matplotlib is not installed.
    """
    results = read_results(folder)
    figures = out.parent / "figures"
    try:
        figures.mkdir(parents=True, exist_ok=True)
        lines, files = report_lines(results, figures)
        write_text(out, "\n".join(lines) + "\n")
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror})") from None
    return files


def read_results(folder: pathlib.Path) -> list[Result]:
    """All records of a directory, by file name; of a run's own directory, its record.

    Raises:
      DataError: if there are none, or a file is none.
    """
    if (folder / RESULT_FILE).exists():  # the directory of one run
        return [read_result(folder / RESULT_FILE)]
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise DataError(f"{folder}: must be a directory that holds at least one record of a run, NAME.json")
    return [read_result(path) for path in paths]


def report_lines(results: Sequence[Result], figures: pathlib.Path) -> tuple[list[str], list[pathlib.Path]]:
    """The report's lines, and the figures that were drawn for them into `figures`."""
    lines, files = [HEAD], list[pathlib.Path]()

    def figure_line(file: pathlib.Path, title: str) -> list[str]:
        return _figure(file, title, files)

    compared = sorted(groups_of(of_study(results, "architectures")), key=_order)
    for tokens, budget in itertools.groupby(compared, key=_tokens):
        groups = list(budget)
        lines += [f"## Architectures, {millions(tokens)} training tokens", "", *architecture_table(groups)]
        lines += [""]
        file = figures / f"results_history_{tokens // 10**6}M.png"
        lines += _figure(_plot_history(groups, file), "Validation loss while training", files)
    windows = of_study(results, "windows")
    for sweep in dict.fromkeys(str(result.get("sweep")) for result in windows):
        groups = groups_of(result for result in windows if str(result.get("sweep")) == sweep)
        groups.sort(key=_window_order)
        budgets = ", ".join(map(millions, sorted({_tokens(group) for group in groups})))
        lines += [f"## Windows ({sweep}), {budgets} training tokens a point", "", *windows_table(groups)]
        lines += [*knee_lines(groups), ""]
        for file in plot_sweep(groups, figures, f"results_{sweep}_"):
            lines += _figure(file, file.stem.replace("_", " "), files)
    lines += _retrieval(of_study(results, "retrieval"), figures, figure_line)
    lines += position_lines(of_study(results, "architectures"), _order, figures, figure_line)
    lines += contribution_lines(results, _order, figures, figure_line)
    lines += _samples(results)
    lines += runs(results)
    return lines, files


def of_study(results: Iterable[Result], study: str) -> list[Result]:
    """The records of one study."""
    return [result for result in results if result["study"] == study]


def architecture_table(groups: Sequence[Group]) -> list[str]:
    """The Markdown table of architectures by N."""
    columns = ["model", "architecture", "N", "seeds", "perplexity", "against Base", "bits per byte", "tokens/s", "MFU"]
    columns += ["wall time", "peak memory, GB", "cache, MB", "device"]
    rows = []
    for group in groups:
        base = base_of(group, groups)
        change = None if base is None or base is group else percent(group, base)
        rows.append(
            (
                group.label,
                group.config.model.architecture,
                f"{group.config.data.sequence_length:,}",
                numbers(group.seeds),
                with_spread(group.mean(perplexity), "{:.2f}"),
                "" if change is None else f"{change:+.1f}%",
                with_spread(group.mean(lambda result: result["validation"].get("bits_per_byte")), "{:.3f}"),
                scaled(group.mean(tokens_per_second), 1, "{:,.0f}"),
                scaled(group.mean(lambda result: result["speed"].get("mfu")), 100, "{:.1f}%"),
                duration(group.mean(wall_seconds)),
                scaled(group.mean(lambda result: result.get("peak_bytes")), 1e-9, "{:.1f}"),
                scaled(group.mean(cache_bytes), 1e-6, "{:.2f}"),
                "; ".join(dict.fromkeys(map(device, group.results))),
            )
        )
    return markdown(columns, rows)


def base_of(group: Group, groups: Iterable[Group]) -> Group | None:
    """The Transformer among `groups` with the N, the tokens, the text and the shape of `group`."""

    def terms(group: Group) -> tuple[Any, ...]:
        model, data = group.config.model, essence(group.config).data
        shape = (model.vocab_size, model.d_model, model.num_heads, model.num_layers, model.feed_forward_dim)
        return (data, _tokens(group), model.dropout, *shape)

    for other in groups:
        if other.config.model.architecture == "transformer" and terms(other) == terms(group):
            return other
    return None


def percent(group: Group, base: Group) -> float | None:
    """By how many percent the mean perplexity is above that of the base; None where one is not known."""
    ours, theirs = group.mean(perplexity), base.mean(perplexity)
    return None if ours is None or theirs is None else (ours.value / theirs.value - 1) * 100


def millions(tokens: int) -> str:
    """'100.0 M'."""
    return f"{tokens / 1e6:,.1f} M"


def runs(results: Sequence[Result]) -> list[str]:
    """What was run: every run's device, versions, tokens and seed, then the commands."""
    columns = ("run", "device", "JAX", "parameters", "steps", "tokens", "seed", "corpus", "tokenizer")
    rows = [
        (
            result["name"],
            device(result),
            result["jax"],
            f"{result['parameters']:,}",
            f"{result['steps']:,}",
            f"{result['tokens']:,}",
            str(result["seed"]),
            result["config"]["data"]["dataset"],
            result["config"]["data"]["tokenizer"],
        )
        for result in results
    ]
    commands = dict.fromkeys(result["command"] for result in results)
    return ["## Runs", "", *markdown(columns, rows), "", "Commands:", "", *fenced("\n".join(commands))]


def fenced(text: str) -> list[str]:
    """A block of text as it is; control characters are spelled out."""
    shown = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", lambda found: repr(found[0])[1:-1], text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return [f"{fence}text", shown, fence, ""]


def _order(group: Group) -> tuple[Any, ...]:
    model = group.config.model
    return (_tokens(group), group.config.data.sequence_length, model.architecture != "transformer", group.label)


def _window_order(group: Group) -> tuple[Any, ...]:
    model = group.config.model
    total, share = total_window(group.config), observed_share(group.config)
    return (group.config.data.sequence_length, model.num_blocks, model.hidden_depth, total or 2**31, share or 0.0)


def _tokens(group: Group) -> int:
    return int(group.results[0]["tokens"])


def _figure(file: pathlib.Path | None, title: str, files: list[pathlib.Path]) -> list[str]:
    """A figure's line; it joins `files`."""
    if file is None:
        return []
    files.append(file)
    return [f"![{title}](figures/{file.name})", ""]


def _plot_history(groups: Sequence[Group], file: pathlib.Path) -> pathlib.Path | None:
    """Validation loss against trained tokens, the mean over seeds."""
    curves = []
    for group in groups:
        by_step: dict[int, list[float]] = {}
        for result in group.results:
            for step, loss in result["history"]:
                by_step.setdefault(step, []).append(loss)
        tokens = _tokens(group) / max(group.results[0]["steps"], 1)
        steps = sorted(step for step, losses in by_step.items() if len(losses) == len(group.results))
        if len(steps) > 1:
            means = [sum(by_step[step]) / len(by_step[step]) for step in steps]
            curves.append((group.label, [step * tokens / 1e6 for step in steps], means))
    if not curves:
        return None
    plot_curves(curves, ("training tokens, millions", "validation loss, nats per token"), file)
    return file


def _retrieval(
    results: Sequence[Result], figures: pathlib.Path, figure_line: Callable[[pathlib.Path, str], list[str]]
) -> list[str]:
    """The section on tasks: tables for each setting, answers by question, then lengths beyond the trained one."""
    if not results:
        return []
    lines = ["## Retrieval", "", RETRIEVAL, *retrieval_lines(results)]
    by_question, by_length = question_lines(results), length_lines(results, figures, figure_line)
    lines += ["### By position of the question", "", QUESTIONS, *by_question] if by_question else []
    return lines + (["### By length and depth", "", *by_length] if by_length else [])


def _samples(results: Sequence[Result]) -> list[str]:
    """The section of generated texts: of each group the run of the first seed."""
    lines: list[str] = []
    for group in sorted(groups_of(result for result in results if "samples" in result["then"]), key=_order):
        result = group.results[0]
        drawn = result["then"]["samples"]
        options = ", ".join(f"{name} {value}" for name, value in drawn.items() if name != "samples")
        lines += [f"### {result['name']}", "", f"Drawn with {options}. The prompt is what stands before the bar.", ""]
        for sample in drawn["samples"]:
            lines += fenced(f"{sample['prompt']}|{sample['text']}")
    return ["## Samples", "", *lines] if lines else []
