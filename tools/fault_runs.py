"""Runs a small training in a child process that can be killed at a chosen moment; for `tools.faults`.

Its log, token cache and checkpoints show what it was doing when it was killed. The child is forked from a process that
has imported JAX but never used it, which saves the time of the imports.
"""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import re
import signal
import statistics
import sys
import time
import traceback

import numpy as np

from tlinformer_jax.config.run import RunConfig, run_config
from tlinformer_jax.errors import UserError
from tlinformer_jax.training.loop import train_and_evaluate

# The phases that a signal can be aimed at; `anywhere` is any moment of the run.
AIMS = ("step", "saving", "evaluation", "tokenisation", "anywhere")
# The phases that a signal can hit. `start`: before the first step, except tokenisation. `end`: after the last
# evaluation. A checkpoint may be saved during any of them, see `Outcome.saving`.
PHASES = ("start", "tokenisation", "step", "evaluation", "end")
TRACES = {"tokenisation": "cache/tokens/*.tmp-*", "saving": "run/checkpoints/*.saving"}
DELETING = "run/checkpoints/*.deleting"
POLL = 0.001  # seconds
HANGS_AFTER = 300.0  # seconds
GRACE = 30.0  # seconds to end after SIGTERM, Kubernetes' default

STEP_LINE = re.compile(r"^step (\d+)/(\d+) ", re.M)
EVALUATION_LINE = re.compile(r"^evaluation at step (\d+): ", re.M)
RESUMED_LINE = re.compile(r"^continuing from step (\d+) ", re.M)
FIRST_STEP = "compiled and ran step "
NOTICED = "SIGTERM: saving"


def write_texts(folder: pathlib.Path) -> None:
    """Writes train.jsonl and validation.jsonl: words of a small vocabulary, the same at every call.

    Each line has a long field that training does not read, so that tokenisation takes long enough to be interrupted.
    """
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, size))) for size in rng.integers(2, 8, 30)]
    for name, lines in (("train", 480), ("validation", 200)):
        with open(folder / f"{name}.jsonl", "w", encoding="ascii") as file:
            for _ in range(lines):
                file.write(f'{{"text": "{" ".join(rng.choice(words, 6))}", "notes": "{"x" * 30_000}"}}\n')


def fault_config(texts: pathlib.Path) -> RunConfig:
    """Returns a run with dropout, accumulation and updates over two epochs that saves and evaluates often."""
    shape = {"d_model": 16, "num_heads": 2, "num_blocks": 1, "hidden_depth": 1, "d_ff": 32, "vocab_size": 257}
    windows = {"history_window": 8, "generation_window": 8}
    return run_config(
        {
            "model": shape | windows | {"dropout": 0.1, "dtype": "float32"},
            "train": {
                "steps": "3epochs",
                "batch_size": 24,
                "accumulation": 2,
                "learning_rate": 1e-2,
                "warmup_steps": 5,
                "log_every": 1,
                "eval_every": 8,
                "checkpoint_every": 10,
                "keep_checkpoints": "2+1",
            },
            "data": {
                "dataset": "text",
                "sequence_length": 32,
                "train_files": str(texts / "train.jsonl"),
                "validation_files": str(texts / "validation.jsonl"),
            },
        }
    )


