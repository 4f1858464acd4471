"""A run that a sweep or the training command starts, its record, and the processes that train. Does not use JAX.

Each job of a sweep has its own process, so that a crash costs one run, and a device's peak memory belongs to one run.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TextIO

from tlinformer_jax.config.data import FILES
from tlinformer_jax.config.run import SECTIONS, RunConfig, run_config
from tlinformer_jax.errors import DataError, UserError, file_errors_as
from tlinformer_jax.files import finite, open_own, write_text, writing

Record = dict[str, Any]
RESULT_FILE = "result.json"
FORMAT = "tlinformer_jax run 1"
# Parts of every record; `driver.record_of` describes them.
PARTS = {
    **dict.fromkeys(("name", "study", "command", "version", "jax"), str),
    **dict.fromkeys(("config", "device", "seconds", "speed", "cache", "validation", "then"), dict),
    **dict.fromkeys(("seed", "parameters", "steps", "tokens"), int),
    "history": list,
}
DEFAULTS = {
    section: {field.name: field.default for field in dataclasses.fields(kind)} for section, kind in SECTIONS.items()
}
# Fields that do not change a run's figures: its devices, and where it reads its text; some only in earlier records.
WITHOUT_EFFECT = ("train.mesh", "data.manual_dir", "data.cache_dir", "data.full_hash", "data.num_workers")
COMMAND = (sys.executable, "-m", "tlinformer_jax.commands.sweep")  # reads jobs from its stdin
LOG_FILE = "log.txt"
STOPPED = 3  # exit status of a job's process that a signal stopped
MISTAKE = 2  # exit status for a user's mistake, which a second attempt would repeat


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to train."""

    name: str
    config: RunConfig
    workdir: pathlib.Path = pathlib.Path()  # the record, result.json, is written here too
    command: str = ""  # as typed by a user
    then: tuple[str, ...] = ()  # names of `experiments.actions` to perform after training
    study: str = "architectures"  # one of `plan.STUDIES`
    sweep: str | None = None  # name of the sweep's file
    point: str | None = None  # its name in the sweep
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields that the point sets, without the seed

    @property
    def actions(self) -> tuple[str, ...]:
        """`then`, with `evaluate` before it for a task.

        Reported figures come from the test split, because validation accuracy may have stopped the training.
        """
        data = self.config.data
        tested = not data.is_task or f"evaluate@{data.sequence_length}" in self.then
        return self.then if tested else tuple(dict.fromkeys(("evaluate", *self.then)))

    def to_json(self) -> str:
        """Returns one line of JSON, for another process."""
        return json.dumps(dataclasses.asdict(self) | {"workdir": str(self.workdir)})

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Reads a job that `to_json` wrote."""
        values = json.loads(text)
        values |= {"config": run_config(values["config"]), "workdir": pathlib.Path(values["workdir"])}
        return cls(**values | {"then": tuple(values["then"])})


def write_result(path: pathlib.Path, result: Record) -> None:
    """Writes a record completely or not at all (DataError); numbers that are not finite become null."""
    parts = [f"{json.dumps(name)}: {json.dumps(part, allow_nan=False)}" for name, part in finite(result).items()]
    with writing(f"{path}:"):
        write_text(path, "{\n" + ",\n".join(parts) + "\n}\n")


def read_result(path: pathlib.Path) -> Record:
    """Reads a record; raises a DataError if the file cannot be read or is not a record."""
    try:
        with file_errors_as(f"{path}: cannot be read"):
            result = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: is not JSON ({error})") from None
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise DataError(f"{path}: is not a record of a run; its 'format' must be {FORMAT!r}")
    for name, kind in PARTS.items():
        if not isinstance(result.get(name), kind):
            raise DataError(f"{path}: {name!r} must be {kind.__name__}")
    if not all(isinstance(result["config"].get(section), dict) for section in SECTIONS):
        raise DataError(f"{path}: 'config' must have the sections {', '.join(SECTIONS)}")
    return result


def completed(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Adds today's defaults to a recorded configuration for fields that it lacks; keeps fields removed since."""
    sections = {section: defaults | config[section] for section, defaults in DEFAULTS.items()}
    train = sections["train"]
    if accuracy := train.pop("stop_at_accuracy", 0):  # earlier records have this field beside `steps`
        train["steps"] = f"{train['steps']}@{accuracy:.15g}"
    return sections


