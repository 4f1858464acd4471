"""The training loop: `train_and_evaluate(config, workdir)`."""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax

from tlinformer_jax.config.data import Stage
from tlinformer_jax.config.run import (
    CONFIG_FILE,
    RunConfig,
    fingerprint,
    run_config,
)
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.batches import TrainingBatches
from tlinformer_jax.data.tasks import Split
from tlinformer_jax.data.tokenizers import build_tokenizer
from tlinformer_jax.files import local_path
from tlinformer_jax.models.windows import trained_tokens
from tlinformer_jax.parallel.sharding import batch_sharding, process_rows, put_batch
from tlinformer_jax.training.checkpoint import Checkpoints
from tlinformer_jax.training.curriculum import LAG, WINDOW, Competence, StagedReader, batches_from
from tlinformer_jax.training.divergence import has_diverged, roll_back
from tlinformer_jax.training.evaluation import summary
from tlinformer_jax.training.lock import sole_run
from tlinformer_jax.training.memory import memory_advice
from tlinformer_jax.training.metrics import MetricsLog, Throughput, clock, parameter_overview, say
from tlinformer_jax.training.optimizer import run_horizon
from tlinformer_jax.training.origin import Origin, check_origin, find_origin, initial_params, remember_origin
from tlinformer_jax.training.profile import StepTrace
from tlinformer_jax.training.setup import PENDING, Run, build_run, build_throughput, flops_per_token, training_batches
from tlinformer_jax.training.signals import Stopped, StopRequest
from tlinformer_jax.training.step import TrainState, jit_train_step
from tlinformer_jax.training.timer import CheckpointTimer
from tlinformer_jax.training.workdir import check_tokenizer, check_workdir, describe, save_description


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What the loop evaluates on, writes to and listens to."""

    validation: Split
    checkpoints: Checkpoints
    log: MetricsLog
    trace: StepTrace
    stop: StopRequest
    timer: CheckpointTimer

    def save(self, state: TrainState) -> None:
        """Starts saving the state; the figures up to it reach the disk first."""
        self.log.sync()
        self.checkpoints.save(state)
        self.timer.restart()


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training has come to.

    Attributes:
      run: its fixed parts.
      params: after the last step that was made.
      figures: of the last evaluation, as `evaluation.summary` names them; None if it was stopped before.
      step: the last that was made; below the run's length where train.stop_at_accuracy has ended it.
    """

    run: Run
    params: Any
    figures: dict[str, float] | None
    step: int


def train_and_evaluate(
    config: RunConfig | Mapping[str, Any],
    workdir: str | pathlib.Path,
    profile: str | pathlib.Path | None = None,
    init_from: str | pathlib.Path | None = None,
) -> dict[str, float]:
    """Trains, evaluates and saves, as `train_run` does and with its arguments.

    Returns:
      the figures of the last evaluation, as `evaluation.summary` names them; empty if it was stopped before.
    """
    return train_run(config, workdir, profile, init_from).figures or {}


def train_run(
    config: RunConfig | Mapping[str, Any],
    workdir: str | pathlib.Path,
    profile: str | pathlib.Path | None = None,
    init_from: str | pathlib.Path | None = None,
) -> Trained:
    """Trains, evaluates and saves; continues from the last good checkpoint if the directory holds one.

    SIGTERM, or SIGINT once, makes it save after the running step and return; see `signals.StopRequest`.

    Args:
      config: a RunConfig, or the nested mapping of a config file.
      workdir: receives config.json, the tokenizer, texts.json, metrics.jsonl, TensorBoard events and checkpoints.
      profile: a directory for a trace of a few training steps, or None.
      init_from: another run's working directory, whose parameters a new run starts from; None for random ones.

    Returns:
      the run with its parameters and figures.

    Raises:
      ConfigError, DataError: for what a user can mend, before anything is trained; DataError also where a checkpoint
        cannot be written.
      DivergedError: when loss or gradient are no longer finite; the last checkpoint stays.
      OutOfMemoryError: where a device's memory does not suffice, with what would take less.
    """
    config = config if isinstance(config, RunConfig) else run_config(config)
    workdir = local_path(workdir, "workdir")
    begun = (workdir / CONFIG_FILE).exists()
    origin = find_origin(workdir, init_from, begun)
    if origin is not None and not begun:
        check_origin(origin, config)
    tokenizer = build_tokenizer(config.data.tokenizer)
    check_tokenizer(tokenizer, config.data.tokenizer, workdir)  # before texts are tokenised by it
    run = build_run(config, tokenizer, PENDING)
    splits = {name: run.split(name) for name in ("train", "validation")}
    train, validation = splits["train"], splits["validation"]
    batches = training_batches(config, train)
    run = dataclasses.replace(run, horizon=run_horizon(config.train, batches))
    check_workdir(run, splits, workdir)
    with (
        memory_advice(config),
        sole_run(workdir),
        StopRequest() as stop,
        open_checkpoints(config, workdir) as checkpoints,
        jax.set_mesh(run.mesh),
    ):
        state, evaluated = first_state(run, workdir, checkpoints, origin)
        # Whether the run has ended there is what an evaluation says.
        evaluated = evaluated and not config.train.stop_at_accuracy
        first, last = int(state.step), run.horizon.steps
        main = jax.process_index() == 0
        if main:
            save_description(run, splits, workdir)
        describe(run, train, validation, batches)
        trace = StepTrace(local_path(profile, "profile") if profile else None, first, last)
        # The last step's evaluation is always repeated, for its figures.
        with MetricsLog(workdir, main, first, keep_evaluation=evaluated and first < last) as log:
            timer = CheckpointTimer(config.train.checkpoint_minutes)
            around = Surroundings(validation, checkpoints, log, trace, stop, timer)
            state, figures = train_steps(run, state, batches, around, evaluated)
            around.save(state)
            if figures is not None:
                checkpoints.record_validation(int(state.step), figures["loss"])
            elif not stop:
                figures = evaluate_and_record(run, state, around)
        if figures is None:
            say(f"stopped after step {int(state.step)}, as asked; the same command goes on from there")
        return Trained(run, state.params, figures, int(state.step))


