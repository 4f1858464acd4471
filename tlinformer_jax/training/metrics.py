"""Writes a run's figures: to metrics.jsonl, to TensorBoard, and as a line on stderr."""

import contextlib
import errno
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from tlinformer_jax.analysis.flops import peak_flops
from tlinformer_jax.errors import DataError
from tlinformer_jax.files import finite, open_own, own_folder, write_text, writing
from tlinformer_jax.training.console import clock, is_of_bytes, say
from tlinformer_jax.training.setup import Run, flops_per_token

# If PyTorch is installed, tensorboardX imports it for functions that are not used here, which takes seconds. None makes
# the import fail, as if PyTorch were not installed.
HIDE_TORCH = "torch" not in sys.modules
if HIDE_TORCH:
    sys.modules["torch"] = None  # type: ignore[assignment]
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
finally:
    if HIDE_TORCH:
        del sys.modules["torch"]

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


# ---- Files


def event(step: int, **content: Any) -> Event:
    """Returns a TensorBoard event with the current time."""
    return Event(wall_time=time.time(), step=step, **content)


def cut_back(path: pathlib.Path, step: int, keep_evaluation: bool) -> None:
    """Drops the events after `step`, and that step's evaluation unless `keep_evaluation`.

    Drops damaged lines too: silently the last one, torn by a kill; those before it are counted on stderr.
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


class MetricsLog(contextlib.AbstractContextManager["MetricsLog"]):
    """A log in metrics.jsonl and TensorBoard; raises a DataError that names what cannot be written.

    Writes only if `active`, which is true only in process 0 of a run. The run continues from `step`: see `cut_back`;
    TensorBoard hides the later events of an earlier run. tensorboardX's SummaryWriter is not used: it waits forever
    once a full disk has killed its thread.
    """

    def __init__(
        self, workdir: pathlib.Path, active: bool = True, step: int = 0, keep_evaluation: bool = False
    ) -> None:
        self._active, self._step, self._folder = active, step, workdir / TENSORBOARD_FOLDER
        self._metrics, self._tensorboard = (
            functools.partial(writing, f"workdir {workdir}: {name}") for name in (METRICS_FILE, TENSORBOARD_FOLDER)
        )
        if active:
            path = workdir / METRICS_FILE
            with self._metrics(), open_own(path, "ab"):
                pass  # fails before anything else is changed
            with self._tensorboard():
                own_folder(self._folder)
                if not os.access(self._folder, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            with self._metrics():
                cut_back(path, step, keep_evaluation)
                self._file = open_own(path, "ab", buffering=0)  # unbuffered, so that a full disk is reported once

    @functools.cached_property
    def _events(self) -> Any:
        """The file for TensorBoard, opened at its first use."""
        events = EventsWriter(str(self._folder / "events"))
        events.write_event(event(self._step + 1, session_log=SessionLog(status=SessionLog.START)))
        return events

    def __exit__(self, kind: Any, *_: object) -> None:
        # A second error would hide the first.
        with contextlib.suppress(DataError) if kind else contextlib.nullcontext():
            self.close()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records one event; its JSON line has been written when this returns."""
        if not self._active:
            return
        line = json.dumps({"step": step, **finite(dict(scalars))}).encode() + b"\n"
        with self._metrics():
            while line:  # one call may write only a part
                line = line[self._file.write(line) :]
        with self._tensorboard():
            values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
            self._events.write_event(event(step, summary=Summary(value=values)))

    def sync(self) -> None:
        """Flushes everything to disk; called before a checkpoint."""
        if self._active:
            with self._metrics():
                os.fsync(self._file.fileno())
            if "_events" in vars(self):
                with self._tensorboard():
                    self._events.flush()

    def close(self) -> None:
        if self._active:
            try:
                self.sync()
            finally:
                self._active = False
                self._file.close()
                if "_events" in vars(self):
                    with self._tensorboard():
                        self._events.close()


