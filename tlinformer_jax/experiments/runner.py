"""Runs jobs one after another, each in a process of its own, with retries. Without JAX: a device has one owner.

A process each, because a crash, a kill by the system or memory that is not given back then costs one run and not the
sweep, and because the peak of a device's memory is counted by process. It costs some seconds a run to start.
"""

import contextlib
import dataclasses
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from tlinformer_jax.errors import DataError
from tlinformer_jax.experiments.job import STOPPED, Job, finished_result
from tlinformer_jax.files import open_own

COMMAND = (sys.executable, "-m", "tlinformer_jax", "point")
LOG_FILE = "log.txt"
# Of a user's mistake, which would be the same again.
MISTAKE = 2


@dataclasses.dataclass(frozen=True)
class Failure:
    """A job that did not finish: its name, and why."""

    name: str
    reason: str


def run_jobs(jobs: Sequence[Job], retries: int, finished: Callable[[], object] = lambda: None) -> list[Failure]:
    """Runs those jobs that are not finished; a failed one is tried again so often, then left for the next.

    Args:
      jobs: in the order in which they run.
      retries: of each, but for a mistake that only the user can mend.
      finished: called after each that was run and has finished.

    Returns:
      those that have failed for good.

    Raises:
      UserError: before any runs, if a directory holds the result of another configuration.
    """
    done = [finished_result(job) is not None for job in jobs]
    failures = []
    for number, (job, is_done) in enumerate(zip(jobs, done), 1):
        title = f"point {number} of {len(jobs)}, {job.name}"
        if is_done:
            _tell(f"{title}: finished before")
            continue
        reason = _reason_of_failure(job, title, retries)
        if reason is None:
            finished()
        else:
            failures.append(Failure(job.name, reason))
    return failures


def _reason_of_failure(job: Job, title: str, retries: int) -> str | None:
    """Tries a job; returns why the last attempt failed, None if one did not."""
    reason = ""
    for attempt in range(1, retries + 2):
        _tell(f"{title}: {'starting' if attempt == 1 else f'attempt {attempt} of {retries + 1}'}")
        status, last_line = run_in_process(job)
        if status == 0 and finished_result(job) is not None:
            return None
        reason = describe_end(status, last_line)
        _tell(f"{title}: failed, {reason}")
        if status == MISTAKE:
            break
    return reason


def run_in_process(job: Job) -> tuple[int, str]:
    """Runs a job in a fresh process, whose stderr is passed on and kept in the working directory's log.txt.

    A signal that ends this process stops the other one first, which saves what it has.

    Returns:
      its exit status, negative for a signal, and the last line it wrote.
    """
    last_line = ""
    log_file = _made(job.workdir) / LOG_FILE
    with (
        open_own(log_file, "a") as log,
        subprocess.Popen(
            COMMAND, stdin=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            _order(process, job)
            for line in process.stderr:
                _pass_on(line, log)
                last_line = line.strip() or last_line
        except BaseException:
            process.send_signal(signal.SIGTERM)
            for line in process.stderr:
                _pass_on(line, log)
            raise
    return process.returncode, last_line


def describe_end(status: int, last_line: str) -> str:
    """Why a process did not finish its job."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    if status == STOPPED:
        return "stopped by a signal before its end"
    return f"status {status}: {last_line.removeprefix('error: ')}" if last_line else f"status {status}"


def _made(workdir: pathlib.Path) -> pathlib.Path:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{workdir}: must be a directory that can be written ({error.strerror})") from None
    return workdir


def _order(process: subprocess.Popen[str], job: Job) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended already; its stderr says why
        process.stdin.write(job.to_json() + "\n")
        process.stdin.flush()  # and stays open: its end would be ours


def _pass_on(line: str, log: TextIO) -> None:
    sys.stderr.write(line)
    sys.stderr.flush()
    log.write(line)
    log.flush()


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