def essence(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that decide a run's figures, as 'section.field'; files only by their names."""
    sections = completed(config)
    for name in FILES:
        paths = str(sections["data"][name]).split(",")
        sections["data"][name] = ",".join(pathlib.PurePath(path.strip()).name for path in paths)
    return {path: value for path, value in flat(sections).items() if path not in WITHOUT_EFFECT}


def flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns all fields of a configuration as 'section.field'."""
    return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}


def finished_result(job: Job) -> Record | None:
    """Returns a job's record if training and all actions are done, else None; a UserError if it is another run's."""
    result = record_of_job(job.workdir / RESULT_FILE, job)
    return result if result and set(job.actions) <= set(result["then"]) else None


def record_of_job(path: pathlib.Path, job: Job) -> Record | None:
    """Returns the record at `path`, None if there is none or it is damaged; a UserError if it is another run's."""
    if not path.exists():
        return None
    try:
        result = read_result(path)
    except DataError:
        return None  # the record will be written again
    found, wanted = essence(result["config"]), essence(job.config.to_dict())
    different = [name for name in found | wanted if found.get(name) != wanted.get(name)]
    if different:
        changed = "; ".join(f"{name}: {found.get(name)!r} -> {wanted.get(name)!r}" for name in different)
        raise UserError(f"{path}: belongs to another configuration ({changed}); use another directory")
    return result


def run_jobs(
    groups: Sequence[Sequence[Job]], retries: int, finished: Callable[[], object] = lambda: None
) -> dict[str, str]:
    """Runs the unfinished jobs, one group after another, each group in a separate process.

    A failed group is tried again up to `retries` times, unless the user made a mistake; `finished` is called after each
    group that finishes. Returns name -> reason of the last failure, for the jobs that did not finish.
    """
    left = [[job for job in group if finished_result(job) is None] for group in groups]  # raises before any job runs
    failures: dict[str, str] = {}
    for number, (group, jobs) in enumerate(zip(groups, left), 1):
        title = group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more"
        tell = functools.partial(print, f"point {number} of {len(groups)}, {title}:", file=sys.stderr, flush=True)
        if not jobs:
            tell("already finished")
            continue
        for attempt in range(1, retries + 2):
            tell("starting" if attempt == 1 else f"attempt {attempt} of {retries + 1}")
            status, last_line = run_in_process(jobs)
            jobs = [job for job in jobs if finished_result(job) is None]
            if status == 0 and not jobs:
                finished()
                break
            if status == MISTAKE or attempt > retries:
                failures |= {job.name: describe_end(status, last_line) for job in jobs}
            tell(f"failed, {describe_end(status, last_line)}")
            if status == MISTAKE:
                break
    return failures


def run_in_process(jobs: Sequence[Job]) -> tuple[int, str]:
    """Runs jobs in a new process; returns its exit status (negative for a signal) and the last line of its stderr.

    The process's stderr is passed on, and kept in log.txt of the first job's working directory. If this process is
    interrupted, it first sends SIGTERM to the other, on which a training saves its state.
    """
    lines: collections.deque[str] = collections.deque([""], maxlen=1)
    for job in jobs:
        with file_errors_as(f"{job.workdir}: must be a directory that can be written"):
            job.workdir.mkdir(parents=True, exist_ok=True)
    pipe = subprocess.PIPE
    with (
        open_own(jobs[0].workdir / LOG_FILE, "a") as log,
        subprocess.Popen(COMMAND, stdin=pipe, stderr=pipe, encoding="utf-8", errors="replace") as process,
    ):
        assert process.stdin is not None
        assert process.stderr is not None
        try:
            with contextlib.suppress(BrokenPipeError):  # the process has already ended; its stderr says why
                process.stdin.write(json.dumps([job.to_json() for job in jobs]) + "\n")
                process.stdin.flush()  # stays open: `train_point` ends when this pipe closes
            lines.extend(_passed_on(process.stderr, log))
        except BaseException:
            process.send_signal(signal.SIGTERM)
            lines.extend(_passed_on(process.stderr, log))
            raise
    return process.returncode, lines[0]


def describe_end(status: int, last_line: str) -> str:
    """Says why a process did not finish its job."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    if status == STOPPED:
        return "stopped by a signal before its end"
    return f"status {status}: {last_line.removeprefix('error: ')}" if last_line else f"status {status}"


def _passed_on(lines: Iterable[str], log: TextIO) -> Iterator[str]:
    """Writes each line to stderr and the log; yields the lines that are not blank."""
    for line in lines:
        for stream in (sys.stderr, log):
            print(line, end="", file=stream, flush=True)
        if line.strip():
            yield line.strip()