@dataclasses.dataclass(frozen=True)
class PlannedSignal:
    """A signal to send `delay` seconds after the phase `aim` began for the `occurrence`-th time in a process."""

    aim: str
    occurrence: int
    delay: float


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How one process of a run ended.

    Attributes:
      status: exit status, negative if a signal ended it; None if it hung.
      signal: the signal that was sent, None if the process ended before that moment.
      phase: one of PHASES, in which the signal arrived.
      saving: whether a checkpoint was being written or deleted at that time.
      resumed: the step from which it continued, None if it did not.
      last_step: the last step that it logged, if any.
      noticed: whether it answered SIGTERM.
      finished: whether it reached the end of the run.
      seconds: time from the signal to its end.
    """

    status: int | None
    signal: PlannedSignal | None
    phase: str
    saving: bool
    resumed: int | None
    last_step: int | None
    noticed: bool
    finished: bool
    seconds: float

    def __str__(self) -> str:
        if self.signal is None:
            return "ended by itself"
        saving = ", saving" if self.saving else ""
        return f"{self.signal.aim} aimed at, {self.phase} hit after step {self.last_step or 0}{saving}"


@dataclasses.dataclass(frozen=True)
class Durations:
    """For each aim, how long the phase took in an undisturbed run, in seconds, and how often it occurred."""

    seconds: dict[str, float]
    counts: dict[str, int]


class Process:
    """A training process in `folder` (run/, cache/), observed through its files.

    Args:
      config: configuration of the run.
      folder: contains `run`, the working directory, and `cache`, the tokens.
      number: number of the process within the trial; names its log.
    """

    def __init__(self, config: RunConfig, folder: pathlib.Path, number: int) -> None:
        self._folder = folder
        self._every, self.text = config.train.eval_every, ""
        self._before = set().union(*(self._present(pattern) for pattern in (*TRACES.values(), DELETING)))
        self._spans: dict[tuple[str, str], list[float]] = {}
        self._lines: list[tuple[float, int, int]] = []  # time, and steps and evaluations logged until then
        log = folder / f"log-{number}.txt"
        self._log = open(log, "w+", encoding="utf-8")  # noqa: SIM115 (closed by `wait`)
        self.started = time.monotonic()
        self.status: int | None = None
        self._pid = _fork(config, folder / "run", self._log.fileno())
        self._reader = open(log, encoding="utf-8", errors="replace")  # noqa: SIM115 (closed by `wait`)

    def poll(self) -> bool:
        """Reads new log lines; returns whether the process is still running."""
        if self.status is None:
            pid, code = os.waitpid(self._pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(code) if pid else None
        now = time.monotonic()
        for name, pattern in TRACES.items():
            for path, *_ in self._present(pattern) - self._before:
                self._spans.setdefault((name, path), [now, now])[1] = now
        if new := self._reader.read():
            self.text += new
            self._lines.append((now, len(self._steps()), len(EVALUATION_LINE.findall(self.text))))
        return self.status is None

    def begun(self, aim: str) -> int:
        """Returns how often the phase has begun in this process."""
        if aim == "anywhere":
            return 1
        if aim == "step":
            return len(self._steps())
        if aim == "evaluation":
            return sum(step % self._every == 0 for step in self._steps())
        return sum(name == aim for name, _ in self._spans)

    def wait(self, planned: PlannedSignal | None = None, number: int = signal.SIGKILL) -> Outcome:
        """Waits for the end of the process; sends it the signal `number` at the moment of `planned`."""
        sent, hit = None, None
        deadline = self.started + HANGS_AFTER
        while self.poll() and time.monotonic() < deadline:
            if planned is not None and sent is None and self.begun(planned.aim) >= planned.occurrence:
                time.sleep(planned.delay)
                if not self.poll():
                    break
                sent, hit = time.monotonic(), self._doing()
                os.kill(self._pid, number)
                deadline = sent + GRACE
            time.sleep(POLL)
        ended = time.monotonic()
        if self.poll():
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        self._log.close()
        self._reader.close()
        doing = self._doing() if hit is None or number == signal.SIGKILL else hit
        resumed = RESUMED_LINE.search(self.text)
        return Outcome(
            self.status,
            None if sent is None else planned,
            *doing,
            int(resumed[1]) if resumed else None,
            max(self._steps(), default=None),
            NOTICED in self.text,
            self.phase() == "end",
            0.0 if sent is None else ended - sent,
        )

    def phase(self) -> str:
        """Returns what the process is doing, or did last."""
        if self._left(TRACES["tokenisation"]):
            return "tokenisation"
        lines = list(STEP_LINE.finditer(self.text))
        evaluated = [int(number) for number in EVALUATION_LINE.findall(self.text)]
        if lines:
            step, last = int(lines[-1][1]), int(lines[-1][2])
            if step not in evaluated and (step % self._every == 0 or step == last):
                return "evaluation"
            return "end" if step == last else "step"
        return "step" if FIRST_STEP in self.text else "start"

    def durations(self) -> Durations:
        """Returns the durations of the phases; the process must have ended without a signal."""
        spans = {
            name: [end - start for (kind, _), (start, end) in self._spans.items() if kind == name] for name in TRACES
        }
        reached = {count: moment for moment, count, _ in reversed(self._lines)}
        moments = [reached[count] for count in sorted(reached) if count]
        evaluations = []
        for before, after in itertools.pairwise(self._lines):
            if after[2] > before[2]:
                evaluations.append(after[0] - before[0])
        seconds = {
            "step": statistics.median(after - before for before, after in itertools.pairwise(moments)),
            "evaluation": statistics.median(evaluations),
            "anywhere": time.monotonic() - self.started,
        }
        seconds |= {name: statistics.median(found) for name, found in spans.items()}
        return Durations(seconds, {aim: self.begun(aim) for aim in AIMS})

    def _doing(self) -> tuple[str, bool]:
        """Returns the phase, and whether a checkpoint is being written or deleted."""
        return self.phase(), self._left(TRACES["saving"]) or self._left(DELETING)

    def _left(self, pattern: str) -> bool:
        """Returns whether this process made a file that matches."""
        return bool(self._present(pattern) - self._before)

    def _steps(self) -> list[int]:
        return [int(step) for step, _ in STEP_LINE.findall(self.text)]

    def _present(self, pattern: str) -> set[tuple[str, int, int]]:
        """Returns path, inode and time of matching files: an earlier process may have left one of the same name."""
        found = set()
        for path in self._folder.glob(pattern):
            with contextlib.suppress(OSError):  # deleted in the meantime
                status = path.stat()
                found.add((str(path), status.st_ino, status.st_ctime_ns))
        return found


def _fork(config: RunConfig, workdir: pathlib.Path, log: int) -> int:
    """Starts the run in a child process with its output in the descriptor `log`; returns the child's id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ["TLINFORMER_CACHE"] = str(workdir.parent / "cache")
        train_and_evaluate(config, workdir)
        status = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.status
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # without the exit handlers of the parent
