"""The training loop: `train_and_evaluate(config, workdir)`."""

import dataclasses
import itertools
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tlinformer_jax.config.run import RunConfig, fingerprint, run_config
from tlinformer_jax.config.train import EPOCH, TrainConfig
from tlinformer_jax.data.batches import TrainingBatches
from tlinformer_jax.data.given import TokenData
from tlinformer_jax.data.sources import load_split
from tlinformer_jax.data.tasks import Split
from tlinformer_jax.data.tokenizers import build_tokenizer
from tlinformer_jax.errors import UserError
from tlinformer_jax.files import local_path
from tlinformer_jax.models.windows import trained_tokens
from tlinformer_jax.parallel.sharding import batch_sharding, process_rows, put_batch
from tlinformer_jax.training.curriculum import StagedReader, batches_from, describe_end
from tlinformer_jax.training.evaluation import summary
from tlinformer_jax.training.hooks import CheckpointTimer, StepTrace, Stopped, StopRequest
from tlinformer_jax.training.memory import memory_advice
from tlinformer_jax.training.metrics import MetricsLog, Throughput, clock, log_step, parameter_overview, say
from tlinformer_jax.training.optimizer import run_horizon
from tlinformer_jax.training.saving import Checkpoints
from tlinformer_jax.training.setup import (
    PENDING,
    LoadSplit,
    Run,
    build_run,
    build_throughput,
    describe,
    describe_divergence,
    flops_per_token,
    given_data,
    training_batches,
)
from tlinformer_jax.training.step import Skips, TrainState, jit_train_step
from tlinformer_jax.training.workdir import (
    Origin,
    check_tokenizer,
    check_workdir,
    find_origin,
    initial_params,
    remember_origin,
    save_description,
    sole_run,
)