class Throughput:
    """Speed of the training steps, including saving, excluding compilation and evaluation.

    `flops_per_token` are model FLOPs, to be set again after a restart; `peak_flops` those of all devices per second.
    """

    @classmethod
    def of(cls, run: Run) -> "Throughput":
        peak = peak_flops(jax.devices()[0].device_kind, run.config.model.compute_dtype.name)
        per_token = flops_per_token(run, run.config.data.sequence_length)
        return cls(run.last_step, per_token, None if peak is None else peak * run.mesh.size)

    def __init__(self, total_steps: int, flops_per_token: float = 0.0, peak_flops: float | None = None) -> None:
        self._total = total_steps
        self.flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._all_steps, self._all_seconds = 0, 0.0
        self._spent: dict[str, float] = {}
        self.restart()

    def restart(self, keep_saving: bool = False) -> None:
        """Discards the time since the last report; with `keep_saving`, except the time spent on saving."""
        saved = self._spent["save"] if keep_saving else 0.0
        self._since = time.perf_counter() - saved
        self._steps, self._tokens, self._spent = 0, 0.0, {"input": 0.0, "save": saved}

    @contextlib.contextmanager
    def spent_on(self, what: str) -> Iterator[None]:
        """Counts the time inside as spent on 'input' or 'save'."""
        started = time.perf_counter()
        yield
        self._spent[what] += time.perf_counter() - started

    def count(self, tokens: float) -> None:
        """Counts one dispatched step of `tokens` tokens."""
        self._steps, self._tokens = self._steps + 1, self._tokens + tokens

    def report(self, step: int) -> dict[str, float]:
        """Returns the figures since the last report, when all steps up to `step` are done.

        tflops are 1e12 model FLOPs per second; mfu is their fraction of the devices' peak; input_wait and save_wait are
        fractions of the time; eta is the seconds left at the mean speed so far.
        """
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        self._all_steps, self._all_seconds = self._all_steps + self._steps, self._all_seconds + elapsed
        speed = self.flops_per_token * self._tokens / elapsed
        figures = {
            "tokens_per_second": self._tokens / elapsed,
            "tflops": speed / 1e12,
            **{f"{what}_wait": spent / elapsed for what, spent in self._spent.items()},
            "eta": (self._total - step) * self._all_seconds / max(self._all_steps, 1),
        }
        if self._peak_flops is not None:
            figures["mfu"] = speed / self._peak_flops
        self.restart()
        return figures


# ---- Events


def log_step(log: MetricsLog, step: int, last: int, metrics: Mapping[str, Any], speed: Mapping[str, float]) -> None:
    """Writes and prints the figures of a step; `speed` is a `Throughput.report`, or empty."""
    names = ("loss", "grad_norm", "learning_rate", *(["accuracy"] if "accuracy" in metrics else []))
    values = {f"train/{name}": float(metrics[name]) for name in names}
    line = f"step {step}/{last}  loss {values['train/loss']:.4f}  grad norm {values['train/grad_norm']:.3f}"
    if "accuracy" in metrics:
        line += f"  accuracy {values['train/accuracy']:.3f}"
    if skipped := int(metrics["skips"].total):
        values["train/skipped_updates"] = skipped
        line += f"  {skipped} skipped"
    if rollbacks := int(metrics["skips"].rollbacks):
        values["train/rollbacks"] = rollbacks
        line += f"  {rollbacks} rolled back"
    if speed:
        values |= {f"train/{name}": value for name, value in speed.items() if name != "eta"}
        used = f"  MFU {speed['mfu']:.1%}" if "mfu" in speed else f"  {speed['tflops']:.3g} TFLOP/s"
        line += f"  {speed['tokens_per_second']:,.0f} tokens/s{used}  {clock(speed['eta'])} left"
    log.write(step, values)
    say(line)


def log_evaluation(log: MetricsLog, run: Run, step: int, figures: Mapping[str, float], seconds: float) -> None:
    """Writes and prints the figures of an evaluation; for byte tokens bits per byte comes first."""
    log.write(step, {f"eval/{name}": value for name, value in figures.items()})
    first = "bits_per_byte" if is_of_bytes(run) else "loss"
    names = sorted(figures, key=lambda name: name != first)
    text = "  ".join(f"{name.replace('_', ' ')} {figures[name]:.5g}" for name in names)
    say(f"evaluation at step {step}: {text}  ({clock(seconds)})")
