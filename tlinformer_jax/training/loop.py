"""The training loop: `train_and_evaluate(config, workdir)`."""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tlinformer_jax.config.run import RunConfig, fingerprint, run_config
from tlinformer_jax.config.train import seconds
from tlinformer_jax.data.batches import StagedReader, TrainingBatches
from tlinformer_jax.data.given import TokenData
from tlinformer_jax.data.sources import load_split
from tlinformer_jax.data.tasks import Split
from tlinformer_jax.data.tokenizers import build_tokenizer
from tlinformer_jax.files import local_path
from tlinformer_jax.models.windows import trained_tokens
from tlinformer_jax.parallel.mesh import platform
from tlinformer_jax.parallel.sharding import process_rows, put_batch
from tlinformer_jax.training import console
from tlinformer_jax.training import workdir as directory
from tlinformer_jax.training.callbacks import (
    Callback,
    DivergedError,
    Evaluate,
    Session,
    StopRequest,
    Timer,
    TrainingView,
    as_callbacks,
    asks_to_end,
    builtin_callbacks,
)
from tlinformer_jax.training.device_memory import memory_advice
from tlinformer_jax.training.metrics import MetricsLog, Throughput
from tlinformer_jax.training.optimizer import run_horizon
from tlinformer_jax.training.saving import Checkpoints
from tlinformer_jax.training.setup import (
    LoadSplit,
    Run,
    TrainedRun,
    build_run,
    check_trainable,
    flops_per_token,
    given_data,
    training_batches,
    use_compilation_cache,
)
from tlinformer_jax.training.step import TrainState

GivenCallbacks = Sequence[Callback | Callable[[TrainingView], Any]]


def train_and_evaluate(
    config: RunConfig | Mapping[str, Any],
    workdir: str | pathlib.Path,
    profile: str | pathlib.Path | None = None,
    init_from: str | pathlib.Path | None = None,
    *,
    train_data: TokenData | None = None,
    validation_data: TokenData | None = None,
    callbacks: GivenCallbacks = (),
) -> dict[str, float]:
    """Trains, evaluates and saves; continues from the last intact checkpoint if the directory has one.

    On SIGTERM, or a first SIGINT, saves after the current step and returns.

    Args:
      config: a RunConfig, or the nested mapping of a config file.
      workdir: receives configuration, tokenizer, metrics and checkpoints.
      profile: directory for a trace of a few training steps, or None.
      init_from: another run's working directory, from whose parameters a new run starts.
      train_data: token ids to train on, for data.dataset = "tokens": an array, a file (its path, or a TokenFile) or
        an iterable of documents or batches.
      validation_data: token ids to evaluate on; give both or neither.
      callbacks: called after updates: Callbacks, or functions of a TrainingView.

    Returns:
      The figures of the last evaluation, such as loss, perplexity, bits_per_byte; empty if training was stopped before.

    Raises:
      ConfigError, DataError: for mistakes that the user can correct.
      DivergedError: if loss or gradient are no longer finite and no rollback is left.
      OutOfMemoryError: if a device has too little memory; the message says how to use less.
    """
    given = {"train": train_data, "validation": validation_data}
    return train_run(config, workdir, profile, init_from, given, callbacks).figures or {}


