"""What a training run is told beyond the model, the data and the mesh."""

import dataclasses

from tlinformer_jax.errors import ConfigError

SCHEDULES = ("cosine", "constant", "paper")
DECAY_MASKS = ("all", "matrices")
# JAX's keys are made of 32 bits, those of dropout of the seed's successor.
LARGEST_SEED = 2**32 - 2


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, optimiser and rhythm of a run; a step is one update of the parameters.

    Attributes:
      steps: updates in all; 0 means as many as `epochs` take.
      epochs: passes over the training samples; read only where `steps` is 0.
      equal_updates: True: epochs follow each other without a gap. False, the paper's way: an epoch's last update
        holds what is left of the epoch, its gradient still divided by the full number of micro-batches.
      batch_size: sequences an update, over all devices and micro-batches.
      accumulation: micro-batches an update is computed in, one after the other; divides batch_size.
      sampled_windows: train on so many generation windows of each sequence, drawn without replacement at every
        micro-batch, their losses weighted up; 0 takes all. It bounds what a step on a very long sequence costs.
      seed: of the parameters, the data's order, dropout and the sampled windows.
      learning_rate: its peak.
      warmup_steps: updates over which it rises in equal steps; the last of them has the peak.
      schedule: after the warm-up 'constant'; 'cosine' to final_learning_rate at the last step; or 'paper', a
        cosine whose length counts micro-batches while its argument counts updates, so that it hardly falls; there
        the first update has rate 0. Updates that are skipped do not count.
      final_learning_rate: where the cosine ends, as a fraction of the peak.
      beta1: AdamW; beta2: AdamW; epsilon: AdamW.
      weight_decay: AdamW, decoupled.
      decay_mask: 'all' decays every parameter (the paper), 'matrices' spares biases and LayerNorms.
      clip_norm: largest global norm of the gradient; 0 leaves it as it is.
      loss_chunk: tokens whose logits are held at a time, per micro-batch.
      log_every: updates between log lines.
      eval_every: updates between evaluations; 0 evaluates at the end only.
      eval_every_epochs: epochs between evaluations, besides those of eval_every; 0 for none.
      eval_batch_size: sequences a batch of evaluation; 0 takes a micro-batch's.
      checkpoint_every: updates between checkpoints; 0 leaves them to checkpoint_minutes.
      checkpoint_minutes: a checkpoint is also saved when the last one is nearly so many minutes old; 0 for none.
      keep_checkpoints: how many of the latest are kept.
      keep_best: how many of those with the lowest validation loss are kept besides; above 0, an evaluation that is
        among the best saves a checkpoint too.
      max_skipped_updates: an update whose loss or gradient is not finite is left out; after more than so many of
        them in a row the run stops. 0 stops at the first.
      stop_at_accuracy: of tasks: an evaluation on the way that finds at least this share of the answers right ends the
        run, which is then finished; 0 goes on to the last update.
      max_rollbacks: how often, instead of stopping, it takes up the parameters of the last checkpoint and goes on with
        the batches that follow; above 0, checkpoint_every must be too.
    """

    steps: int = 1000
    epochs: int = 0
    equal_updates: bool = True
    batch_size: int = 64
    accumulation: int = 1
    sampled_windows: int = 0
    seed: int = 0
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    schedule: str = "cosine"
    final_learning_rate: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    decay_mask: str = "matrices"
    clip_norm: float = 1.0
    loss_chunk: int = 8192
    log_every: int = 50
    eval_every: int = 0
    eval_every_epochs: int = 0
    eval_batch_size: int = 0
    checkpoint_every: int = 0
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 2
    keep_best: int = 0
    max_skipped_updates: int = 0
    max_rollbacks: int = 0
    stop_at_accuracy: float = 0.0

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "accumulation": 1, "loss_chunk": 1, "log_every": 1}
        least |= {"keep_checkpoints": 1}
        zero: tuple[str, ...] = (
            "steps",
            "epochs",
            "sampled_windows",
            "seed",
            "warmup_steps",
            "eval_every",
            "eval_every_epochs",
            "eval_batch_size",
        )
        zero += ("checkpoint_every", "keep_best", "max_skipped_updates", "max_rollbacks")
        for name, minimum in (least | dict.fromkeys(zero, 0)).items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
                raise ConfigError(f"train.{name}", value, f"must be an integer >= {minimum}")
        if self.seed > LARGEST_SEED:
            raise ConfigError("train.seed", self.seed, f"must be at most {LARGEST_SEED}")
        numbers = ("learning_rate", "final_learning_rate", "epsilon", "weight_decay", "clip_norm", "beta1", "beta2")
        for name in (*numbers, "checkpoint_minutes"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
                raise ConfigError(f"train.{name}", value, "must be a finite number >= 0")
        accuracy = self.stop_at_accuracy
        if not isinstance(accuracy, int | float) or isinstance(accuracy, bool) or not 0 <= accuracy <= 1:
            raise ConfigError("train.stop_at_accuracy", accuracy, "must be a number from 0 to 1")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"train.{name}", getattr(self, name), "must be below 1")
        if self.schedule not in SCHEDULES:
            raise ConfigError("train.schedule", self.schedule, f"must be one of {', '.join(SCHEDULES)}")
        if self.decay_mask not in DECAY_MASKS:
            raise ConfigError("train.decay_mask", self.decay_mask, f"must be one of {', '.join(DECAY_MASKS)}")
        if not isinstance(self.equal_updates, bool):
            raise ConfigError("train.equal_updates", self.equal_updates, "must be True or False")
        if not self.steps and not self.epochs:
            raise ConfigError("train.steps", 0, "must be at least 1 where train.epochs is 0")
        if self.schedule == "paper" and not self.epochs:
            raise ConfigError("train.epochs", 0, "must be at least 1 for train.schedule = 'paper'")
        if self.max_rollbacks and not self.checkpoint_every:
            raise ConfigError("train.max_rollbacks", self.max_rollbacks, "must be 0 where train.checkpoint_every is 0")
        if self.batch_size % self.accumulation:
            raise ConfigError(
                "train.accumulation", self.accumulation, f"must divide train.batch_size = {self.batch_size}"
            )

    @property
    def micro_batch_size(self) -> int:
        """Sequences that are computed together."""
        return self.batch_size // self.accumulation

    @property
    def evaluation_batch_size(self) -> int:
        """Sequences of a batch of evaluation."""
        return self.eval_batch_size or self.micro_batch_size
