"""Where a run's figures go: metrics.jsonl, TensorBoard events, and a line of progress."""

import contextlib
import importlib.util
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from tlinformer_jax.errors import DataError
from tlinformer_jax.files import open_own, own_folder, write_text

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class ScalarWriter(Protocol):
    """What clu's metric writers and ours have in common."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records the scalars of a step."""

    def flush(self) -> None:
        """Makes everything written so far visible to readers."""

    def close(self) -> None:
        """Flushes and releases the files."""


class TensorBoardXWriter:
    """TensorBoard events without TensorFlow; those of steps after `step` that are there already are hidden.

    By tensorboardX's file writer, not its SummaryWriter: that one writes in a thread, and once the thread has died of
    a full disk the run would wait for it for ever. Every method raises OSError instead.
    """

    def __init__(self, folder: pathlib.Path, step: int = 0) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._file = EventsWriter(str(folder / "events"))
        start = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(wall_time=time.time(), step=step + 1, session_log=start))
        self._file.flush()

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._file.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def tensorboard_writer(folder: pathlib.Path, step: int = 0) -> ScalarWriter:
    """clu's writer where it can be imported (it needs TensorFlow; it hides no lost steps), else tensorboardX."""
    if importlib.util.find_spec("clu") and importlib.util.find_spec("tensorflow"):
        from clu import metric_writers

        return metric_writers.SummaryWriter(str(folder))
    return TensorBoardXWriter(folder, step)


def cut_back(path: pathlib.Path, step: int, keep_evaluation: bool) -> None:
    """Drops the events after `step` from a metrics.jsonl, and a line that a kill has torn; whole or not at all.

    Damaged lines go too; those before the last one, which no kill explains, are counted on stderr.

    Args:
      path: of the file; nothing is done where it is missing.
      step: that the run goes on from.
      keep_evaluation: whether that step's evaluation stays; not where it will be repeated.
    """
    if not path.exists():
        return
    with open_own(path, "rb") as file:
        lines = file.read().decode("utf-8", errors="replace").splitlines()

    def stays(line: str) -> bool | None:
        try:
            event = json.loads(line)
            repeated = event["step"] == step and not keep_evaluation and any(key.startswith("eval/") for key in event)
            return event["step"] <= step and not repeated
        except (ValueError, TypeError, KeyError):
            return None

    verdicts = [stays(line) for line in lines]
    kept = [line for line, verdict in zip(lines, verdicts) if verdict]
    if damaged := verdicts[:-1].count(None):
        say(f"{path}: {damaged} damaged lines are dropped")
    write_text(path, "".join(f"{line}\n" for line in kept))


class MetricsLog:
    """Writes each event to metrics.jsonl and to TensorBoard; does nothing where it is not active.

    Only process 0 of a run is active. Every method raises a DataError where something cannot be written (disk full,
    say), naming it.

    Args:
      workdir: the working directory.
      active: whether to write.
      step: that the run goes on from; later events that are there were of lost steps and are dropped.
      keep_evaluation: whether that step's evaluation stays.
    """

    def __init__(
        self, workdir: pathlib.Path, active: bool = True, step: int = 0, keep_evaluation: bool = False
    ) -> None:
        self._active, self._workdir = active, workdir
        if active:
            with self._writing(METRICS_FILE), open_own(workdir / METRICS_FILE, "ab"):
                pass  # before anything else is touched
            with self._writing(TENSORBOARD_FOLDER):
                own_folder(workdir / TENSORBOARD_FOLDER)
                self._board = tensorboard_writer(workdir / TENSORBOARD_FOLDER, step)
            with self._writing(METRICS_FILE):
                cut_back(workdir / METRICS_FILE, step, keep_evaluation)
                # Held open for the whole run and closed by close(); unbuffered, so that a full disk is told once.
                self._file = open_own(workdir / METRICS_FILE, "ab", buffering=0)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            self.close()
        except DataError:
            if kind is None:  # else it would hide the error that is under way
                raise

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records one event; the JSON line is on disk when this returns."""
        if not self._active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}  # JSON has no NaN
        line = json.dumps({"step": step, **finite}).encode() + b"\n"
        with self._writing(METRICS_FILE):
            while line:  # what is left of it, where the disk took a part only
                line = line[self._file.write(line) :]
        with self._writing(TENSORBOARD_FOLDER):
            self._board.write_scalars(step, scalars)

    def sync(self) -> None:
        """Brings what was written to the disk: before a checkpoint that makes it count."""
        if self._active:
            with self._writing(METRICS_FILE):
                os.fsync(self._file.fileno())
            with self._writing(TENSORBOARD_FOLDER):
                self._board.flush()

    def close(self) -> None:
        """Flushes and closes both."""
        if self._active:
            try:
                self.sync()
            finally:
                self._active = False
                self._file.close()
                with self._writing(TENSORBOARD_FOLDER):
                    self._board.close()

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Says what of the working directory it is, if it cannot be written."""
        try:
            yield
        except OSError as error:
            raise DataError(f"workdir {self._workdir}: {name} cannot be written ({error.strerror or error})") from None


