"""The train step, a pure function of state and batch, and the state that it updates."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from tlinformer_jax.config.data import Stage
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.batches import LAG
from tlinformer_jax.models.model import LanguageModel
from tlinformer_jax.parallel.mesh import is_nvidia_gpu, platform
from tlinformer_jax.parallel.sharding import BatchSplit, replicated
from tlinformer_jax.training.loss import AnswersOf, summed_loss
from tlinformer_jax.training.optimizer import Horizon, build_optimizer, learning_rate_schedule
from tlinformer_jax.training.window_loss import DeviceBatch, LossAndRight, draw_windows

WINDOW = 20  # a curriculum stage ends by the mean accuracy over this many updates


# ---- The state


def _count(value: int = 0) -> Any:
    return flax.struct.field(default_factory=lambda: jnp.int32(value))


@flax.struct.dataclass
class Skips:
    """Counts of the updates that were skipped because loss or gradient were not finite; all int32 []."""

    in_a_row: jax.Array = _count()  # above train.max_skipped_updates, the state no longer changes
    total: jax.Array = _count()  # includes skips that a rollback has undone
    # For the last skipped update: the index, in the order of jax.tree, of the first parameter whose gradient was not
    # finite (-1 if only the loss was not), and the number of such parameters.
    first_nonfinite: jax.Array = _count(-1)
    nonfinite: jax.Array = _count()
    rollbacks: jax.Array = _count()  # see `loop.roll_back`


@flax.struct.dataclass
class Competence:
    """The state that decides when curriculum stages end by training accuracy.

    Attributes:
      recent: fraction of answer tokens predicted correctly in the last updates of each stage; -inf before the first.
      ends: update after which each stage ends; 0 while undecided.
    """

    recent: Float[Array, "stages recent"]
    ends: Int[Array, " stages"]


@flax.struct.dataclass
class TrainState:
    """The whole state that training changes."""

    step: jax.Array  # updates done, including skipped ones, int32 []
    params: Any  # as `model.init` names them
    opt_state: Any  # after `step` - `skips.total` updates
    skips: Skips = flax.struct.field(default_factory=Skips)
    competence: Competence | None = None  # None if no curriculum stage ends by accuracy
    ema: Any = None  # moving average of the parameters; None without `train.ema`

    @property
    def evaluated(self) -> Any:
        """The parameters that evaluations use: the moving average if there is one."""
        return self.params if self.ema is None else self.ema

    def starting_from(self, params: Any) -> "TrainState":
        """Returns this state with other parameters, from which the moving average starts too."""
        ema = None if self.ema is None else first_average(params)
        return dataclasses.replace(self, params=params, ema=ema)


def initial_competence(stages: tuple[Stage, ...]) -> Competence | None:
    """Returns the state before the first update; None if every stage ends by its number of updates alone."""
    if not any(stage.accuracy for stage in stages):
        return None
    return Competence(jnp.full((len(stages), WINDOW), -jnp.inf, jnp.float32), jnp.zeros(len(stages), jnp.int32))


def init_state(
    rng: jax.Array, model: LanguageModel, config: TrainConfig, horizon: Horizon, stages: tuple[Stage, ...] = ()
) -> TrainState:
    """Returns the state before the first update."""
    params = model.init(rng, jnp.zeros((1, 1), jnp.int32))["params"]
    opt_state = build_optimizer(config, horizon).init(params)
    ema = first_average(params) if config.ema else None
    return TrainState(jnp.int32(0), params, opt_state, competence=initial_competence(stages), ema=ema)


# ---- The moving average of the parameters


@jax.jit
def first_average(params: Any) -> Any:
    """Returns a copy of the parameters. It must be a copy: a donated state may not hold an array twice."""
    return jax.tree.map(jnp.copy, params)


def next_average(ema: Any, params: Any, decay: float, updates: jax.Array) -> Any:
    """Returns the moving average after one more update, when `updates` came before."""
    kept = jnp.minimum(decay, (1.0 + updates) / (10.0 + updates))
    return jax.tree.map(lambda mean, leaf: mean + (1.0 - kept) * (leaf - mean), ema, params)


# ---- The step


def jit_train_step(state_shardings: TrainState, batch_sharding: Any, **settings: Any) -> Any:
    """Compiles `train_step` with these settings and shardings. Call the result under `jax.set_mesh`."""
    return jax.jit(
        functools.partial(train_step, **settings),
        in_shardings=(state_shardings, batch_sharding),
        out_shardings=(state_shardings, replicated(batch_sharding.mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(settings["config"]),
    )


# No autotuning of kernels, no atomic additions, and scatters (the embedding's gradient) sort their indices first. The
# last option keeps deterministic scatters from processing tokens one by one.
# cuDNN's attention cannot run with the first or the second. XLA (JAX 0.11.2) marks only one of several equal backward
# calls as deterministic, and does not find the program of the others: "raw_hash_map<>::at" in the first step, see
# https://github.com/openxla/xla/pull/46500. So `RunConfig` sets model.attention = "deterministic".
DETERMINISTIC = {
    "xla_gpu_deterministic_ops": True,
    "xla_gpu_exclude_nondeterministic_ops": True,
    "xla_gpu_enable_scatter_determinism_expander": True,
}


def compiler_options(config: TrainConfig) -> dict[str, Any] | None:
    """Returns XLA's options for the kind of device; None if there are none.

    NVIDIA GPUs use cuBLAS for matrix products. Triton's kernels are not tried: on an H100 they were never faster at
    training shapes, and trying them took a third of the compilation time.
    """
    options: dict[str, Any] = {"xla_gpu_enable_triton_gemm": False} if is_nvidia_gpu() else {}
    if config.deterministic and platform() == "gpu":
        options |= DETERMINISTIC
    return options or None


def train_step(
    state: TrainState,
    batch: DeviceBatch,
    *,
    model: LanguageModel,
    config: TrainConfig,
    horizon: Horizon,
    answers: AnswersOf | None = None,
    stages: tuple[Stage, ...] = (),
    stage: int | None = None,
) -> tuple[TrainState, dict[str, Any]]:
    """Makes one update of the state.

    The loss is the weighted mean over the batch, for any number of micro-batches. With the paper's schedule, the
    gradient is that of the weighted sum divided by the batch's full size. If loss or gradient are not finite, the
    parameters and the optimiser do not change; after more than config.max_skipped_updates in a row, nothing changes.

    Args:
      batch: inputs and labels int32 [batch, N], weights float32 [batch, N].
      answers: gives the positions whose labels have weights, for a task; None for a text.
      stages: of the curriculum.
      stage: the index of the one that the batch belongs to; None after the last.

    Returns:
      the new state, and the metrics: loss (nats; an estimate if windows are sampled), grad_norm (before clipping),
      learning_rate, tokens, step and skips; also accuracy and stage_ends in a stage that ends by accuracy.
    """
    tokens = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
    divisor = tokens if config.equal_updates else jnp.float32(batch["weights"].size)
    split = BatchSplit.of(jax.sharding.get_abstract_mesh())
    gradient = functools.partial(batch_gradient, model=model, config=config, split=split, answers=answers)
    loss, right, grads = split.over_devices(gradient)(batch, state.params, divisor, state.step)
    updates, opt_state = build_optimizer(config, horizon).update(grads, state.opt_state, state.params)
    done = state.step - state.skips.total
    rate = learning_rate_schedule(config, horizon)(done)
    metrics = {
        "loss": loss * divisor / tokens,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": jnp.asarray(rate, jnp.float32),
        "tokens": tokens,
    }
    good, stopped, skips = count_skips(state.skips, loss, grads, config.skippable)
    params = optax.apply_updates(state.params, updates)
    ema = None if state.ema is None else next_average(state.ema, params, config.ema, done)
    params, opt_state, ema = jax.tree.map(
        lambda new, old: jax.lax.select(jnp.broadcast_to(good, new.shape), new, old),
        (params, opt_state, ema),
        (state.params, state.opt_state, state.ema),
    )
    competence = state.competence
    if stage is not None and stages[stage].accuracy and competence is not None:
        metrics["accuracy"] = right / tokens
        recorded = record_accuracy(competence, stage, stages[stage].accuracy, metrics["accuracy"], state.step)
        competence = jax.tree.map(lambda new, old: jnp.where(stopped, old, new), recorded, competence)
        metrics["stage_ends"] = competence.ends
    new = TrainState(jnp.where(stopped, state.step, state.step + 1), params, opt_state, skips, competence, ema)
    return new, {**metrics, "step": new.step, "skips": skips}


def record_accuracy(
    competence: Competence, number: int, goal: float, accuracy: jax.Array, step: jax.Array
) -> Competence:
    """Returns the state after an update of stage `number`, which ends at mean accuracy `goal`."""
    recent = jnp.append(competence.recent[number, 1:], accuracy)
    reached = (competence.ends[number] == 0) & (jnp.mean(recent) >= goal)
    ends = competence.ends.at[number].set(jnp.where(reached, step + 1 + LAG, competence.ends[number]))
    return Competence(competence.recent.at[number].set(recent), ends)


def batch_gradient(
    batch: DeviceBatch,
    params: Any,
    divisor: jax.Array,
    step: jax.Array,
    *,
    model: LanguageModel,
    config: TrainConfig,
    split: BatchSplit,
    answers: AnswersOf | None = None,
) -> tuple[jax.Array, jax.Array, Any]:
    """Returns `summed_loss` of a batch and its gradient, summed over micro-batches and devices.

    `batch` is this device's part, and `divisor` divides the loss. The keys for random draws come from seed and `step`.
    """
    dropout_key = jax.random.fold_in(jax.random.key(config.seed + 1), step)

    def draws(number: jax.Array | int) -> tuple[jax.Array, jax.Array | None]:
        """Returns the dropout key of micro-batch `number`, and its sampled windows (None if all are trained)."""
        key = jax.random.fold_in(dropout_key, number)
        if not config.sampled_windows:
            return key, None
        length = batch["inputs"].shape[1]
        return key, draw_windows(jax.random.fold_in(key, 1), model.config, length, config.sampled_windows)

    loss_of = functools.partial(
        summed_loss, model=model, split=split, answers=answers, divisor=divisor, z_loss=config.z_loss
    )
    gradient = jax.value_and_grad(loss_of, has_aux=True)
    if config.accumulation == 1:
        (loss, right), grads = gradient(params, batch, *draws(0))
    else:
        (loss, right), grads = _accumulate(gradient, draws, params, batch, config.accumulation)
    return split.psum((loss, right, grads))


def _accumulate(gradient: Any, draws: Any, params: Any, batch: DeviceBatch, parts: int) -> tuple[LossAndRight, Any]:
    """Sums losses and gradients over `parts` micro-batches, in float32."""
    # Each micro-batch takes every `parts`-th row, so that it is split over all devices as the batch is.
    micros = jax.tree.map(lambda rows: jnp.swapaxes(rows.reshape(-1, parts, *rows.shape[1:]), 0, 1), batch)

    def body(total: Any, part: tuple[DeviceBatch, jax.Array]) -> tuple[Any, None]:
        micro, number = part
        return jax.tree.map(jnp.add, total, gradient(params, micro, *draws(number))), None

    zero = (jnp.float32(0), jnp.float32(0)), jax.tree.map(jnp.zeros_like, params)
    return jax.lax.scan(body, zero, (micros, jnp.arange(parts)))[0]


def count_skips(skips: Skips, loss: jax.Array, grads: Any, most: int) -> tuple[jax.Array, jax.Array, Skips]:
    """Returns (the update is finite, the run had already stopped, the updated counts of skips)."""
    # These sums of squares also make up the gradient's norm, so they cost nothing extra.
    bad = ~jnp.isfinite(jnp.stack([jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(grads)]))
    stopped = skips.in_a_row > most
    good = jnp.isfinite(loss) & ~jnp.any(bad) & ~stopped
    first = jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32)
    nonfinite = jnp.sum(bad).astype(jnp.int32)
    skipped = Skips(skips.in_a_row + 1, skips.total + 1, first, nonfinite, skips.rollbacks)
    counted = dataclasses.replace(skips, in_a_row=jnp.int32(0))
    after = jax.tree.map(
        lambda old, yes, no: jnp.where(stopped, old, jnp.where(good, yes, no)), skips, counted, skipped
    )
    return good, stopped, after
