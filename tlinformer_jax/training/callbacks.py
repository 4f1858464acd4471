"""Callbacks between updates, the user's and the built-in ones, and requests to stop.

    train_and_evaluate(config, workdir, callbacks=[Call(lambda view: print(view.metrics["loss"]), every=100)])

The built-in callbacks come first, so that a user's callback sees their results.
"""

import bisect
import concurrent.futures
import contextlib
import dataclasses
import functools
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.config.train import EPOCH, seconds
from tlinformer_jax.data.batches import StagedReader
from tlinformer_jax.data.tasks import Split
from tlinformer_jax.errors import UserError
from tlinformer_jax.training.console import describe_divergence, describe_stage, say
from tlinformer_jax.training.evaluation import summary
from tlinformer_jax.training.metrics import MetricsLog, Throughput, log_evaluation, log_step
from tlinformer_jax.training.saving import Checkpoints
from tlinformer_jax.training.setup import Run
from tlinformer_jax.training.step import TrainState

SIGNALS = {signal.SIGTERM, signal.SIGHUP, signal.SIGINT}
AGREE_EVERY = 20  # most updates between two questions of several processes whether a time has passed
T = TypeVar("T")
METRICS = ("loss", "grad_norm", "learning_rate", "tokens", "accuracy")
WARMUP, TRACED = 10, 3  # steps before the trace, not counting the first, and traced steps


class DivergedError(UserError):
    """An error for more than train.max_skipped_updates updates in a row that were not finite."""


# ---- The interface


@dataclasses.dataclass(frozen=True)
class TrainingView:
    """A callback's view of a training after update `step` of `last_step`.

    Attributes:
      state: parameters, optimiser and the rest. The next update reuses their memory: copy what you keep.
      outputs: the update's metrics as `train_step` returns them, on the devices.
      evaluation: figures of the latest evaluation, as `evaluation.summary` names them, and its `step`; empty before.
      compiled: whether this update was compiled first, so that its time is not a training time.
    """

    config: RunConfig
    workdir: pathlib.Path
    step: int
    last_step: int
    state: TrainState
    outputs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    evaluation: Mapping[str, float] = dataclasses.field(default_factory=dict)
    compiled: bool = False

    @property
    def params(self) -> Any:
        """The parameters that evaluations use; averaged if train.ema is not 0."""
        return self.state.evaluated

    @functools.cached_property
    def metrics(self) -> dict[str, float]:
        """The update's loss, grad_norm, learning_rate, tokens; waits for the devices."""
        return {name: float(self.outputs[name]) for name in METRICS if name in self.outputs}


class Callback:
    """An action after updates; subclasses define it in `__call__`.

    Attributes:
      every: a number of updates; or a time such as '10min', after which the next update counts (with several processes
        one of the next AGREE_EVERY updates); 0 for never.
    """

    every: int | str

    def __call__(self, view: TrainingView) -> bool | None:
        """Performs the action; the run ends after this update if the result is `True`."""
        raise NotImplementedError

    def is_due(self, step: int) -> bool:
        """Returns whether update `step` is a multiple of `every`; if that is a time, a `Timer` of the loop decides."""
        return isinstance(self.every, int) and self.every > 0 and step > 0 and step % self.every == 0

    def finish(self, view: TrainingView) -> None:
        """Performs a last action, once, when training has ended or was asked to stop."""


@dataclasses.dataclass(frozen=True)
class Call(Callback):
    """A callback that calls a function."""

    function: Callable[[TrainingView], bool | None]
    every: int | str = 1

    def __call__(self, view: TrainingView) -> bool | None:
        return self.function(view)


def asks_to_end(result: Any) -> bool:
    """Returns whether a callback's result is a true bool, of Python, NumPy or JAX."""
    return str(getattr(result, "dtype", type(result).__name__)) == "bool" and bool(result)