def open_checkpoints(config: RunConfig, workdir: pathlib.Path) -> Checkpoints:
    """The checkpoints of the run."""
    train = config.train
    regular = train.checkpoint_every if train.max_rollbacks else 0
    return Checkpoints(workdir, train.keep_checkpoints, train.keep_best, fingerprint(config), regular)


def first_state(
    run: Run, workdir: pathlib.Path, checkpoints: Checkpoints, origin: Origin | None = None
) -> tuple[TrainState, bool]:
    """The state to go on from, that of the newest good checkpoint or a new one; and whether it has been evaluated."""
    restored = checkpoints.restore(run.abstract_state)
    if restored is None:
        state = run.initial_state()
        if origin is not None:
            step, params = initial_params(origin, run)
            say(f"starting from the parameters of step {step} in {origin.workdir}")
            state = dataclasses.replace(state, params=params)
            if jax.process_index() == 0:
                remember_origin(dataclasses.replace(origin, step=step), workdir)
            checkpoints.save(state, overlap=False)
        say(parameter_overview(state.params))
        return state, False
    state, manifest = restored
    say(f"continuing from step {int(state.step)} in {workdir}")
    return state, manifest.validation_loss is not None


def train_steps(
    run: Run, state: TrainState, batches: TrainingBatches, around: Surroundings, evaluated: bool
) -> tuple[TrainState, dict[str, float] | None]:
    """Runs the steps that are left, or those until a stop is asked for; rolls back where that is configured.

    Args:
      run: what is trained.
      state: to begin with.
      batches: to train on.
      around: see there.
      evaluated: whether `state` has been: an evaluation that a kill or a stop has cut off is made up for.

    Returns:
      the state; the figures of its evaluation where that has ended the run, see TrainConfig.stop_at_accuracy, else
      None.

    Raises:
      DivergedError: when loss or gradient are no longer finite, and no rollback is left.
    """
    step_function = jit_train_step(
        run.model,
        run.config.train,
        run.horizon,
        run.shardings,
        batch_sharding(run.mesh),
        answers=run.answers,
        stages=run.config.data.stages,
    )
    throughput = build_throughput(run)
    while True:
        known = batches_from(batches, state.competence)
        if int(state.step) in evaluation_steps(run.config.train, known, run.horizon.steps) and not evaluated:
            figures = evaluate_and_record(run, state, around)
            if accurate(run.config.train, figures):
                return state, figures
        state, figures = steps_while_finite(run, step_function, state, batches, around, throughput)
        if not has_diverged(run, state.skips):
            return state, figures
        known = batches_from(batches, state.competence)
        state, evaluated = roll_back(run, state, known, around.checkpoints), False


def steps_while_finite(
    run: Run,
    step_function: Any,
    state: TrainState,
    batches: TrainingBatches,
    around: Surroundings,
    throughput: Throughput,
) -> tuple[TrainState, dict[str, float] | None]:
    """Runs the steps that are left, until a stop is asked for, the run has diverged or is accurate enough.

    Evaluates and saves at the configured rhythm, but not after the last step. Returns what `train_steps` does.
    """
    config, last = run.config.train, run.horizon.steps
    first = int(state.step)
    tokens = config.batch_size * trained_tokens(run.config.model, batches.sequence_length, config.sampled_windows)
    throughput.restart()
    with StagedReader(batches, state.competence, first, process_rows(run.mesh, config.batch_size)) as reader:
        batches = reader.batches
        evaluations = evaluation_steps(config, batches, last)
        for step in range(first + 1, last + 1):
            if around.stop.poll():
                break
            with throughput.waiting():
                batch = put_batch(next(reader), run.mesh)
            state, metrics = step_function(state, batch)
            throughput.count(tokens)
            if reader.after(metrics):
                batches = reader.batches
                evaluations = evaluation_steps(config, batches, last)
            ended = reader.ended()
            pause = step in evaluations or due(step, config.checkpoint_every, last) or ended is not None
            new = step == first + 1 or batches.length(step - 1) != batches.length(step - 2)
            if new:
                jax.block_until_ready(metrics)  # the first step's time, at a new length, is mostly compilation
                say(f"compiled and ran step {step}")
            # Which steps are logged must not depend on where a run was taken up again.
            if step == 1 or step % config.log_every == 0 or step == last or pause:
                jax.block_until_ready(metrics)
                if int(metrics["step"]) == step:  # or it has diverged before
                    log_step(run, step, metrics, {} if new else throughput.report(step), around.log)
                if has_diverged(run, metrics["skips"]):
                    break
                if ended is not None:
                    say(describe_end(ended, step, state.competence))
            if around.trace.after(step, metrics) or new:
                throughput.restart()
            if new:
                throughput.flops_per_token = flops_per_token(run, batches.length(step - 1))
            late = around.timer.due(metrics) and step != last
            if late and has_diverged(run, metrics["skips"]):
                break
            if late or due(step, config.checkpoint_every, last):
                with throughput.saving():
                    around.save(state)
            if step in evaluations:
                figures = evaluate_and_record(run, state, around)
                if accurate(config, figures):
                    return state, figures
                throughput.restart(keep_saving=True)
    return state, None


