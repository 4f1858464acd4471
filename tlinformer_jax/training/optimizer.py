"""The optimiser and its learning rate, from optax."""

import dataclasses
from typing import Any

import jax
import optax

from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.batches import TrainingBatches

BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8


@dataclasses.dataclass(frozen=True)
class Horizon:
    """How long a run is, once its data is known: updates in all, and the update at which a cosine would end."""

    steps: int
    decay_end: int


def run_horizon(config: TrainConfig, batches: TrainingBatches) -> Horizon:
    """The length of a run over `batches`; see TrainConfig.steps, epochs and schedule."""
    steps = config.steps or batches.updates_for_epochs(config.epochs)
    if config.schedule == "paper":
        return Horizon(steps, config.epochs * -(-batches.samples_per_epoch // config.micro_batch_size))
    return Horizon(steps, steps)


def learning_rate_schedule(config: TrainConfig, horizon: Horizon) -> optax.Schedule:
    """Learning rate of update u = 0, 1, ...: a linear warm-up, then the configured schedule.

    The warm-up reaches the peak at its last update, and a cosine its end at the run's last; both one update later
    with the paper's schedule, whose first update has rate 0.
    """
    final = 0.0 if config.schedule == "paper" else config.final_learning_rate
    if config.schedule == "constant":
        schedule = optax.constant_schedule(config.learning_rate)
    else:
        decay = max(1, horizon.decay_end - config.warmup_steps)
        schedule = optax.cosine_decay_schedule(config.learning_rate, decay, final)
    if config.warmup_steps:
        warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
        schedule = optax.join_schedules([warmup, schedule], [config.warmup_steps])
    return schedule if config.schedule == "paper" else lambda update: schedule(update + 1)


def warmup_note(config: TrainConfig, horizon: Horizon) -> str | None:
    """A warning where the warm-up is longer than the run, else None."""
    if config.warmup_steps <= horizon.steps:
        return None
    return (
        f"note: train.warmup_steps = {config.warmup_steps} is more than the run's {horizon.steps} updates: "
        f"the learning rate rises to {horizon.steps / config.warmup_steps:.0%} of train.learning_rate at most"
    )


def decay_mask(config: TrainConfig, params: Any) -> Any:
    """Which parameters decay, as a pytree of bools: kernels and embeddings; with the paper's schedule all."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return config.schedule == "paper" or path[-1].key.endswith(("kernel", "embedding"))

    return jax.tree_util.tree_map_with_path(decays, params)


def build_optimizer(config: TrainConfig, horizon: Horizon) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay, after clipping by the global norm."""
    adamw = optax.adamw(
        learning_rate_schedule(config, horizon),
        b1=BETA1,
        b2=BETA2,
        eps=EPSILON,
        weight_decay=config.weight_decay,
        mask=lambda params: decay_mask(config, params),
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