def as_callbacks(given: Sequence[Callback | Callable[[TrainingView], Any]]) -> list[Callback]:
    """Checks the given callbacks; a bare function becomes a callback after every update."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise UserError(f"callbacks = {given!r}: must be a list of Callbacks or functions")
    found: list[Callback] = []
    for number, callback in enumerate(given):
        if isinstance(callback, type) or not callable(callback):
            raise UserError(f"callbacks[{number}] = {callback!r}: must be a Callback or a function")
        found.append(callback if isinstance(callback, Callback) else Call(callback))
        every = getattr(found[-1], "every", None)
        if not (isinstance(every, int) and not isinstance(every, bool) and every >= 0) and not seconds(every):
            allowed = "must be an integer >= 0, or a time such as '30s', '10min' or '1.5h'"
            raise UserError(f"callbacks[{number}].every = {every!r}: {allowed}")
    return found


class Timer:
    """A timer that tells when `seconds` have passed since it was made or restarted (0: never)."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._began = seconds, time.monotonic()

    def restart(self) -> None:
        """Starts the time again."""
        self._began = time.monotonic()

    def due(self, step: int, log_every: int) -> bool:
        """Returns whether the time has passed; to be asked after every update.

        Several processes ask process 0, which waits for the devices, so they do it only every `log_every` updates, and
        at least every AGREE_EVERY.
        """
        several = jax.process_count() > 1
        if not self._seconds or (several and step % min(log_every, AGREE_EVERY)):
            return False
        late = time.monotonic() - self._began >= self._seconds
        return bool(multihost_utils.broadcast_one_to_all(np.bool_(late))) if several else late


# ---- Requests to stop, by a user or a scheduler


class Stopped(Exception):
    """The exception by which an evaluation is given up when a stop was asked for."""


