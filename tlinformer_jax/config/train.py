"""The section `train` of a configuration: length of the training, optimiser, evaluations, checkpoints and mesh."""

import dataclasses
import math
import re

from tlinformer_jax.errors import TRUE_OR_FALSE, ConfigError, Rule, check_fields, integer, number, one_of
from tlinformer_jax.parallel.mesh import MESH_RULE, axes_of, mesh_text

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "constant", "paper")
# Updates or epochs, at least one of "epochs" and "@ACCURACY".
STEPS = re.compile(r"(?![0-9]+$)([1-9][0-9]{0,15})(epochs?)?(?:@((?=.*[1-9])0?\.[0-9]{1,17}|1(?:\.0*)?))?")
AND_MORE = re.compile(r"(\d+)(?:\+(\d+))?")  # two counts
COSINE_TO = re.compile(r"cosine:(\d+(?:\.\d+)?(?:e-?\d+)?)")
WSD = re.compile(r"wsd:((?=.*[1-9])0?\.\d+|1(?:\.0*)?)")
EPOCH = "epoch"
# JAX keeps 32 bits of a seed; larger seeds would repeat others. In training, dropout uses seed + 1.
NUM_SEEDS = 2**32
LARGEST_SEED = NUM_SEEDS - 2
DURATION = re.compile(r"((?=.*[1-9])\d+(?:\.\d+)?)(s|min|h)")
UNITS = {"s": 1, "min": 60, "h": 3600}
# Evaluation stores no activations for a gradient, so it computes several small micro-batches at a time.
EVALUATION_TOKENS = 16_384
RULES = {
    "steps": integer(
        1,
        pattern=STEPS.pattern,
        also=", epochs such as '10epochs', or either with an accuracy at which a task's run ends, such as '5000@0.99'",
    ),
    **dict.fromkeys(("batch_size", "accumulation", "log_every"), integer(1)),
    **dict.fromkeys(("sampled_windows", "warmup_steps"), integer(0)),
    "seed": integer(0, LARGEST_SEED),
    "optimizer": one_of(*OPTIMIZERS),
    "schedule": Rule(
        f"must be one of {', '.join(SCHEDULES)}, or 'cosine:0.1' to end at that share of the peak, "
        "or 'wsd:0.2' to fall over that share of the steps, more than 0 and at most 1",
        lambda name: name in SCHEDULES or any(form.fullmatch(str(name)) for form in (COSINE_TO, WSD)),
    ),
    **dict.fromkeys(
        ("learning_rate", "weight_decay", "z_loss", "clip_norm"),
        number("must be a finite number >= 0", lambda value: 0 <= value < math.inf),
    ),
    "ema": number("must be a number >= 0 and < 1", lambda decay: 0 <= decay < 1),
    "eval_every": integer(0, pattern=EPOCH, also=f", or {EPOCH!r}"),
    "checkpoint_every": integer(0, pattern=DURATION.pattern, also=", or a time such as '30s', '10min' or '1.5h'"),
    "keep_checkpoints": integer(
        1, pattern=r"[1-9]\d*(\+\d+)?", also=", or e.g. '2+1': the latest two and the best one"
    ),
    "max_skipped_updates": integer(
        0,
        pattern=AND_MORE.pattern,
        also=", or e.g. '3+1': after more than three, one return to a checkpoint",
    ),
    "deterministic": TRUE_OR_FALSE,
    "mesh": MESH_RULE,
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of the training, optimiser, evaluations and checkpoints. A step is one update of the parameters.

    Attributes:
      steps: number of updates; or of passes over the training samples, such as '10epochs'. For tasks, '5000@0.99' ends
        the run at the first evaluation with at least this fraction of right answers, after 5,000 updates at the latest.
      batch_size: sequences per update, over all devices and micro-batches.
      accumulation: number of micro-batches of an update, computed one after the other; divides batch_size.
      sampled_windows: generation windows of each sequence to train on, drawn without replacement for every
        micro-batch, with their losses weighted up; 0 takes all. Bounds the cost of a step on a very long sequence.
      seed: seed of the parameters, the order of the data, dropout and the sampled windows.
      optimizer: 'adamw'; or 'muon', Muon for the hidden matrices and AdamW for the other parameters. Muon's updates are
        scaled to the size of AdamW's, so that learning rate and weight decay are those of AdamW.
      learning_rate: the peak learning rate.
      warmup_steps: updates in which the learning rate rises linearly; the last of them has the peak.
      schedule: learning rate after the warm-up. 'cosine:0.1' falls to a tenth of the peak at the last step, 'cosine' to
        0. 'constant' stays. 'wsd:0.2' is constant, but falls to 0 in the last fifth of the steps as one minus the
        square root of the fraction of the fall that has passed. 'paper' is the paper's training loop in four respects:
        its cosine counts its length in micro-batches but its argument in updates, so that it hardly falls; the first
        update has rate 0; the last update of an epoch contains the rest of the epoch, with its gradient still divided
        by the full number of micro-batches (otherwise epochs follow each other without a gap); and weight decay applies
        to all parameters (otherwise not to biases and LayerNorms). Skipped updates do not count.
      weight_decay: decoupled weight decay, as in AdamW.
      z_loss: weight of the squared log-sum-exp of a token's logits in the gradient, such as 1e-4; keeps logits from
        drifting. The reported loss is the cross-entropy alone.
      clip_norm: largest global norm of the gradient; 0 does not clip.
      ema: decay of a moving average of the parameters, such as 0.999; 0 for none. Evaluations, generation and all other
        readers of a checkpoint use the average. After n updates the decay is at most (1 + n) / (10 + n), so that the
        average soon forgets the first parameters.
      log_every: updates between log lines.
      eval_every: updates between evaluations, or 'epoch' for one after each epoch; 0 evaluates only at the end.
      checkpoint_every: updates between checkpoints, or a time such as '10min' (also 's' and 'h'), after which the next
        update saves, with several processes one of the next 20 updates. 0 saves only at the end.
      keep_checkpoints: number of latest checkpoints to keep. '2+1' also keeps the one with the lowest validation loss,
        '2+3' the best three; an evaluation among the best then saves a checkpoint, too.
      max_skipped_updates: an update whose loss or gradient is not finite is skipped. After more skips in a row than
        this the run stops and keeps its last checkpoint; 0 stops at the first. '3+1' instead returns, once per run, to
        the parameters and optimiser state of the last checkpoint at a multiple of checkpoint_every, and continues with
        the batches after the bad ones.
      deterministic: on a GPU, makes two runs, or a run that was killed and resumed, end with the same bits on the same
        kind of device and version of JAX, more slowly. Otherwise XLA chooses kernels by timing, and sums the
        embedding's gradient in the order in which its threads finish. model.attention = 'auto' becomes 'deterministic',
        and 'cudnn' is refused. CPUs and TPUs are always deterministic.
      mesh: how devices share the work, such as 'fsdp=4,tensor=2'. The axis `fsdp` splits the batch and the parameters,
        `tensor` heads and the feed-forward's features, `window` the generation windows of each sequence, `context` the
        rows of the history, `expert` the batch and the experts of model.num_experts. The remaining devices split the
        batch, each with a copy of the parameters; with '' these are all devices.
    """

    steps: int | str = 1000
    batch_size: int = 64
    accumulation: int = 1
    sampled_windows: int = 0
    seed: int = 0
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    schedule: str = "cosine:0.1"
    weight_decay: float = 0.1
    z_loss: float = 0.0
    clip_norm: float = 1.0
    ema: float = 0.0
    log_every: int = 50
    eval_every: int | str = 0
    checkpoint_every: int | str = "10min"
    keep_checkpoints: int | str = 2
    max_skipped_updates: int | str = 0
    deterministic: bool = False
    mesh: str = ""

    def __post_init__(self) -> None:
        check_fields("train", self, RULES)
        object.__setattr__(self, "mesh", mesh_text(self.axes))  # equal values have equal texts
        object.__setattr__(self, "steps", _steps_text(self.steps))
        if self.schedule == "paper" and not self.epochs:
            raise ConfigError(
                "train.steps", self.steps, "must be in epochs, such as '10epochs', for train.schedule = 'paper'"
            )
        if self.rollbacks and not (isinstance(self.checkpoint_every, int) and self.checkpoint_every):
            allowed = "must have no '+' unless train.checkpoint_every is a number of updates >= 1"
            fault = f"{allowed}; it is {self.checkpoint_every!r}"
            raise ConfigError("train.max_skipped_updates", self.max_skipped_updates, fault)
        if self.batch_size % self.accumulation:
            allowed = f"must divide train.batch_size = {self.batch_size}"
            raise ConfigError("train.accumulation", self.accumulation, allowed)

    @property
    def axes(self) -> dict[str, int]:
        """Sizes of the axes of `mesh`."""
        return axes_of(self.mesh)

    @property
    def micro_batch_size(self) -> int:
        """Sequences per micro-batch."""
        return self.batch_size // self.accumulation

    @property
    def epochs(self) -> int:
        """Passes over the training samples; 0 if `steps` counts updates."""
        match = STEPS.fullmatch(str(self.steps))
        return int(match[1]) if match and match[2] else 0

    @property
    def updates(self) -> int:
        """Number of updates; 0 if `steps` counts epochs."""
        return 0 if self.epochs else int(str(self.steps).partition("@")[0])

    @property
    def goal(self) -> float:
        """Fraction of right answers at which the run ends; 0 if it goes on to the last update."""
        return float(str(self.steps).partition("@")[2] or 0)

    @property
    def kept(self) -> tuple[int, int]:
        """Number of latest checkpoints to keep, and number of best ones."""
        return _counts(self.keep_checkpoints)

    @property
    def skippable(self) -> int:
        """Most updates in a row that may be skipped."""
        return _counts(self.max_skipped_updates)[0]

    @property
    def rollbacks(self) -> int:
        """How many times the run may return to a checkpoint."""
        return _counts(self.max_skipped_updates)[1]

    @property
    def schedule_share(self) -> float:
        """The number in `schedule`: the share of the peak where a cosine ends, or of the steps in which 'wsd' falls."""
        return float(self.schedule.partition(":")[2] or 0)

    @property
    def equal_updates(self) -> bool:
        """Whether all updates have batch_size samples; in the paper's schedule the last one of an epoch is smaller."""
        return self.schedule != "paper"

    def evaluation_batch_size(self, trained: int, length: int) -> int:
        """Returns the evaluation batch size for sequences of `length` tokens; `trained` is the training length."""
        return max(1, max(self.micro_batch_size * trained, EVALUATION_TOKENS) // length)


def seconds(every: int | str | None) -> float:
    """Converts a time such as '10min' to seconds; returns 0 for any other value."""
    match = DURATION.fullmatch(every) if isinstance(every, str) else None
    return float(match[1]) * UNITS[match[2]] if match else 0.0


def _steps_text(steps: int | str) -> int | str:
    """Returns `steps` as it is stored: '1epoch', '10epochs', '5000@0.99' or '5000@1'."""
    match = STEPS.fullmatch(steps) if isinstance(steps, str) else None
    if not match:
        return steps
    count, epochs, accuracy = match.groups()
    text = count + ("epoch" + "s" * (count != "1") if epochs else "")
    if not accuracy:
        return text
    fraction = accuracy.partition(".")[2].rstrip("0")
    return f"{text}@0.{fraction}" if fraction else f"{text}@1"


def _counts(given: int | str) -> tuple[int, int]:
    """Returns both counts of a value such as '2+1'; the second is 0 if it is not given."""
    match = AND_MORE.fullmatch(str(given))
    assert match
    return int(match[1]), int(match[2] or 0)