def train_run(
    config: RunConfig | Mapping[str, Any],
    workdir: str | pathlib.Path,
    profile: str | pathlib.Path | None = None,
    init_from: str | pathlib.Path | None = None,
    given: Mapping[str, TokenData | None] = types.MappingProxyType({}),
    callbacks: GivenCallbacks = (),
) -> TrainedRun:
    """Does the work of `train_and_evaluate`; returns the run and its parameters too."""
    # ---- Check everything before writing anything
    config = config if isinstance(config, RunConfig) else run_config(config)
    workdir = local_path(workdir, "workdir")
    asked = as_callbacks(callbacks)
    trace = local_path(profile, "profile") if profile else None
    use_compilation_cache()
    origin = directory.find_origin(config, workdir, init_from)
    config, load = given_data(config, workdir, given)
    run, splits, batches = prepare(config, workdir, load)
    train, main = config.train, jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(memory_advice())
        stack.enter_context(directory.sole_run(workdir))
        stop = stack.enter_context(StopRequest())
        regular = int(train.checkpoint_every) if train.rollbacks else 0
        checkpoints = stack.enter_context(Checkpoints(workdir, *train.kept, fingerprint(config), regular))
        stack.enter_context(jax.set_mesh(run.mesh))

        # ---- Restore or start the state
        last = run.last_step
        compiler = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="compilation")
        stack.callback(compiler.shutdown, wait=False)  # XLA cannot be interrupted, and an error need not wait for it
        state, first, evaluated = starting_state(run, workdir, checkpoints, origin, compiler)
        if main:
            directory.save_description(run, splits, workdir)
        goal = console.describe(run, splits)
        # Evaluate again where the result could end the run, and after the last step, for its figures.
        evaluated = evaluated and not train.goal and first < last

        # ---- Train
        log = stack.enter_context(MetricsLog(workdir, main, first, keep_evaluation=evaluated))
        rows = process_rows(run.mesh, train.batch_size)
        ends = None if state.competence is None else state.competence.ends
        reader = stack.enter_context(StagedReader(batches, ends, first, rows))
        session = Session(run, compiler, splits["validation"], reader, checkpoints, log, Throughput.of(run), stop)
        builtin, evaluate = builtin_callbacks(session, first, last, trace, stack)
        every = [*builtin, *asked]
        view = TrainingView(config, workdir, first, last, state)
        if evaluated or not evaluate.is_due(first) or not evaluate(view):
            view = train_steps(session, view, every, evaluate)
        for callback in every:
            callback.finish(dataclasses.replace(view, evaluation=evaluate.figures))
    figures = {name: value for name, value in evaluate.figures.items() if name != "step"}
    finished = evaluate.figures.get("step") == view.step and (view.step == last or not stop)
    if finished:
        console.describe_end_of_run(run, workdir, figures, goal)
    else:
        console.say(f"stopped after step {view.step}, as requested; the same command continues from there")
    return TrainedRun(run, view.params, view.step, figures if finished else None)


def starting_state(
    run: Run,
    workdir: pathlib.Path,
    checkpoints: Checkpoints,
    origin: directory.Origin | None,
    compiler: concurrent.futures.Executor,
) -> tuple[TrainState, int, bool]:
    """Returns the newest intact checkpoint's state or a new run's, its step, and whether it has been evaluated."""
    restored = checkpoints.restore(run.abstract_state)
    first = 0 if restored is None else restored[1].step
    if first < run.last_step:
        compile_early(run, compiler)
    if restored is None:
        return first_state(run, workdir, checkpoints, origin), first, False
    console.say(f"continuing from step {first} in {workdir}")
    return restored[0], first, restored[1].validation_loss is not None


def compile_early(run: Run, compiler: concurrent.futures.Executor) -> None:
    """Starts to compile the training step beside the program that makes the first state, if that saves time.

    An accelerator's XLA times kernels, which other work on the device would disturb. The first length of a curriculum
    depends on the state.
    """
    if platform() == "cpu" and not run.config.data.curriculum:
        compiler.submit(run.compiled_train_step)


def prepare(
    config: RunConfig, workdir: pathlib.Path, load: LoadSplit = load_split
) -> tuple[Run, dict[str, Split], TrainingBatches]:
    """Builds the run, its splits and its batches, and checks them against the working directory."""
    tokenizer = build_tokenizer(config.data.tokenizer)
    directory.check_tokenizer(tokenizer, config.data.tokenizer, workdir)  # before it tokenises any text
    run = dataclasses.replace(build_run(config, tokenizer), load_split=load)
    check_trainable(run)
    splits = {name: run.split(name) for name in ("train", "validation")}
    batches = training_batches(config, splits["train"])
    run = dataclasses.replace(run, horizon=run_horizon(config.train, batches))
    directory.check_workdir(run, splits, workdir)
    return run, splits, batches


