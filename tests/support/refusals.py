"""Runs the bad inputs and writes the table of docs/reliability.md: `python -m tests.support.refusals [--write]`.

Each case runs in a fork of this process. Prints one JSON object a case; `--write` puts the table into the document
instead.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator

from tests.support import forks

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- bad inputs: begin -->", "<!-- bad inputs: end -->"


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command did.

    Attributes:
      group: of the case.
      what: was wrong.
      command: as a user would type it, after `python -m`.
      says: what its line must hold.
      status: that it ended with.
      out: what it printed on stdout.
      err: what it printed on stderr.
      changed: files that are new, gone or different after it.
    """

    group: str
    what: str
    command: str
    says: str
    status: int
    out: str
    err: str
    changed: list[str]


def run_all() -> list[Result]:
    """Runs every case."""
    from tests.support import bad_files, bad_inputs

    forks.import_what_commands_import()
    folder = pathlib.Path(tempfile.mkdtemp(prefix="bad-inputs-"))
    try:
        bad_files.write_files(folder)
        os.environ["TLINFORMER_CACHE"] = str(folder / "cache")
        status, _, err = forks.forked("train", [f"--config={folder}/small.py", f"--workdir={folder}/run"], folder)
        assert status == 0, err
        for name, change in bad_files.CHANGES.items():
            shutil.copytree(folder / "run", folder / name)
            change(folder / name)
        with _held(folder / "held" / ".lock"):
            before = contents(folder)
            return [
                run_case(group, case, folder, before) for group, cases in bad_inputs.GROUPS.items() for case in cases
            ]
    finally:
        shutil.rmtree(folder)


def run_case(group, case, folder: pathlib.Path, before: dict[str, str]) -> Result:
    """Runs one case over the files in `folder`, of which the first case found `before`."""
    os.environ["TLINFORMER_CACHE"] = case.cache.replace("{d}", str(folder))
    status, out, err = forks.forked(case.command, case.argv(str(folder)), folder)
    after = contents(folder)
    shutil.rmtree(folder / "new", ignore_errors=True)  # so that no case meets what another has left
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    cache = [] if case.cache == type(case).cache else [f"TLINFORMER_CACHE={case.cache}"]
    shown = [*cache, case.command, *(case.arguments if case.usual else case.argv("{d}"))]
    command = " ".join(json.dumps(part) if " " in part else part for part in shown)
    says = case.says.replace("{d}", "DIR")
    shown_err = err.replace(str(folder), "DIR").replace(f"{ROOT}/", "").replace(str(ROOT), "CHECKOUT")
    out = out.replace(str(folder), "DIR")
    return Result(group, case.what, command.replace("{d}", "DIR"), says, status, out, shown_err, changed)


def contents(folder: pathlib.Path) -> dict[str, str]:
    """Path -> hash of every file below `folder`, without locks and the cache of tokens."""
    found = {}
    for place, folders, names in os.walk(folder):
        if place == str(folder):
            folders.remove("cache")
        for path in (pathlib.Path(place, name) for name in names if name != ".lock"):
            if path.is_file():
                status = path.stat()
                found[str(path.relative_to(folder))] = _digest(path, status.st_size, status.st_mtime_ns)
    return found


@functools.cache
def _digest(path: pathlib.Path, size: int, changed: int) -> str:
    """The hash of a file, made again where its size or its time of change is another."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def table(results: list[Result]) -> str:
    """The document's part: a table a group."""
    lines = []
    for group in dict.fromkeys(result.group for result in results):
        lines += [f"### {group}", "", "| what is wrong | command | what it prints |", "|---|---|---|"]
        for result in results:
            if result.group == group:
                said = " ".join(
                    line for line in result.err.splitlines() if line.startswith(("error: ", "checkpoint ", "  "))
                )
                cells = (result.what, f"`{_cell(result.command)}`", f"`{_cell(said)}`")
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def written() -> str:
    """The table that the document holds."""
    return DOCUMENT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


def write(results: list[Result]) -> None:
    """Puts the table into the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n\n{table(results)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


def _cell(text: str) -> str:
    """Text that a table's cell can hold between backquotes."""
    return text.replace("|", "\\|").replace("`", "'").encode("utf-8", "backslashreplace").decode()


@contextlib.contextmanager
def _held(path: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a working directory, as a run does."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 12 on host other\n")
        file.flush()
        yield


if __name__ == "__main__":
    found = run_all()
    if sys.argv[1:] == ["--write"]:
        write(found)
    else:
        for result in found:
            print(json.dumps(dataclasses.asdict(result)))