class Throughput:
    """Speed of the training steps, saving included, and time left; without compilation and evaluation.

    Args:
      total_steps: of the run.
      flops_per_token: model FLOPs, by `analysis.flops`; it may be set anew after a restart.
      peak_flops: of all devices together, FLOP/s; None where it is not known.
    """

    def __init__(self, total_steps: int, flops_per_token: float = 0.0, peak_flops: float | None = None) -> None:
        self._total = total_steps
        self.flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._all_steps, self._all_seconds, self._saved = 0, 0.0, 0.0
        self.restart()

    def restart(self, keep_saving: bool = False) -> None:
        """Forgets what came since the last report, whose time went into something else than training.

        With `keep_saving` the time that a checkpoint has taken since then still counts.
        """
        self._saved = self._saved if keep_saving else 0.0
        self._since = time.perf_counter() - self._saved
        self._steps, self._tokens, self._waited = 0, 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for input."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Counts the time inside as spent on a checkpoint, before the next step can be dispatched."""
        started = time.perf_counter()
        yield
        self._saved += time.perf_counter() - started

    def count(self, tokens: float) -> None:
        """Counts one dispatched step of `tokens` tokens."""
        self._steps, self._tokens = self._steps + 1, self._tokens + tokens

    def report(self, step: int) -> dict[str, float]:
        """The figures since the last report, all steps up to `step` being done now.

        Returns:
          tokens_per_second; tflops, model FLOPs per second in 1e12; mfu, their fraction of the devices' peak, where
          that is known; input_wait, the fraction of the time spent waiting for batches; save_wait, the one in which a
          checkpoint held up the steps; eta, the seconds left at the mean speed so far.
        """
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        self._all_steps, self._all_seconds = self._all_steps + self._steps, self._all_seconds + elapsed
        speed = self.flops_per_token * self._tokens / elapsed
        figures = {
            "tokens_per_second": self._tokens / elapsed,
            "tflops": speed / 1e12,
            "input_wait": self._waited / elapsed,
            "save_wait": self._saved / elapsed,
            "eta": (self._total - step) * self._all_seconds / max(self._all_steps, 1),
        }
        if self._peak_flops is not None:
            figures["mfu"] = speed / self._peak_flops
        self.restart()
        return figures


def log_step(log: MetricsLog, step: int, last: int, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> None:
    """Writes and prints the figures of a step of `last`; `speed` is what `Throughput.report` returns, or empty."""
    names = ("loss", "grad_norm", "learning_rate", *(["accuracy"] if "accuracy" in metrics else []))
    values = {f"train/{name}": float(metrics[name]) for name in names}
    line = f"step {step}/{last}  loss {values['train/loss']:.4f}"
    line += f"  grad norm {values['train/grad_norm']:.3f}"
    if "accuracy" in metrics:
        line += f"  accuracy {values['train/accuracy']:.3f}"
    for name, count, text in (
        ("skipped_updates", metrics["skips"].total, "skipped"),
        ("rollbacks", metrics["skips"].rollbacks, "rolled back"),
    ):
        if int(count):
            values[f"train/{name}"] = int(count)
            line += f"  {int(count)} {text}"
    if speed:
        values |= {f"train/{name}": value for name, value in speed.items() if name != "eta"}
        used = f"  MFU {speed['mfu']:.1%}" if "mfu" in speed else f"  {speed['tflops']:.3g} TFLOP/s"
        line += f"  {speed['tokens_per_second']:,.0f} tokens/s{used}  {clock(speed['eta'])} left"
    log.write(step, values)
    say(line)


def say(message: str) -> None:
    """Prints a line of progress on stderr, in the first process only."""
    import jax

    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def parameter_overview(params: Any) -> str:
    """A table of the parameters: clu's where it is installed, else names, shapes and the total."""
    if importlib.util.find_spec("clu"):
        from clu import parameter_overview as clu_overview

        return clu_overview.get_parameter_overview(params, include_stats=False)
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(params)
    rows = [f"{'/'.join(str(key.key) for key in path):48} {leaf.shape!s:24} {leaf.size:>12,}" for path, leaf in leaves]
    return "\n".join([*rows, f"Total: {sum(leaf.size for _, leaf in leaves):,}"])