def describe_end(stage: Stage, step: int, competence: Competence | None) -> str:
    """Which stage of the curriculum ended after update `step`, and why."""
    text = f"step {step}: the stage on samples of {stage.length} tokens ends after {stage.updates:,} updates"
    if not stage.accuracy or competence is None:
        return f"{text}, as configured"
    if step in competence.ends.tolist():
        return f"{text}: training accuracy has reached {stage.accuracy:g} over {WINDOW} updates, {LAG} updates ago"
    return f"{text}, the most that it may take"


def accurate(config: TrainConfig, figures: Mapping[str, float] | None) -> bool:
    """Whether these figures end the run, see TrainConfig.stop_at_accuracy."""
    least = config.stop_at_accuracy
    return bool(least) and figures is not None and figures["accuracy"] >= least


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens at `step`, the last one excepted."""
    return every > 0 and step % every == 0 and step != last


def evaluation_steps(config: TrainConfig, batches: TrainingBatches, last: int) -> frozenset[int]:
    """The steps, before the last one, after which the run is evaluated; see TrainConfig.eval_every and its kin."""
    by_step = range(config.eval_every, last, config.eval_every) if config.eval_every else ()
    epochs = itertools.count(config.eval_every_epochs, config.eval_every_epochs) if config.eval_every_epochs else ()
    by_epoch = itertools.takewhile(lambda step: step < last, map(batches.updates_for_epochs, epochs))
    return frozenset((*by_step, *by_epoch))


def log_step(run: Run, step: int, metrics: Mapping[str, Any], speed: Mapping[str, float], log: MetricsLog) -> None:
    """Writes and prints the figures of one step; `speed` is what `Throughput.report` returns, or empty."""
    names = ("loss", "grad_norm", "learning_rate", *(["accuracy"] if "accuracy" in metrics else []))
    values = {f"train/{name}": float(metrics[name]) for name in names}
    line = f"step {step}/{run.horizon.steps}  loss {values['train/loss']:.4f}"
    line += f"  grad norm {values['train/grad_norm']:.3f}"
    if "accuracy" in metrics:
        line += f"  accuracy {values['train/accuracy']:.3f}"
    skipped = int(metrics["skips"].total)
    if skipped:
        values["train/skipped_updates"] = skipped
        line += f"  {skipped} skipped"
    rollbacks = int(metrics["skips"].rollbacks)
    if rollbacks:
        values["train/rollbacks"] = rollbacks
        line += f"  {rollbacks} rolled back"
    if speed:
        values |= {f"train/{name}": value for name, value in speed.items() if name != "eta"}
        used = f"  MFU {speed['mfu']:.1%}" if "mfu" in speed else f"  {speed['tflops']:.3g} TFLOP/s"
        line += f"  {speed['tokens_per_second']:,.0f} tokens/s{used}  {clock(speed['eta'])} left"
    log.write(step, values)
    say(line)


def evaluate_and_record(run: Run, state: TrainState, around: Surroundings) -> dict[str, float] | None:
    """Evaluates on the validation split; writes, prints and returns the figures, or None where a stop is asked for.

    A state that is saved, or among the best and therefore saved now, gets its loss into its checkpoint's manifest.
    """
    started = time.perf_counter()
    step = int(state.step)
    try:
        result = run.evaluate(state.params, around.validation, around.stop.watch)
    except Stopped:
        return None
    figures = summary(result, around.validation, run.config.model.generation_window)
    around.log.write(step, {f"eval/{name}": value for name, value in figures.items()})
    text = "  ".join(f"{name.replace('_', ' ')} {value:.5g}" for name, value in figures.items())
    say(f"evaluation at step {step}: {text}  ({clock(time.perf_counter() - started)})")
    if around.checkpoints.is_among_best(figures["loss"]):
        around.save(state)
    around.checkpoints.record_validation(step, figures["loss"])
    return figures
