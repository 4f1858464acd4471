"""Compares the losses of two runs on the same documents: `python -m tools.compare_losses A.json B.json`.

Each file is a record of a sweep with the action `evaluate`, or a report of `evaluate --out`. Prints both mean losses
and the difference of B and A, each with its 95% interval by bootstrap over the documents. The difference is paired: a
document is drawn with both runs' losses, so what makes it hard for both of them cancels. If the files have evaluations
of the same splits at the same lengths of samples, each is compared: of a text with `data.test_files`, both splits.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from tlinformer_jax.commands import cli
from tlinformer_jax.data.documents import MOST_DOCUMENTS
from tlinformer_jax.errors import DataError, file_errors_as
from tlinformer_jax.evaluation.bootstrap import mean_interval
from tlinformer_jax.files import local_path

ARGUMENTS = ("A.json", "B.json")
ABSENT = (
    "must have losses by document (by_document), as this version's evaluations have for a split of "
    f"2 to {MOST_DOCUMENTS} documents"
)


class Losses(NamedTuple):
    """An evaluation's losses by document, in the order of the split."""

    split: str
    length: int  # tokens of a sample
    sha256: str  # of the split's tokens; "" if unknown
    losses: np.ndarray  # sums in nats, float64 [documents]
    tokens: np.ndarray  # int64 [documents]


Evaluations = dict[tuple[str, int], Losses]  # by split and length


def read_losses(path: pathlib.Path) -> Evaluations:
    """Reads the evaluations of a record or a report (DataError)."""
    with file_errors_as(f"{path}: cannot be read"):
        text = path.read_text(encoding="utf-8")
    try:
        found = [_checked(part) for part in _evaluations(json.loads(text))]
    except (ValueError, ArithmeticError, RecursionError, AttributeError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{path}: must be a record of a sweep or a report of an evaluation ({reason})") from None
    if not found:
        raise DataError(f"{path}: {ABSENT}")
    return {(losses.split, losses.length): losses for losses in found}


def _evaluations(content: Any) -> Iterator[dict[str, Any]]:
    """Yields the evaluations with losses by document: of a record's actions, or of a report at each length.

    An action's evaluation of a text's own test split is its entry `test`.
    """
    if "then" in content:
        actions = [part for name, part in content["then"].items() if name.partition("@")[0] == "evaluate"]
        parts = [*actions, *(part["test"] for part in actions if "test" in part)]
    else:
        parts = [content, *({"split": content.get("split")} | part for part in content.get("by_length", ()))]
    yield from (part for part in parts if "by_document" in part)


def _checked(part: dict[str, Any]) -> Losses:
    """Returns an evaluation's losses; raises a ValueError that names the damaged entry."""
    documents = part["by_document"]
    losses, tokens = np.array(documents["loss"], np.float64), np.array(documents["tokens"], np.int64)
    if losses.ndim != 1 or losses.shape != tokens.shape:
        raise ValueError(f"by_document: has {losses.size} losses and {tokens.size} numbers of tokens")
    if not np.isfinite(losses).all() or (tokens < 0).any():
        raise ValueError("by_document: losses must be finite, and numbers of tokens not negative")
    return Losses(str(part["split"]), int(part["length"]), str(documents["sha256"]), losses, tokens)


def check_comparable(a: Losses, b: Losses, names: str) -> None:
    """Raises a DataError, one line that begins with `names`, unless both are of the same tokens of the same split."""
    if a.split != b.split:
        raise DataError(f"{names}: must be of the same split; they are of {a.split} and {b.split}")
    if a.sha256 != b.sha256:
        raise DataError(f"{names}: must be of the same text; the hashes of the {a.split} splits' tokens differ")
    if len(a.tokens) != len(b.tokens):
        raise DataError(f"{names}: must be of the same documents; they have {len(a.tokens)} and {len(b.tokens)}")
    if different := np.flatnonzero(a.tokens != b.tokens).tolist():
        number = different[0]
        counts = f"document {number} has {a.tokens[number]:,} and {b.tokens[number]:,}"
        raise DataError(f"{names}: must predict the same tokens; {counts} (evaluate both with the same --length)")
    if np.count_nonzero(a.tokens) < 2:
        raise DataError(f"{names}: must have tokens of at least two documents")


def pairs_of(a: Evaluations, b: Evaluations, names: str) -> list[tuple[Losses, Losses]]:
    """Returns the evaluations to compare: of every split and length that both have, or the only one of each."""
    if common := sorted((key for key in a if key in b), key=lambda key: key[1]):
        return [(a[key], b[key]) for key in common]
    if len(a) == len(b) == 1:
        return list(zip(a.values(), b.values()))
    have = " and ".join(", ".join(f"{split} {length}" for split, length in sorted(found)) for found in (a, b))
    raise DataError(f"{names}: must have evaluations of the same split at the same length; they have {have}")


def comparison(a: Losses, b: Losses) -> list[str]:
    """Returns the lines that compare two evaluations of the same tokens."""
    sizes = f"{a.length:,}" if a.length == b.length else f"{a.length:,} (A) and {b.length:,} (B)"
    count, total = np.count_nonzero(a.tokens), a.tokens.sum()
    lines = [f"{a.split} split, {total:,} tokens of {count} documents, samples of {sizes} tokens"]
    for name, sums, form in (("A", a.losses, ".4f"), ("B", b.losses, ".4f"), ("B - A", b.losses - a.losses, "+.4f")):
        _, low, high = mean_interval(sums, a.tokens)
        lines.append(f"  {name:5}  {sums.sum() / total:{form}}  95% {low:{form}} to {high:{form}}")
    return lines


def main(*files: str) -> None:
    """Reads both files and prints the comparison."""
    a, b = (read_losses(local_path(file, name)) for file, name in zip(files, ARGUMENTS, strict=True))
    names = ", ".join(files)
    pairs = pairs_of(a, b, names)
    for pair in pairs:
        check_comparable(*pair, names)
    cli.print_result("\n".join(line for pair in pairs for line in comparison(*pair)))


if __name__ == "__main__":
    cli.run(main, ARGUMENTS)