class StopRequest:
    """A context manager that notices SIGTERM, SIGHUP and SIGINT; a second SIGINT after its message ends the process.

    Python handles no signal while its main thread runs C code, such as the compilation of an evaluation.
    An ignored SIGHUP, as under nohup, stays ignored. If `jax.distributed` is initialised, JAX handles SIGTERM, and the
    other signals are passed on as SIGTERM: all processes stop at the same call of `poll`, and must make the same calls.
    """

    def __init__(self) -> None:
        self._noticed, self._together, self._polls = False, jax.distributed.is_initialized(), 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            others = ({signal.SIGTERM} if self._together else set()) | ({signal.SIGHUP} if ignored else set())
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS - others}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def __bool__(self) -> bool:
        """Returns whether a stop was asked for, and all processes have agreed on it."""
        return self._noticed

    def poll(self) -> bool:
        """Asks the other processes; returns whether a stop was asked for, and all have agreed on it."""
        if self._together and not self._noticed:
            self._polls += 1
            self._noticed = multihost_utils.reached_preemption_sync_point(self._polls)
        return self._noticed

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items; raises Stopped when a stop is asked for."""
        for item in items:
            if self.poll():
                raise Stopped
            yield item

    def _handle(self, number: int, _: object) -> None:
        again = ""
        if number == signal.SIGINT:
            again = "; a second one stops at once"
            signal.signal(number, signal.SIG_DFL)  # which also ends a process that is busy outside of Python
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX handles it, and tells the other processes
        else:
            self._noticed = True
        message = f"{signal.Signals(number).name}: saving after the running step{again}\n"
        with contextlib.suppress(OSError):  # stderr is closed
            os.write(2, message.encode())  # past Python's buffer, which the interrupted code may be filling


# ---- The built-in callbacks


@dataclasses.dataclass(frozen=True)
class Session:
    """The objects that the loop and the built-in callbacks share."""

    run: Run
    compiler: concurrent.futures.Executor
    validation: Split
    reader: StagedReader
    checkpoints: Checkpoints
    log: MetricsLog
    throughput: Throughput
    stop: StopRequest

    def check_finite(self, view: TrainingView) -> None:
        """Ends a run with more than train.max_skipped_updates skipped updates in a row."""
        if int(view.state.skips.in_a_row) > self.run.config.train.skippable:
            done = int(view.state.skips.rollbacks)
            again = f", after {done} rollbacks" if done else ""
            raise DivergedError(f"{describe_divergence(self.run, view.state, self.reader.batches)}{again}")


@dataclasses.dataclass
class Log(Callback):
    """A callback that logs an update, also if another of `others` is due or a curriculum stage ends."""

    every: int
    session: Session
    others: tuple[Callback, ...]

    def is_due(self, step: int) -> bool:
        ends = step in (1, self.session.run.last_step) or self.session.reader.ended() is not None
        return ends or super().is_due(step) or any(other.is_due(step) for other in self.others)

    def __call__(self, view: TrainingView) -> None:
        jax.block_until_ready(view.outputs)
        session = self.session
        if int(view.outputs["step"]) == view.step:  # false if training had diverged before
            speed = {} if view.compiled else session.throughput.report(view.step)
            log_step(session.log, view.step, view.last_step, view.outputs, speed)
        session.check_finite(view)
        if (stage := session.reader.ended()) is not None:
            say(describe_stage(stage, view.step, view.state.competence))


@dataclasses.dataclass
class Save(Callback):
    """A callback that saves a checkpoint, also at the end."""

    every: int | str
    session: Session

    def __call__(self, view: TrainingView) -> None:
        if view.step != view.last_step:  # `finish` saves the last step
            with self.session.throughput.spent_on("save"):
                self.finish(view)

    def finish(self, view: TrainingView) -> None:
        self.session.check_finite(view)
        self.session.log.sync()
        self.session.checkpoints.save(view.state)


@dataclasses.dataclass
class Evaluate(Callback):
    """A callback that evaluates the validation split, after each epoch if `every` is 'epoch', and always at the end.

    The loss is recorded in the checkpoint's manifest, and a state among the best is saved. Ends a run that is accurate
    enough. `figures` are those of the latest evaluation, with its `step`.
    """

    every: int | str
    session: Session
    save: Save
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    def is_due(self, step: int) -> bool:
        if step == self.session.run.last_step:
            return False
        if self.every != EPOCH:
            return super().is_due(step)
        ended = self.session.reader.batches.updates_for_epochs
        return ended(1 + bisect.bisect_left(range(1, 2**40), step, key=ended)) == step

    def __call__(self, view: TrainingView) -> bool:
        session, run, started = self.session, self.session.run, time.perf_counter()
        try:
            result = run.evaluate(view.params, session.validation, session.stop.watch)
        except Stopped:
            return False
        figures = summary(result, session.validation, run.config.model.generation_window)
        log_evaluation(session.log, run, view.step, figures, time.perf_counter() - started)
        self.figures = {"step": view.step, **figures}
        if session.checkpoints.is_among_best(figures["loss"]):
            self.save.finish(view)
        session.checkpoints.record_validation(view.step, figures["loss"])
        session.throughput.restart(keep_saving=True)
        goal = run.config.train.goal
        if not goal or figures["accuracy"] < goal:
            return False
        accuracy = f"accuracy {figures['accuracy']:.4f} has reached {goal:g}"
        say(f"step {view.step}: the run ends, because its {accuracy} (train.steps = {run.config.train.steps!r})")
        return True

    def finish(self, view: TrainingView) -> None:
        if self.figures.get("step") == view.step:
            self.session.checkpoints.record_validation(view.step, self.figures["loss"])
        elif not self.session.stop:
            self(view)


class Trace(Callback):
    """A callback that traces TRACED updates for xprof, from WARMUP updates after `first`, or earlier in a short run.

    As a context manager it also stops a trace that an exception has interrupted: JAX would refuse the next one.
    """

    every = 0

    def __init__(self, folder: pathlib.Path, first: int, last: int, throughput: Throughput) -> None:
        self._folder, self._throughput = folder, throughput
        self._begin = first + 1 + max(0, min(WARMUP, last - first - 1 - TRACED))
        self._end = min(last, self._begin + TRACED)
        self._tracing = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tracing:
            jax.profiler.stop_trace()

    def is_due(self, step: int) -> bool:
        return self._begin < self._end and step in (self._begin, self._end)

    def __call__(self, view: TrainingView) -> None:
        jax.block_until_ready(view.outputs)
        if view.step == self._begin:
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        else:
            self.finish(view)
        self._throughput.restart()

    def finish(self, view: TrainingView) -> None:
        if self._tracing:  # also if the run ends in the middle of the trace, which would be lost
            jax.profiler.stop_trace()
            self._tracing = False
            steps = f"steps {self._begin + 1} to {view.step}" if view.step > self._begin else "no steps"
            say(f"traced {steps} into {self._folder}")


def builtin_callbacks(
    session: Session, first: int, last: int, trace: pathlib.Path | None, stack: contextlib.ExitStack
) -> tuple[list[Callback], Evaluate]:
    """Returns the callbacks of every run from update `first` to `last`, in the order of their calls; and `Evaluate`.

    An update is logged, and so known to be finite, before its state is saved. `stack` ends with the training.
    """
    train = session.run.config.train
    save = Save(train.checkpoint_every, session)
    evaluate = Evaluate(train.eval_every, session, save)
    logging = Log(train.log_every, session, (save, evaluate))
    tracing = [stack.enter_context(Trace(trace, first, last, session.throughput))] if trace else []
    return [logging, *tracing, save, evaluate], evaluate
