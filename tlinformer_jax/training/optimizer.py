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
    """Learning rate of update u = 0, 1, ...: a linear warm-up from 0, then the configured course."""
    if config.schedule == "paper":
        course = optax.cosine_decay_schedule(config.learning_rate, max(1, horizon.decay_end - config.warmup_steps))
    elif config.schedule == "cosine":
        course = optax.cosine_decay_schedule(
            config.learning_rate, max(1, horizon.decay_end - config.warmup_steps), config.final_learning_rate
        )
    else:
        course = optax.constant_schedule(config.learning_rate)
    if config.warmup_steps == 0:
        return course
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, course], [config.warmup_steps])


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