class DivergedError(UserError):
    """Loss or gradient were not finite in more updates in a row than train.max_skipped_updates allows."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of a training: its fixed parts, and the parameters after its last step.

    The figures are the last evaluation's, as `evaluation.summary` names them; None if the run was stopped before.
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
    *,
    train_data: TokenData | None = None,
    validation_data: TokenData | None = None,
) -> dict[str, float]:
    """`train_run`, of which only the figures of the last evaluation are returned; empty if it was stopped before."""
    given = {"train_data": train_data, "validation_data": validation_data}
    return train_run(config, workdir, profile, init_from, **given).figures or {}


def train_run(
    config: RunConfig | Mapping[str, Any],
    workdir: str | pathlib.Path,
    profile: str | pathlib.Path | None = None,
    init_from: str | pathlib.Path | None = None,
    *,
    train_data: TokenData | None = None,
    validation_data: TokenData | None = None,
) -> Trained:
    """Trains, evaluates and saves; continues from the last good checkpoint if the directory holds one.

    SIGTERM, or SIGINT once, makes it save after the running step and return; see `hooks.StopRequest`.

    Args:
      config: a RunConfig, or the nested mapping of a config file.
      workdir: receives config.json, the tokenizer, texts.json, metrics.jsonl, TensorBoard events and checkpoints.
      profile: a directory for a trace of a few training steps, or None.
      init_from: another run's working directory, whose parameters a new run starts from; None for random ones.
      train_data: token ids to train on, for data.dataset = "tokens": an array, a file or an iterable, see `data.given`;
        None for those that the configuration names.
      validation_data: token ids to evaluate on; both are given, or none.

    Raises:
      ConfigError, DataError: for what a user can mend, before anything is trained; DataError also where a checkpoint
        cannot be written.
      DivergedError: when loss or gradient are no longer finite; the last checkpoint stays.
      OutOfMemoryError: where a device has too little memory, with what would take less.
    """
    # ---- Everything is checked before anything is written
    config = config if isinstance(config, RunConfig) else run_config(config)
    workdir = local_path(workdir, "workdir")
    origin = find_origin(config, workdir, init_from)
    config, load = given_data(config, workdir, train_data, validation_data)
    run, splits, batches = prepare(config, workdir, load)
    train = config.train
    regular = train.checkpoint_steps if train.max_rollbacks else 0
    with (
        memory_advice(config),
        sole_run(workdir),
        StopRequest() as stop,
        Checkpoints(workdir, train.keep_checkpoints, train.keep_best, fingerprint(config), regular) as checkpoints,
        jax.set_mesh(run.mesh),
    ):
        # ---- Where the run stands
        state, evaluated = first_state(run, workdir, checkpoints, origin)
        # An evaluation that can end the run is repeated, to know whether it has.
        evaluated = evaluated and not train.stop_at_accuracy
        first, last = int(state.step), run.horizon.steps
        main = jax.process_index() == 0
        if main:
            save_description(run, splits, workdir)
        describe(run, splits["train"], splits["validation"], batches)

        # ---- Train, save, evaluate
        trace = StepTrace(local_path(profile, "profile") if profile else None, first, last)
        # The last step's evaluation is always repeated, for its figures.
        with MetricsLog(workdir, main, first, keep_evaluation=evaluated and first < last) as log:
            timer = CheckpointTimer(train.checkpoint_seconds)
            trainer = Trainer(run, batches, splits["validation"], checkpoints, log, trace, stop, timer)
            state, figures = trainer.train(state, evaluated)
            trainer.save(state)
            if figures is not None:
                checkpoints.record_validation(int(state.step), figures["loss"])
            elif not stop:
                figures = trainer.evaluate(state)
        if figures is None:
            say(f"stopped after step {int(state.step)}, as asked; the same command goes on from there")
        return Trained(run, state.params, figures, int(state.step))


def prepare(
    config: RunConfig, workdir: pathlib.Path, load: LoadSplit = load_split
) -> tuple[Run, dict[str, Split], TrainingBatches]:
    """The run, its splits and its batches, checked against each other and against the working directory."""
    tokenizer = build_tokenizer(config.data.tokenizer)
    check_tokenizer(tokenizer, config.data.tokenizer, workdir)  # before texts are tokenised by it
    run = dataclasses.replace(build_run(config, tokenizer, PENDING), load_split=load)
    splits = {name: run.split(name) for name in ("train", "validation")}
    batches = training_batches(config, splits["train"])
    run = dataclasses.replace(run, horizon=run_horizon(config.train, batches))
    check_workdir(run, splits, workdir)
    return run, splits, batches


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


@dataclasses.dataclass
class Trainer:
    """The steps of a run, and what they read, write to and listen to."""

    run: Run
    batches: TrainingBatches
    validation: Split
    checkpoints: Checkpoints
    log: MetricsLog
    trace: StepTrace
    stop: StopRequest
    timer: CheckpointTimer

    def __post_init__(self) -> None:
        config = self.run.config
        self.throughput: Throughput = build_throughput(self.run)
        self.step_function: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]] = jit_train_step(
            self.run.model,
            config.train,
            self.run.horizon,
            self.run.shardings,
            batch_sharding(self.run.mesh),
            answers=self.run.answers,
            stages=config.data.stages,
        )

    def train(self, state: TrainState, evaluated: bool) -> tuple[TrainState, dict[str, float] | None]:
        """Makes the steps that are left, or those until a stop is asked for; rolls back where that is configured.

        Args:
          state: to begin with.
          evaluated: whether `state` has been; an evaluation that a kill or a stop has cut off is made up for.

        Returns:
          the state; its figures where train.stop_at_accuracy has ended the run, else None.

        Raises:
          DivergedError: when loss or gradient are no longer finite, and no rollback is left.
        """
        config, last = self.run.config.train, self.run.horizon.steps
        while True:
            known = batches_from(self.batches, state.competence)
            if int(state.step) in evaluation_steps(config, known, last) and not evaluated:
                figures = self.evaluate(state)
                if accurate(config, figures):
                    return state, figures
            state, figures = self.steps_while_finite(state)
            if not has_diverged(config, state.skips):
                return state, figures
            state, evaluated = self.roll_back(state), False

    def steps_while_finite(self, state: TrainState) -> tuple[TrainState, dict[str, float] | None]:
        """Makes the steps that are left, until a stop is asked for, the run has diverged or is accurate enough.

        Evaluates and saves as configured, but not after the last step. Returns what `train` does.
        """
        run, config, throughput = self.run, self.run.config.train, self.throughput
        first, last = int(state.step), run.horizon.steps
        length = self.batches.sequence_length
        tokens = config.batch_size * trained_tokens(run.config.model, length, config.sampled_windows)
        throughput.restart()
        with StagedReader(self.batches, state.competence, first, process_rows(run.mesh, config.batch_size)) as reader:
            evaluations = evaluation_steps(config, reader.batches, last)
            for step in range(first + 1, last + 1):
                if self.stop.poll():
                    break

                # ---- The update
                with throughput.waiting():
                    batch = put_batch(next(reader), run.mesh)
                state, metrics = self.step_function(state, batch)
                throughput.count(tokens)

                # ---- What is due after it
                if reader.after(metrics):
                    evaluations = evaluation_steps(config, reader.batches, last)
                stage_end = reader.ended()
                saves = due(step, config.checkpoint_steps, last)
                length = reader.batches.length(step - 1)
                compiled = step == first + 1 or length != reader.batches.length(step - 2)
                if compiled:
                    jax.block_until_ready(metrics)
                    say(f"compiled and ran step {step}")

                # ---- Log; which steps must not depend on where a run was taken up again
                pause = saves or step in evaluations or stage_end is not None
                if step == 1 or step % config.log_every == 0 or step == last or pause:
                    if self.log_and_check(step, metrics, compiled):
                        break
                    if stage_end is not None:
                        say(describe_end(stage_end, step, state.competence))

                # ---- Trace; a compilation and a trace do not count as training
                if self.trace.after(step, metrics) or compiled:
                    throughput.restart()
                if compiled:
                    throughput.flops_per_token = flops_per_token(run, length)

                # ---- Save
                late = self.timer.due(metrics) and step != last
                if late and has_diverged(config, metrics["skips"]):
                    break
                if late or saves:
                    with throughput.saving():
                        self.save(state)

                # ---- Evaluate
                if step in evaluations:
                    figures = self.evaluate(state)
                    if accurate(config, figures):
                        return state, figures
                    throughput.restart(keep_saving=True)
        return state, None

    def log_and_check(self, step: int, metrics: dict[str, Any], compiled: bool) -> bool:
        """Logs a step, without its speed where it was `compiled`; returns whether the run has diverged."""
        jax.block_until_ready(metrics)
        if int(metrics["step"]) == step:  # or it has diverged before
            speed = {} if compiled else self.throughput.report(step)
            log_step(self.log, step, self.run.horizon.steps, metrics, speed)
        return has_diverged(self.run.config.train, metrics["skips"])

    def save(self, state: TrainState) -> None:
        """Starts saving the state; the figures up to it reach the disk first."""
        self.log.sync()
        self.checkpoints.save(state)
        self.timer.restart()

    def evaluate(self, state: TrainState) -> dict[str, float] | None:
        """Evaluates on the validation split; logs and returns the figures, or None where a stop is asked for.

        The checkpoint's manifest gets the loss; a state that is among the best is saved for it.
        """
        started = time.perf_counter()
        step = int(state.step)
        try:
            result = self.run.evaluate(state.params, self.validation, self.stop.watch)
        except Stopped:
            return None
        figures = summary(result, self.validation, self.run.config.model.generation_window)
        self.log.write(step, {f"eval/{name}": value for name, value in figures.items()})
        text = "  ".join(f"{name.replace('_', ' ')} {value:.5g}" for name, value in figures.items())
        say(f"evaluation at step {step}: {text}  ({clock(time.perf_counter() - started)})")
        if self.checkpoints.is_among_best(figures["loss"]):
            self.save(state)
        self.checkpoints.record_validation(step, figures["loss"])
        return figures

    def roll_back(self, state: TrainState) -> TrainState:
        """The state to go on from after a divergence: parameters and optimiser of the last regular checkpoint.

        The step stays, so that batches remain a function of it: the bad ones lie behind, and the updates in between
        count as skipped. Without any checkpoint the run's first parameters are taken.

        Raises:
          DivergedError: after train.max_rollbacks of them, or where a checkpoint to go back to should be and is not.
        """
        run, config, step = self.run, self.run.config.train, int(state.step)
        text = describe_divergence(run, state, batches_from(self.batches, state.competence))
        done = int(state.skips.rollbacks)
        if done >= config.max_rollbacks:
            raise DivergedError(f"{text}{f' after {done} rollbacks' if done else ''}; lower train.learning_rate")
        for leaf in jax.tree.leaves((state.params, state.opt_state)):
            leaf.delete()  # a device may not hold two of them
        restored = self.checkpoints.restore(run.abstract_state, regular=True)
        every = config.checkpoint_steps
        if restored is None and step > every:
            missing = f"no checkpoint at a multiple of train.checkpoint_every = {every} is left to go back to"
            raise DivergedError(f"{text}; {missing}")
        older = run.initial_state() if restored is None else restored[0]
        say(f"{text}; rolled back to the parameters of step {int(older.step)}, going on past it")
        skipped = step - int(older.step) + int(older.skips.total)

        def number(value: int) -> jax.Array:
            # With the old layout, or the next step would be compiled anew.
            return jax.device_put(jnp.int32(value), state.step.sharding)

        skips = dataclasses.replace(state.skips, in_a_row=number(0), total=number(skipped), rollbacks=number(done + 1))
        # Which stages of a curriculum have ended stays decided: the batches so far were theirs.
        return dataclasses.replace(older, step=state.step, skips=skips, competence=state.competence)


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens at `step`, the last one excepted."""
    return every > 0 and step % every == 0 and step != last


def evaluation_steps(config: TrainConfig, batches: TrainingBatches, last: int) -> frozenset[int]:
    """The steps, before the last one, after which the run is evaluated; see TrainConfig.eval_every."""
    if isinstance(config.eval_every, int):
        return frozenset(range(config.eval_every, last, config.eval_every) if config.eval_every else ())
    assert config.eval_every == EPOCH
    ends = map(batches.updates_for_epochs, itertools.count(1))
    return frozenset(itertools.takewhile(lambda step: step < last, ends))


def accurate(config: TrainConfig, figures: Mapping[str, float] | None) -> bool:
    """Whether these figures end the run, see TrainConfig.stop_at_accuracy."""
    least = config.stop_at_accuracy
    return bool(least) and figures is not None and figures["accuracy"] >= least


def has_diverged(config: TrainConfig, skips: Skips) -> bool:
    """Whether so many updates in a row were skipped that nothing changes the state any more."""
    return int(skips.in_a_row) > config.max_skipped_updates
