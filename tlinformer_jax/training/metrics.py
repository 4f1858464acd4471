"""Where a run's figures go: metrics.jsonl, TensorBoard events, and a line on stderr."""

import contextlib
import functools
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from tlinformer_jax.analysis.flops import peak_flops
from tlinformer_jax.errors import DataError
from tlinformer_jax.files import open_own, own_folder, write_text
from tlinformer_jax.training.console import clock, is_of_bytes, say
from tlinformer_jax.training.setup import Run, flops_per_token

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


# ---- Files


class TensorBoardWriter:
    """TensorBoard events without TensorFlow; those of steps after `step` that are there already are hidden.

    By tensorboardX's file writer. Its SummaryWriter writes in a thread, and once a full disk has killed the thread the
    run would wait for it for ever. Every method raises OSError instead.
    """

    def __init__(self, folder: pathlib.Path, step: int = 0) -> None:
        self._folder, self._step = folder, step

    @functools.cached_property
    def _file(self) -> Any:
        """Opened when first used, after the first update: tensorboardX imports PyTorch where that is installed."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        file = EventsWriter(str(self._folder / "events"))
        start = SessionLog(status=SessionLog.START)
        file.write_event(Event(wall_time=time.time(), step=self._step + 1, session_log=start))
        file.flush()
        return file

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._file.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def cut_back(path: pathlib.Path, step: int, keep_evaluation: bool) -> None:
    """Drops the events after `step` from a metrics.jsonl, and a line that a kill has torn; whole or not at all.

    Damaged lines go too; those before the last one, which no kill explains, are counted on stderr.

    Args:
      path: of the file, which may be missing.
      step: the run goes on from.
      keep_evaluation: whether that step's evaluation stays; not where it will be repeated.
    """
    if not path.exists():
        return
    with open_own(path, "rb") as file:
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    kept, damaged = [], 0
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            repeated = event["step"] == step and not keep_evaluation and any(key.startswith("eval/") for key in event)
            if event["step"] <= step and not repeated:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            damaged += number < len(lines)
    if damaged:
        say(f"{path}: {damaged} damaged lines are dropped")
    write_text(path, "".join(f"{line}\n" for line in kept))


class MetricsLog:
    """Writes each event to metrics.jsonl and to TensorBoard.

    Every method raises a DataError where something cannot be written (disk full, say), naming it.

    Args:
      workdir: the working directory.
      active: whether to write at all; process 0 of a run alone does.
      step: the run goes on from; later events that are there were of lost steps and are dropped.
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
                self._board = TensorBoardWriter(workdir / TENSORBOARD_FOLDER, step)
            with self._writing(METRICS_FILE):
                cut_back(workdir / METRICS_FILE, step, keep_evaluation)
                # Unbuffered, so that a full disk is told once.
                self._file = open_own(workdir / METRICS_FILE, "ab", buffering=0)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        try:
            self.close()
        except DataError:
            if kind is None:  # or it would hide the error under way
                raise

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records one event; the JSON line is on disk when this returns."""
        if not self._active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in scalars.items()}  # JSON has no NaN
        line = json.dumps({"step": step, **finite}).encode() + b"\n"
        with self._writing(METRICS_FILE):
            while line:  # a write may take a part only
                line = line[self._file.write(line) :]
        with self._writing(TENSORBOARD_FOLDER):
            self._board.write_scalars(step, scalars)

    def sync(self) -> None:
        """Brings what was written to the disk; called before a checkpoint."""
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
        """Names the file that cannot be written."""
        try:
            yield
        except OSError as error:
            raise DataError(f"workdir {self._workdir}: {name} cannot be written ({error.strerror or error})") from None


class Throughput:
    """Speed of the training steps, saving included, compilation and evaluation excluded; and the time left.

    Args:
      total_steps: of the run.
      flops_per_token: model FLOPs, by `analysis.flops`; may be set anew after a restart.
      peak_flops: of all devices together, FLOP/s; None where it is not known.
    """

    def __init__(self, total_steps: int, flops_per_token: float = 0.0, peak_flops: float | None = None) -> None:
        self._total = total_steps
        self.flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._all_steps, self._all_seconds, self._saved = 0, 0.0, 0.0
        self.restart()

    def restart(self, keep_saving: bool = False) -> None:
        """Forgets the time since the last report, but that of checkpoints where `keep_saving`."""
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
        """Counts the time inside as spent on a checkpoint."""
        started = time.perf_counter()
        yield
        self._saved += time.perf_counter() - started

    def count(self, tokens: float) -> None:
        """Counts one dispatched step of `tokens` tokens."""
        self._steps, self._tokens = self._steps + 1, self._tokens + tokens

    def report(self, step: int) -> dict[str, float]:
        """The figures since the last report, all steps up to `step` being done.

        Returns:
          tokens_per_second; tflops, model FLOPs per second in 1e12; mfu, their fraction of the devices' peak, where
          that is known; input_wait and save_wait, the fractions of the time spent waiting for batches and for
          checkpoints; eta, the seconds left at the mean speed so far.
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


def build_throughput(run: Run) -> Throughput:
    """Measures the run's speed in tokens, in model FLOPs, and as a fraction of the devices' peak."""
    peak = peak_flops(jax.devices()[0].device_kind, run.config.model.compute_dtype.name)
    per_token = flops_per_token(run, run.config.data.sequence_length)
    return Throughput(run.horizon.steps, per_token, None if peak is None else peak * run.mesh.size)


# ---- Events


def log_step(log: MetricsLog, step: int, last: int, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> None:
    """Writes and prints the figures of a step of `last`; `speed` is what `Throughput.report` returns, or empty."""
    names = ("loss", "grad_norm", "learning_rate", *(["accuracy"] if "accuracy" in metrics else []))
    values = {f"train/{name}": float(metrics[name]) for name in names}
    line = f"step {step}/{last}  loss {values['train/loss']:.4f}  grad norm {values['train/grad_norm']:.3f}"
    if "accuracy" in metrics:
        line += f"  accuracy {values['train/accuracy']:.3f}"
    skips = metrics["skips"]
    for name, count, text in (
        ("skipped_updates", skips.total, "skipped"),
        ("rollbacks", skips.rollbacks, "rolled back"),
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


def log_evaluation(log: MetricsLog, run: Run, step: int, figures: Mapping[str, float], seconds: float) -> None:
    """Writes and prints the figures of an evaluation; of a model of bytes, bits per byte come first."""
    log.write(step, {f"eval/{name}": value for name, value in figures.items()})
    first = "bits_per_byte" if is_of_bytes(run) else "loss"
    names = sorted(figures, key=lambda name: name != first)
    text = "  ".join(f"{name.replace('_', ' ')} {figures[name]:.5g}" for name in names)
    say(f"evaluation at step {step}: {text}  ({clock(seconds)})")
