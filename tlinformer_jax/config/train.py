"""The `train` section of a run's configuration: length, optimiser, evaluations and checkpoints."""

import dataclasses
import re
from typing import Any

from tlinformer_jax.errors import ConfigError

SCHEDULES = ("cosine", "constant", "paper")
KEPT = re.compile(r"([1-9]\d*)(?:\+(\d+))?")
COSINE_TO = re.compile(r"cosine:(\d+(?:\.\d+)?(?:e-?\d+)?)")
EPOCH = "epoch"
# A JAX key takes 32 bits; dropout uses seed + 1.
LARGEST_SEED = 2**32 - 2
DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|min|h)")
UNITS = {"s": 1, "min": 60, "h": 3600}
# Evaluation keeps no activations for a gradient, so small micro-batches are evaluated several at a time.
EVALUATION_TOKENS = 16_384
SMALLEST = dict.fromkeys(("batch_size", "accumulation", "log_every"), 1)
SMALLEST |= dict.fromkeys(("steps", "epochs", "sampled_windows", "seed", "warmup_steps"), 0)
SMALLEST |= dict.fromkeys(("max_skipped_updates", "max_rollbacks"), 0)
NOT_NEGATIVE = ("learning_rate", "weight_decay", "clip_norm")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A step is one update of the parameters.

    Attributes:
      steps: updates in all; 0 means as many as `epochs` take.
      epochs: passes over the training samples; read only where `steps` is 0.
      batch_size: sequences an update, over all devices and micro-batches.
      accumulation: micro-batches an update is computed in, one after the other; divides batch_size.
      sampled_windows: generation windows of each sequence to train on, drawn without replacement for every
        micro-batch, their losses weighted up; 0 takes all. Bounds the cost of a step on a very long sequence.
      seed: of the parameters, the order of the data, dropout and the sampled windows.
      learning_rate: the peak.
      warmup_steps: updates over which it rises linearly; the last of them has the peak.
      schedule: after the warm-up. 'cosine:0.1': to a tenth of the peak at the last step, 'cosine': to 0; 'constant'; or
        'paper', the paper's training loop in four respects. Its cosine counts its length in micro-batches and its
        argument in updates, so that it hardly falls; the first update has rate 0; an epoch's last update holds what is
        left of the epoch, its gradient still divided by the full number of micro-batches (otherwise epochs follow each
        other without a gap); and weight decay applies to all parameters (otherwise biases and LayerNorms are spared).
        Skipped updates do not count.
      weight_decay: of AdamW, decoupled.
      clip_norm: largest global norm of the gradient; 0 does not clip.
      log_every: updates between log lines.
      eval_every: updates between evaluations, or 'epoch' for one after each epoch; 0 evaluates at the end only.
      checkpoint_every: updates between checkpoints, or a time such as '10min' (also 's' and 'h'), which no checkpoint
        is older than when the next one is saved; 0 saves at the end only.
      keep_checkpoints: how many of the latest are kept; '2+1' also keeps the one with the lowest validation loss, '2+3'
        the best three, and then an evaluation that is among the best saves a checkpoint too.
      max_skipped_updates: an update whose loss or gradient is not finite is skipped; after more than so many in a row
        the run stops, and its last checkpoint stays. 0 stops at the first.
      max_rollbacks: how often, instead of stopping, the run takes up parameters and optimiser of the last checkpoint at
        a multiple of checkpoint_every, and goes on with the batches that follow the bad ones.
      stop_at_accuracy: of tasks: the run ends at the first evaluation with at least this share of answers right; 0
        goes on to the last update.
    """

    steps: int = 1000
    epochs: int = 0
    batch_size: int = 64
    accumulation: int = 1
    sampled_windows: int = 0
    seed: int = 0
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    schedule: str = "cosine:0.1"
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    log_every: int = 50
    eval_every: int | str = 0
    checkpoint_every: int | str = "10min"
    keep_checkpoints: int | str = 2
    max_skipped_updates: int = 0
    max_rollbacks: int = 0
    stop_at_accuracy: float = 0.0

    def __post_init__(self) -> None:
        for name, least in SMALLEST.items():
            if not _is_integer(getattr(self, name), least):
                raise ConfigError(f"train.{name}", getattr(self, name), f"must be an integer >= {least}")
        if self.seed > LARGEST_SEED:
            raise ConfigError("train.seed", self.seed, f"must be at most {LARGEST_SEED}")
        for name in NOT_NEGATIVE:
            if not _is_number(getattr(self, name)) or getattr(self, name) == float("inf"):
                raise ConfigError(f"train.{name}", getattr(self, name), "must be a finite number >= 0")
        if not _is_number(self.stop_at_accuracy) or self.stop_at_accuracy > 1:
            raise ConfigError("train.stop_at_accuracy", self.stop_at_accuracy, "must be a number from 0 to 1")
        if self.schedule not in SCHEDULES and not COSINE_TO.fullmatch(str(self.schedule)):
            allowed = f"must be one of {', '.join(SCHEDULES)}, or 'cosine:0.1' to end at that share of the peak"
            raise ConfigError("train.schedule", self.schedule, allowed)
        if self.eval_every != EPOCH and not _is_integer(self.eval_every, 0):
            raise ConfigError("train.eval_every", self.eval_every, f"must be an integer >= 0, or {EPOCH!r}")
        if not _is_integer(self.checkpoint_every, 0) and not seconds(self.checkpoint_every):
            allowed = "must be an integer >= 0, or a time such as '30s', '10min' or '1.5h'"
            raise ConfigError("train.checkpoint_every", self.checkpoint_every, allowed)
        kept = self.keep_checkpoints
        if isinstance(kept, bool) or not KEPT.fullmatch(str(kept)):
            allowed = "must be an integer >= 1, or such as '2+1': the latest two and the best one"
            raise ConfigError("train.keep_checkpoints", kept, allowed)
        if not self.steps and not self.epochs:
            raise ConfigError("train.steps", 0, "must be at least 1 where train.epochs is 0")
        if self.schedule == "paper" and not self.epochs:
            raise ConfigError("train.epochs", 0, "must be at least 1 for train.schedule = 'paper'")
        if self.max_rollbacks and not (isinstance(self.checkpoint_every, int) and self.checkpoint_every):
            allowed = f"must be 0 where train.checkpoint_every = {self.checkpoint_every!r} is no number of updates"
            raise ConfigError("train.max_rollbacks", self.max_rollbacks, allowed)
        if self.batch_size % self.accumulation:
            allowed = f"must divide train.batch_size = {self.batch_size}"
            raise ConfigError("train.accumulation", self.accumulation, allowed)

    @property
    def micro_batch_size(self) -> int:
        """Sequences that are computed together."""
        return self.batch_size // self.accumulation

    @property
    def kept(self) -> tuple[int, int]:
        """How many of the latest checkpoints are kept, and of the best."""
        match = KEPT.fullmatch(str(self.keep_checkpoints))
        assert match
        return int(match[1]), int(match[2] or 0)

    @property
    def cosine_end(self) -> float:
        """Where a cosine ends, as a fraction of the peak."""
        match = COSINE_TO.fullmatch(self.schedule)
        return float(match[1]) if match else 0.0

    @property
    def equal_updates(self) -> bool:
        """Whether all updates have batch_size samples; the last of an epoch is smaller in the paper's schedule."""
        return self.schedule != "paper"

    def evaluation_batch_size(self, trained: int, length: int) -> int:
        """Sequences of `length` tokens in a batch of evaluation, in a run trained on samples of `trained` tokens."""
        return max(1, max(self.micro_batch_size * trained, EVALUATION_TOKENS) // length)


def seconds(every: int | str | None) -> float:
    """The seconds of a time such as '10min'; 0 for anything else."""
    match = DURATION.fullmatch(every) if isinstance(every, str) else None
    return float(match[1]) * UNITS[match[2]] if match else 0.0


def _is_integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    """Whether it is a number >= 0; not for NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
