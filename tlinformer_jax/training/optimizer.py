"""The optimiser of a run, its learning rate, and the choice of parameters that decay."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.batches import TrainingBatches

BETA1, BETA2, EPSILON = 0.9, 0.95, 1e-8
# Root mean square of Muon's updates at learning rate 1, matched to AdamW's (arXiv 2502.16982).
MUON_RMS = 0.2
# Matrices that Muon trains, with their (input, output) axes; each further axis indexes several matrices.
MUON_MATRICES = {
    "qkv_kernel": MuonDimensionNumbers(0, (2, 3)),
    "out_kernel": MuonDimensionNumbers((0, 1), 2),
    "gate_up_kernel": MuonDimensionNumbers(0, 2),
    "down_kernel": MuonDimensionNumbers(0, 1),
    "experts_gate_up_kernel": MuonDimensionNumbers(1, 3),
    "experts_down_kernel": MuonDimensionNumbers(1, 2),
}


@dataclasses.dataclass(frozen=True)
class Horizon:
    """The number of updates, and the update at which a cosine schedule would end."""

    steps: int
    decay_end: int


def run_horizon(config: TrainConfig, batches: TrainingBatches) -> Horizon:
    """Returns the length of a run over `batches`."""
    steps = config.updates or batches.updates_for_epochs(config.epochs)
    if config.schedule == "paper":
        return Horizon(steps, config.epochs * -(-batches.samples_per_epoch // config.micro_batch_size))
    return Horizon(steps, steps)


def build_optimizer(config: TrainConfig, horizon: Horizon) -> optax.GradientTransformation:
    """Returns the configured optimiser, with gradients clipped by their global norm before it."""
    optimizer = OPTIMIZERS[config.optimizer](config, learning_rate_schedule(config, horizon))
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer) if config.clip_norm else optimizer


def adamw(config: TrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns AdamW, whose weight decay is decoupled."""
    mask = functools.partial(decay_mask, config)
    return optax.adamw(schedule, BETA1, BETA2, EPSILON, weight_decay=config.weight_decay, mask=mask)


def muon(config: TrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Returns Muon for the hidden matrices, all of which decay, and AdamW for the other parameters."""
    matrices = optax.contrib.muon(
        schedule,
        weight_decay=config.weight_decay,
        consistent_rms=MUON_RMS,
        muon_weight_dimension_numbers=lambda params: _by_name(params, MUON_MATRICES.__getitem__),
    )
    return optax.partition(
        {"muon": matrices, "adamw": adamw(config, schedule)},
        lambda params: _by_name(params, lambda name: "muon" if name in MUON_MATRICES else "adamw"),
    )


# Name -> optimiser; `train.optimizer` takes the names in `config.train.OPTIMIZERS`.
OPTIMIZERS = {"adamw": adamw, "muon": muon}


def learning_rate_schedule(config: TrainConfig, horizon: Horizon) -> optax.Schedule:
    """Returns the learning rate of update u = 0, 1, ...: a linear warm-up, then the configured schedule.

    The peak is reached at the warm-up's last update, and the end of a decay at the run's last update; both are one
    update later with the paper's schedule.
    """
    after_warmup = max(1, horizon.decay_end - config.warmup_steps)
    if config.schedule == "constant":
        schedule = optax.constant_schedule(config.learning_rate)
    elif config.schedule.startswith("wsd"):
        decay = min(max(1, round(config.schedule_share * horizon.decay_end)), after_warmup)
        fall = functools.partial(_fall, config.learning_rate, decay)
        schedule = optax.join_schedules([optax.constant_schedule(config.learning_rate), fall], [after_warmup - decay])
    else:
        schedule = optax.cosine_decay_schedule(config.learning_rate, after_warmup, config.schedule_share)
    if config.warmup_steps:
        warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
        schedule = optax.join_schedules([warmup, schedule], [config.warmup_steps])
    return schedule if config.schedule == "paper" else lambda update: schedule(update + 1)


def _fall(peak: float, updates: int, update: Any) -> Any:
    """Returns a rate that falls from `peak` at update 0 to 0 at `updates`, as 1 - sqrt (arXiv 2405.18392)."""
    return peak * (1.0 - jnp.sqrt(jnp.clip(update / updates, 0.0, 1.0)))


def decay_mask(config: TrainConfig, params: Any) -> Any:
    """Returns which parameters decay: kernels and embeddings; with the paper's schedule all except shift and taps."""

    def decays(name: str) -> bool:
        if name == "shift" or name.startswith("tap_"):
            return False
        return config.schedule == "paper" or name.endswith(("kernel", "embedding"))

    return _by_name(params, decays)


def _by_name(params: Any, value: Callable[[str], Any]) -> Any:
    """Returns a pytree with a value for each parameter, computed from its own name ('qkv_kernel')."""
    return jax.tree_util.tree_map_with_path(lambda path, _: value(path[-1].key), params)
