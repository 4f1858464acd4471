"""Trains runs that differ only in seed and learning rate as one program, side by side on one device.

A small model leaves a GPU idle: its kernels take less time than their launch. `jax.vmap` makes each kernel compute all
copies, and the program is compiled once. Copies share only the program. A copy that reaches the accuracy in
`train.steps` keeps its parameters of that evaluation. No checkpoints are saved.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.data.batches import AHEAD, Batch, Reader, TrainingBatches
from tlinformer_jax.data.streams import in_threads
from tlinformer_jax.data.tasks import Split
from tlinformer_jax.data.tokenizers import build_tokenizer
from tlinformer_jax.experiments.actions import check_possible, checked_actions, run_action
from tlinformer_jax.experiments.driver import LOCK_FILE, record_of
from tlinformer_jax.experiments.job import RESULT_FILE, Job, Record, write_result
from tlinformer_jax.experiments.plan import check_together
from tlinformer_jax.parallel.sharding import UNSPLIT
from tlinformer_jax.training.console import say
from tlinformer_jax.training.device_memory import memory_advice
from tlinformer_jax.training.evaluation import Evaluation, eval_step, summary
from tlinformer_jax.training.optimizer import build_optimizer, run_horizon
from tlinformer_jax.training.setup import Run, TrainedRun, build_run, check_trainable, training_batches
from tlinformer_jax.training.step import batch_gradient, compiler_options, init_state
from tlinformer_jax.training.workdir import sole_run

Evaluated = tuple[int, dict[str, float]]  # an update, and the validation figures after it


@flax.struct.dataclass
class Copies:
    """The training state of all copies; the copies are the first axis of every array.

    Attributes:
      params, opt_state: as in `TrainState`.
      rates: peak learning rates.
      ended: params at the evaluation that ended a copy; before that, those of the last evaluation.
      ended_at: update of that evaluation; 0 while the copy continues.
    """

    params: Any
    opt_state: Any
    rates: Float[Array, " copies"]
    ended: Any
    ended_at: Int[Array, " copies"]


# ---- The program


def update_copies(
    copies: Copies, batches: dict[str, Array], step: Int[Array, ""], *, run: Run
) -> tuple[Copies, Float[Array, " copies"]]:
    """Updates every copy and returns the losses; a copy whose loss or gradient is not finite stays unchanged."""
    assert run.horizon is not None
    config = dataclasses.replace(run.config.train, learning_rate=1.0)  # the optimiser's updates are linear in it
    optimizer = build_optimizer(config, run.horizon)

    def update(params: Any, opt_state: Any, rate: Array, batch: dict[str, Array]) -> tuple[Any, Any, Array]:
        divisor = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
        loss, _, grads = batch_gradient(
            batch, params, divisor, step, model=run.model, config=config, split=UNSPLIT, answers=run.answers
        )
        updates, after = optimizer.update(grads, opt_state, params)
        changed = optax.apply_updates(params, jax.tree.map(lambda change: change * rate, updates))
        good = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), (changed, after), (params, opt_state))
        return *kept, loss

    params, opt_state, losses = jax.vmap(update)(copies.params, copies.opt_state, copies.rates, batches)
    return dataclasses.replace(copies, params=params, opt_state=opt_state), losses


def end_copies(copies: Copies, reached: Bool[Array, " copies"], step: Int[Array, ""]) -> Copies:
    """Ends the copies that have `reached` the accuracy at this evaluation."""
    going = copies.ended_at == 0

    def kept(new: Array, old: Array) -> Array:
        return jnp.where(going.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    ended = jax.tree.map(kept, copies.params, copies.ended)
    return dataclasses.replace(copies, ended=ended, ended_at=jnp.where(going & reached, step, copies.ended_at))


def evaluate_copies(params: Any, batch: dict[str, Array], *, run: Run) -> dict[str, Array]:
    """Returns the sums of `eval_step` for each copy, without the losses of single tokens."""

    def sums(params: Any) -> dict[str, Array]:
        found = eval_step(params, batch, model=run.model, answers=run.answers)
        return {name: total for name, total in found.items() if name != "token_losses"}

    return jax.vmap(sums)(params)


def first_copies(run: Run, jobs: Sequence[Job]) -> Copies:
    """Returns all copies before their first update, each initialised with its seed."""
    assert run.horizon is not None
    keys = jnp.stack([jax.random.key(job.config.train.seed) for job in jobs])
    init = functools.partial(init_state, model=run.model, config=run.config.train, horizon=run.horizon)
    state = jax.jit(jax.vmap(init))(keys)
    rates = jnp.asarray([job.config.train.learning_rate for job in jobs], jnp.float32)
    ended = jax.tree.map(jnp.copy, state.params)
    return Copies(state.params, state.opt_state, rates, ended, jnp.zeros(len(jobs), jnp.int32))


# ---- The runs


def train_together(jobs: Sequence[Job]) -> list[Record]:
    """Trains jobs of one group (see `plan.groups_of`) and performs their actions; returns their records.

    An interrupted group starts again. Raises a ConfigError if `plan.check_together` does.
    """
    config, actions = jobs[0].config, jobs[0].actions
    check_together(config)
    check_possible(checked_actions(actions), config)
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for job in jobs:
            job.workdir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(sole_run(job.workdir, LOCK_FILE))
        stack.enter_context(memory_advice())
        run, splits = _prepared(config)
        stack.enter_context(jax.set_mesh(run.mesh))
        copies, evaluations, speed = _trained(run, splits, jobs)
        seconds = (time.perf_counter() - started) / len(jobs)
        records = []
        for number, (job, history) in enumerate(zip(jobs, evaluations)):
            own = dataclasses.replace(run, config=job.config, shared_eval_step=run.eval_step)
            params = jax.tree.map(lambda leaf, number=number: leaf[number], copies.ended)
            trained = TrainedRun(own, params, history[-1][0])
            speeds = {"tokens_per_second": None if speed is None else speed / len(jobs)}
            record = record_of(job, trained, history, seconds, speeds, together=len(jobs))
            for name in actions:
                record["then"][name] = run_action(name, trained)
            write_result(job.workdir / RESULT_FILE, record)
            records.append(record)
    return records


def _prepared(config: RunConfig) -> tuple[Run, dict[str, Split]]:
    run = build_run(config, build_tokenizer(config.data.tokenizer), devices=jax.devices()[:1])
    check_trainable(run)
    splits = {name: run.split(name) for name in ("train", "validation")}
    return dataclasses.replace(
        run, horizon=run_horizon(config.train, training_batches(config, splits["train"]))
    ), splits


def _trained(
    run: Run, splits: dict[str, Split], jobs: Sequence[Job]
) -> tuple[Copies, list[list[Evaluated]], float | None]:
    """Trains until all copies have ended; returns them, each one's evaluations, and their summed tokens per second.

    The speed is without compilation and evaluations; None if there are no other updates.
    """
    train, options = run.config.train, compiler_options(run.config.train)
    update = jax.jit(functools.partial(update_copies, run=run), donate_argnums=0, compiler_options=options)
    end = jax.jit(end_copies, donate_argnums=0)
    evaluate = jax.jit(functools.partial(evaluate_copies, run=run), compiler_options=options)
    copies = first_copies(run, jobs)
    evaluations: list[list[Evaluated]] = [[] for _ in jobs]
    batches = [training_batches(job.config, splits["train"]) for job in jobs]
    speeds: list[float] = []
    tokens = len(jobs) * train.batch_size * run.config.data.sequence_length
    every, last = int(train.eval_every or train.updates), run.last_step
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(contextlib.closing(prefetched(batches)))
        for first in range(0, last, every):
            steps = range(first, min(first + every, last))
            started, timed = time.perf_counter(), len(steps)
            for step in steps:
                copies, losses = update(copies, next(reader), np.int32(step))
                if step == 0 or batches[0].length(step) != batches[0].length(step - 1):  # it was compiled
                    jax.block_until_ready(losses)
                    started, timed = time.perf_counter(), steps[-1] - step
            jax.block_until_ready(losses)
            if timed:
                speeds.append(timed * tokens / (time.perf_counter() - started))
            figures = _evaluated(run, evaluate, copies.params, splits["validation"], len(jobs))
            going = np.asarray(copies.ended_at) == 0
            for history, each, goes in zip(evaluations, figures, going):
                if goes:
                    history.append((steps[-1] + 1, each))
            goal = train.goal or math.inf  # only tasks have such a goal
            reached = np.array([each.get("accuracy", 0.0) >= goal for each in figures])
            copies = end(copies, jnp.asarray(reached), jnp.int32(steps[-1] + 1))
            shown = "accuracy" if "accuracy" in figures[0] else "loss"
            values = " ".join(f"{each[shown]:.3f}" for each in figures)
            speed = f"{speeds[-1]:,.0f} tokens/s; " if timed else ""
            say(f"update {steps[-1] + 1}: {speed}{shown} {values}")
            if all(np.asarray(copies.ended_at)):
                break
    return copies, evaluations, statistics.median(speeds) if speeds else None


def prefetched(batches: Sequence[TrainingBatches]) -> Reader:
    """Yields the stacked batches of all copies from the first update on; closing the generator ends its threads."""

    def stacked(step: int) -> Batch:
        return jax.tree.map(lambda *rows: np.stack(rows), *(each.batch(step) for each in batches))

    return in_threads(stacked, itertools.count(), threads=2, ahead=AHEAD)


def _evaluated(
    run: Run, step: Callable[[Any, Any], dict[str, Any]], params: Any, split: Split, count: int
) -> list[dict[str, float]]:
    """Returns the figures of a split for each of `count` copies."""
    sums, results = run.sums_over(split, step, params), []
    for number in range(count):
        own = {name: total[number] for name, total in sums.items()}
        result = Evaluation.of(own, split, run.config.data.sequence_length)
        results.append(summary(result, split, run.config.model.generation_window))
    return results
