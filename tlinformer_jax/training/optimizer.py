"""The optimiser and the learning rate's course, from optax."""

from typing import Any

import jax
import optax

from tlinformer_jax.training.config import TrainConfig


def learning_rate_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate of update u = 0, 1, ...: a linear warm-up from 0, then the configured course."""
    if config.schedule == "cosine":
        course = optax.cosine_decay_schedule(
            config.learning_rate, max(1, config.steps - config.warmup_steps), config.final_learning_rate
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


def build_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW with decoupled weight decay, after clipping by the global norm."""
    adamw = optax.adamw(
        learning_rate_schedule(config),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=lambda params: decay_mask(config, params),
    )
    if config.clip_norm == 0:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
