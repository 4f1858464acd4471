"""Every bad input gets one line that says what is wrong, and status 2, and leaves nothing: docs/reliability.md."""

import json
import os
import sys

import pytest

from tests.support import bad_files, bad_inputs, refusals
from tests.support.commands import check_refusal, command, run_line
from tests.support.compilation import quick_flags

pytest.importorskip("safetensors")
pytest.importorskip("tokenizers")
pytest.importorskip("zstandard")


def all_results() -> list[refusals.Result]:
    """What all cases did, in a process that forks, which this one must not: it uses JAX."""
    environment = os.environ | {"XLA_FLAGS": quick_flags()}
    line = [sys.executable, "-m", "tests.support.refusals"]
    done = run_line(line, environment)
    assert done.returncode == 0, done.stderr
    return [refusals.Result(**json.loads(text)) for text in done.stdout.splitlines()]


def faults(result: refusals.Result) -> list[str]:
    """What is wrong with how a command was refused."""
    # Indented lines after the error say what to do (how to get WikiText-103).
    lines = [line for line in result.err.splitlines() if not line.startswith("  ")]
    found = [] if result.status == 2 else [f"status {result.status}"]
    if "Traceback" in result.err:
        found.append("a traceback")
    # Before the error there may be lines on damaged checkpoints, or on what the run had begun to do.
    if [line.startswith("error: ") for line in lines] != [False] * (len(lines) - 1) + [True]:
        found.append(f"not one error, in the last line: {result.err!r}")
    if result.says not in result.err:
        found.append(f"{result.says!r} is not said: {result.err!r}")
    if result.out:
        found.append(f"output {result.out!r}")
    if result.changed:
        found.append(f"left or changed {result.changed}")
    return found


def test_what_is_looked_for_would_be_found():
    sound = refusals.Result("group", "what", "command", "field", 2, "", "error: field = 3: must be 4\n", [])
    assert faults(sound) == []
    assert len(bad_inputs.GROUPS) == 11
    for name, value in {
        "status": 1,
        "err": "error: field\nTraceback\n",
        "says": "another",
        "out": "text",
        "changed": ["run/config.json"],
    }.items():
        assert faults(refusals.Result(**{**vars(sound), name: value})), name


@pytest.mark.slow
@pytest.mark.long
def test_every_bad_input_gets_one_line_and_status_2_and_leaves_nothing(tmp_path):
    """In one test, so that all cases run once whichever worker gets which tests."""
    results = all_results()
    assert len(results) == sum(map(len, bad_inputs.GROUPS.values())) >= 60
    wrong = {result.command: found for result in results if (found := faults(result))}
    assert not wrong, json.dumps(wrong, indent=1)
    if sys.version_info[:2] == (3, 11):  # some lines quote Python's own words; the document has those of 3.11
        told = "the document shows other lines; correct it by `python -m tests.support.refusals --write`"
        assert refusals.written() == refusals.table(results).strip(), told

    # Forked commands say what typed ones do.
    bad_files.write_files(tmp_path)
    for what in ("config file that raises", "a .gz that is cut off", "a field that does not exist"):
        (case,) = (case for cases in bad_inputs.GROUPS.values() for case in cases if case.what == what)
        (result,) = (result for result in results if result.what == what)
        typed = command(case.command, *case.argv(str(tmp_path)))
        check_refusal(typed, case.says)
        assert typed.stderr.replace(str(tmp_path), "DIR") == result.err