def first_state(
    run: Run, workdir: pathlib.Path, checkpoints: Checkpoints, origin: directory.Origin | None = None
) -> TrainState:
    """Returns a new run's state, with random or another run's parameters; saved if it may be needed again."""
    state = run.initial_state()
    if origin is not None:
        step, params = directory.initial_params(origin, run, state.params)
        console.say(f"starting from the parameters of step {step} in {origin.workdir}")
        state = state.starting_from(params)
        if jax.process_index() == 0:
            directory.remember_origin(dataclasses.replace(origin, step=step), workdir)
    if origin is not None or run.config.train.rollbacks:
        checkpoints.save(state)
    console.say(console.parameter_table(state.params))
    return state


def train_steps(
    session: Session, view: TrainingView, callbacks: Sequence[Callback], evaluate: Evaluate
) -> TrainingView:
    """Makes the updates after `view`, and calls the due callbacks after each; returns the last view."""
    run, reader, throughput, config = session.run, session.reader, session.throughput, view.config
    predicted = trained_tokens(config.model, reader.batches.sequence_length, config.train.sampled_windows)
    first, state = view.step, view.state
    throughput.restart()
    timers = [Timer(seconds(callback.every)) for callback in callbacks]
    for step in range(first + 1, view.last_step + 1):
        if session.stop.poll():
            break

        # ---- The update
        length = reader.batches.length(step - 1)
        compiled = step == first + 1 or length != reader.batches.length(step - 2)
        with throughput.spent_on("input"):
            batch = put_batch(next(reader), run.mesh)
        with console.compilation(step, length) if compiled else contextlib.nullcontext():
            if compiled:  # in a thread, since Python answers no signal while its main thread compiles
                session.compiler.submit(run.compiled_train_step, length).result()
            state, outputs = run.train_step(state, batch)
            if compiled:
                jax.block_until_ready(outputs)
        throughput.count(config.train.batch_size * predicted)
        reader.after(outputs)

        # ---- The callbacks after it
        view = dataclasses.replace(view, step=step, state=state, outputs=outputs, compiled=compiled)
        ended, timed = False, [timer.due(step, config.train.log_every) for timer in timers]
        for callback, timer, now in zip(callbacks, timers, timed):
            if not now and not callback.is_due(step):
                continue
            try:
                ended |= asks_to_end(callback(dataclasses.replace(view, evaluation=evaluate.figures)))
            except DivergedError as error:
                state = roll_back(session, view, error)
                view = dataclasses.replace(view, state=state)
            if now:
                timer.restart()
        if compiled:  # compilation time does not count as training
            throughput.restart()
            throughput.flops_per_token = flops_per_token(run, length)
        if ended:
            break
    return view


def roll_back(session: Session, view: TrainingView, error: DivergedError) -> TrainState:
    """Returns the state to continue from after a divergence: that of the last regular checkpoint, at the current step.

    Since the step stays, the bad batches are not repeated; the updates since the checkpoint count as skipped.

    Raises:
      DivergedError: if train.rollbacks allows no more rollbacks, or no regular checkpoint is left.
    """
    run, state, train = session.run, view.state, view.config.train
    done = int(state.skips.rollbacks)
    if done >= train.rollbacks:
        raise DivergedError(f"{error}; lower train.learning_rate") from None
    for leaf in jax.tree.leaves((state.params, state.opt_state, state.ema)):
        leaf.delete()  # a device may not have memory for two states
    restored = session.checkpoints.restore(run.abstract_state, regular=True)
    if restored is None:
        left = f"no checkpoint at a multiple of train.checkpoint_every = {train.checkpoint_every} is left"
        raise DivergedError(f"{error}; {left}") from None
    older = restored[0]
    console.say(f"{error}; continuing from the parameters of step {int(older.step)}, with batches after {view.step}")
    skipped = view.step - int(older.step) + int(older.skips.total)
    # Keep the arrays' sharding, or the next step would be compiled again.
    in_a_row, total, rollbacks, step = (
        jax.device_put(jnp.int32(value), state.step.sharding) for value in (0, skipped, done + 1, view.step)
    )
    skips = dataclasses.replace(state.skips, in_a_row=in_a_row, total=total, rollbacks=rollbacks)
    # A curriculum does not go back: keep the stage ends of the current state.
    return dataclasses.replace(older, step=step, skips=skips, competence=state.competence)
