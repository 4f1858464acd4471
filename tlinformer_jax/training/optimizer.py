"""The optimiser and the learning rate's course, from optax."""

import dataclasses
from typing import Any

import jax
import optax

from tlinformer_jax.data.batches import TrainingBatches
from tlinformer_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class Horizon:
    """How long a run is, once its data is known.

    Attributes:
      steps: updates in all.
      decay_end: the update at which a cosine would end.
    """

    steps: int
    decay_end: int


def run_horizon(config: TrainConfig, batches: TrainingBatches) -> Horizon:
    """The length of a run over `batches`; see TrainConfig.steps, epochs and schedule."""
    steps = config.steps or batches.updates_for_epochs(config.epochs)
    if config.schedule == "paper":
        return Horizon(steps, config.epochs * -(-batches.samples_per_epoch // config.micro_batch_size))
    return Horizon(steps, steps)


def learning_rate_schedule(config: TrainConfig, horizon: Horizon) -> optax.Schedule:
    """Learning rate of update u = 0, 1, ...: a linear warm-up, then the configured course.

    The warm-up reaches the peak at its last update, and a cosine its end at the run's last; both one update later
    where the schedule is the paper's, whose first update has rate 0.
    """
    final = 0.0 if config.schedule == "paper" else config.final_learning_rate
    if config.schedule == "constant":
        course = optax.constant_schedule(config.learning_rate)
    else:
        decay = max(1, horizon.decay_end - config.warmup_steps)
        course = optax.cosine_decay_schedule(config.learning_rate, decay, final)
    if config.warmup_steps:
        warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
        course = optax.join_schedules([warmup, course], [config.warmup_steps])
    return course if config.schedule == "paper" else lambda update: course(update + 1)


def warmup_note(config: TrainConfig, horizon: Horizon) -> str | None:
    """What to tell a user whose warm-up is longer than the run; None where it is not."""
    if config.warmup_steps <= horizon.steps:
        return None
    return (
        f"note: train.warmup_steps = {config.warmup_steps} is more than the run's {horizon.steps} updates: "
        f"the learning rate rises to {horizon.steps / config.warmup_steps:.0%} of train.learning_rate at most"
    )


def decay_mask(config: TrainConfig, params: Any) -> Any:
    """Which parameters decay, as a pytree of bools."""
    everything = config.decay_mask == "all"

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return everything or path[-1].key.endswith(("kernel", "embedding"))

    return jax.tree_util.tree_map_with_path(decays, params)


def build_optimizer(config: TrainConfig, horizon: Horizon) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay, after clipping by the global norm."""
    adamw = optax.adamw(
        learning_rate_schedule(config, horizon),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=lambda params: decay_mask(config, params),
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
