"""Too many updates in a row that are not finite: what to say of them, and how to go on past them.

A rollback takes up the parameters and the optimiser of an older checkpoint at the step that the run has reached. So
batches stay a function of the step, the bad ones lie behind, and the updates in between count as skipped.
"""

import dataclasses

import jax
import jax.numpy as jnp

from tlinformer_jax.data.batches import TrainingBatches
from tlinformer_jax.errors import UserError
from tlinformer_jax.training.checkpoint import Checkpoints
from tlinformer_jax.training.metrics import say
from tlinformer_jax.training.setup import Run
from tlinformer_jax.training.step import Skips, TrainState

NAMED_SAMPLES = 8


class DivergedError(UserError):
    """Loss or gradient were not finite in more updates in a row than train.max_skipped_updates allows."""


def has_diverged(run: Run, skips: Skips) -> bool:
    """Whether so many updates in a row were skipped that nothing changes the state any more."""
    return int(skips.in_a_row) > run.config.train.max_skipped_updates


def describe_divergence(run: Run, state: TrainState, batches: TrainingBatches) -> str:
    """Names the last skipped update, the parameters whose gradient was not finite, and the batch.

    Args:
      run: that has diverged.
      state: its state.
      batches: that it trains on.
    """
    skips, step, most = state.skips, int(state.step), run.config.train.max_skipped_updates
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(run.abstract_state.params)]
    where = "the loss is not finite"
    if int(skips.culprits):
        name = "/".join(str(key.key) for key in paths[int(skips.first_culprit)])
        where = f"the gradient of {name} is not finite"
        if int(skips.culprits) > 1:
            where += f", nor are {int(skips.culprits) - 1} of the other {len(paths) - 1}"
    before = f" (train.max_skipped_updates = {most} before it were skipped)" if most else ""
    samples = [int(index) for index in batches.indices(step - 1) if index >= 0]
    more = f" and {len(samples) - NAMED_SAMPLES} more" if len(samples) > NAMED_SAMPLES else ""
    named = ", ".join(map(str, samples[:NAMED_SAMPLES]))
    return f"at step {step} {where}{before}; its batch holds samples {named}{more} of the train split"


def roll_back(run: Run, state: TrainState, batches: TrainingBatches, checkpoints: Checkpoints) -> TrainState:
    """The state to go on from after a divergence: that of the last regular checkpoint, at the present step.

    Args:
      run: that has diverged.
      state: its state, whose parameters and optimiser are given up.
      batches: that it trains on.
      checkpoints: of its working directory; without any, the run's first parameters are taken.

    Raises:
      DivergedError: after train.max_rollbacks of them, or where a checkpoint to go back to should be and is not.
    """
    text, config = describe_divergence(run, state, batches), run.config.train
    done = int(state.skips.rollbacks)
    if done >= config.max_rollbacks:
        after = f" after {done} rollbacks" if done else ""
        raise DivergedError(f"{text}{after}; lower train.learning_rate")
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        leaf.delete()  # a device may not hold two of them
    restored = checkpoints.restore(run.abstract_state, regular=True)
    if restored is None and int(state.step) > config.checkpoint_every:
        raise DivergedError(
            f"{text}; no checkpoint at a multiple of train.checkpoint_every = {config.checkpoint_every} is left to "
            "go back to"
        )
    older = run.initial_state() if restored is None else restored[0]
    say(f"{text}; rolled back to the parameters of step {int(older.step)}, going on past it")
    left_out = int(state.step) - int(older.step) + int(older.skips.total)

    def number(value: int) -> jax.Array:
        # Laid out as it was, or the next step would be compiled anew.
        return jax.device_put(jnp.int32(value), state.step.sharding)

    skips = dataclasses.replace(state.skips, in_a_row=number(0), total=number(left_out), rollbacks=number(done + 1))
    # Of the stages of a curriculum what was decided stays: the batches so far were those.
    return dataclasses.replace(older, step=state.step, skips=skips, competence=state.competence)
