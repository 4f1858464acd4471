"""The train step and the evaluation step: pure functions of state and batch, jitted over a mesh elsewhere."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from tlinformer_jax.config.data import Stage
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.models.model import LanguageModel
from tlinformer_jax.parallel.batch_split import BatchSplit
from tlinformer_jax.parallel.sharding import replicated
from tlinformer_jax.parallel.target import is_nvidia_gpu
from tlinformer_jax.training.answers import AnswersOf, answer_sums, at_places, put_back, weighted_places
from tlinformer_jax.training.batch_loss import DeviceBatch, LossAux, summed_loss
from tlinformer_jax.training.curriculum import Competence, initial_competence, record_accuracy, stage_with_goal
from tlinformer_jax.training.loss import LOSS_CHUNK, token_losses, token_losses_and_hits
from tlinformer_jax.training.optimizer import Horizon, build_optimizer, learning_rate_schedule
from tlinformer_jax.training.window_loss import draw_windows


def _count(value: int = 0) -> Any:
    return flax.struct.field(default_factory=lambda: jnp.int32(value))


@flax.struct.dataclass
class Skips:
    """Updates left out because the loss or the gradient was not finite; all int32 [].

    Attributes:
      in_a_row: up to the present step; above train.max_skipped_updates, nothing changes the state any more.
      total: of the run, with those that rollbacks have undone.
      first_nonfinite: at the last of them, the first leaf of the parameters, in the order of jax.tree, whose gradient
        was not finite; -1 if it was the loss alone.
      nonfinite: the number of such leaves.
      rollbacks: how often the run went back to older parameters; see `loop.Trainer.roll_back`.
    """

    in_a_row: jax.Array = _count()
    total: jax.Array = _count()
    first_nonfinite: jax.Array = _count(-1)
    nonfinite: jax.Array = _count()
    rollbacks: jax.Array = _count()


@flax.struct.dataclass
class TrainState:
    """All that training changes.

    Attributes:
      step: updates done, int32 []; those that were skipped count.
      params: parameters, as `model.init` names them.
      opt_state: of the optimiser; it has seen `step` - `skips.total` updates.
      skips: updates that were left out, or undone by a rollback.
      competence: what ends the stages of a curriculum; None where none ends by competence.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skips: Skips = flax.struct.field(default_factory=Skips)
    competence: Competence | None = None


def init_state(
    rng: jax.Array, model: LanguageModel, config: TrainConfig, horizon: Horizon, stages: tuple[Stage, ...] = ()
) -> TrainState:
    """The state before the first update; depends on `rng` and the configurations only."""
    params = model.init(rng, jnp.zeros((1, 1), jnp.int32))["params"]
    opt_state = build_optimizer(config, horizon).init(params)
    return TrainState(jnp.int32(0), params, opt_state, competence=initial_competence(stages))


def train_step(
    state: TrainState,
    batch: DeviceBatch,
    *,
    model: LanguageModel,
    config: TrainConfig,
    horizon: Horizon,
    window_losses: bool = False,
    answers: AnswersOf | None = None,
    stages: tuple[Stage, ...] = (),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update.

    Args:
      state: before the update.
      batch: inputs and labels int32 [batch, N], weights float32 [batch, N]. The loss is the weighted mean over
        all of it, however many micro-batches compute it; with the paper's schedule, the gradient is
        that of the weighted sum over the batch's full size.
      model: of the parameters.
      config: of the run.
      horizon: how long the run is.
      window_losses: whether to return those.
      answers: of a task, where the labels of a sample have weights.
      stages: of the curriculum.

    Returns:
      the state after the update, and scalars: loss (nats; an estimate where windows are sampled), grad_norm (before
      clipping), learning_rate, tokens; step and skips of the new state; and where asked for, window_losses, as
      `LossAux` says, summed over the batch. In a stage that ends by competence, accuracy, the share of the answers'
      tokens that were right, and stage_ends, those of the new state. Where loss or gradient are not finite,
      parameters and optimiser stay as they were; after more than config.max_skipped_updates of those in a row, the
      whole state does, whatever the batch.
    """
    tokens = jnp.maximum(jnp.sum(batch["weights"]), 1.0)
    divisor = tokens if config.equal_updates else jnp.float32(batch["weights"].size)
    split = BatchSplit.of(jax.sharding.get_abstract_mesh())
    stage = stage_with_goal(stages, batch["inputs"].shape[1])
    wanted = ("window_losses",) * window_losses + ("right",) * (stage is not None)
    gradient = functools.partial(
        batch_gradient, model=model, config=config, split=split, wanted=wanted, answers=answers
    )
    loss, aux, grads = split.over_devices(gradient)(batch, state.params, divisor, state.step)
    updates, opt_state = build_optimizer(config, horizon).update(grads, state.opt_state, state.params)
    metrics = {
        "loss": loss * divisor / tokens,
        "grad_norm": optax.tree.norm(grads),
        "learning_rate": jnp.asarray(
            learning_rate_schedule(config, horizon)(state.step - state.skips.total), jnp.float32
        ),
        "tokens": tokens,
    }
    if window_losses:
        metrics["window_losses"] = aux["window_losses"]
    good, stopped, skips = count_skips(state.skips, loss, grads, config.max_skipped_updates)
    params, opt_state = jax.tree.map(
        lambda new, old: jax.lax.select(jnp.broadcast_to(good, new.shape), new, old),
        (optax.apply_updates(state.params, updates), opt_state),
        (state.params, state.opt_state),
    )
    competence = state.competence
    if stage is not None and competence is not None:
        metrics["accuracy"] = aux["right"] / tokens
        recorded = record_accuracy(competence, stage, stages[stage].accuracy, metrics["accuracy"], state.step)
        competence = jax.tree.map(lambda new, old: jnp.where(stopped, old, new), recorded, competence)
        metrics["stage_ends"] = competence.ends
    new = TrainState(jnp.where(stopped, state.step, state.step + 1), params, opt_state, skips, competence)
    return new, {**metrics, "step": new.step, "skips": skips}


def batch_gradient(
    batch: DeviceBatch,
    params: Any,
    divisor: jax.Array,
    step: jax.Array,
    *,
    model: LanguageModel,
    config: TrainConfig,
    split: BatchSplit,
    wanted: tuple[str, ...] = (),
    answers: AnswersOf | None = None,
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """The loss of a batch with its gradient, summed over micro-batches and over the devices that share it.

    Args:
      batch: as `train_step` takes it; this device's part.
      params: parameters.
      divisor: of the summed loss, float32 [].
      step: int32 [], with the seed the key of dropout and sampled windows.
      model: of the parameters.
      config: of the run.
      split: of the batch over devices.
      wanted: fields of `LossAux` to sum as well.
      answers: as `train_step` takes it.

    Returns:
      the loss, float32 []; what is wanted besides, by name; the gradient.
    """
    dropout_key = jax.random.fold_in(jax.random.key(config.seed + 1), step)

    def draws(number: jax.Array | int) -> tuple[jax.Array, jax.Array | None]:
        """Of a micro-batch: the dropout's key, and the windows that are trained on."""
        key = jax.random.fold_in(dropout_key, number)
        if not config.sampled_windows:
            return key, None
        length = batch["inputs"].shape[1]
        return key, draw_windows(jax.random.fold_in(key, 1), model.config, length, config.sampled_windows)

    loss_of = functools.partial(summed_loss, model=model, split=split, answers=answers, divisor=divisor)
    gradient = jax.value_and_grad(loss_of, has_aux=True)
    if config.accumulation == 1:
        (loss, aux), grads = gradient(params, batch, *draws(0))
    else:
        (loss, aux), grads = _accumulate(gradient, draws, params, batch, config.accumulation)
    loss, grads = split.psum((loss, grads))
    return loss, split.psum({name: getattr(aux, name) for name in wanted}), grads


def count_skips(skips: Skips, loss: jax.Array, grads: Any, most: int) -> tuple[jax.Array, jax.Array, Skips]:
    """Judges an update.

    Args:
      skips: before it.
      loss: float32 [].
      grads: of the parameters.
      most: updates in a row that may be skipped.

    Returns:
      whether the update counts, bool []; whether the run has stopped before it, bool []; the skips after it.
    """
    # The squares' sums are those of the gradient's norm, so they cost nothing; they are finite for all that clipping
    # could bear.
    bad = ~jnp.isfinite(jnp.stack([jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(grads)]))
    stopped = skips.in_a_row > most
    good = jnp.isfinite(loss) & ~jnp.any(bad) & ~stopped
    skipped = Skips(
        skips.in_a_row + 1,
        skips.total + 1,
        jnp.where(jnp.any(bad), jnp.argmax(bad), -1).astype(jnp.int32),
        jnp.sum(bad).astype(jnp.int32),
        skips.rollbacks,
    )
    counted = dataclasses.replace(skips, in_a_row=jnp.int32(0))
    after = jax.tree.map(
        lambda old, yes, no: jnp.where(stopped, old, jnp.where(good, yes, no)), skips, counted, skipped
    )
    return good, stopped, after


def _accumulate(
    gradient: Any, draws: Any, params: Any, batch: DeviceBatch, parts: int
) -> tuple[tuple[jax.Array, LossAux], Any]:
    """Sums losses and gradients over `parts` micro-batches, in float32; the gradients get the parameters' dtype."""
    # Micro-batches take rows in turn, so that each micro-batch stays split over all devices.
    micros = jax.tree.map(lambda rows: jnp.swapaxes(rows.reshape(-1, parts, *rows.shape[1:]), 0, 1), batch)

    def body(total: Any, part: tuple[DeviceBatch, jax.Array]) -> tuple[Any, None]:
        micro, number = part
        return jax.tree.map(jnp.add, total, gradient(params, micro, *draws(number))), None

    first = jax.tree.map(lambda rows: rows[0], micros)
    sums, _ = jax.eval_shape(gradient, params, first, *draws(0))
    zero = jax.tree.map(lambda array: jnp.zeros(array.shape, jnp.float32), (sums, params))
    total, grads = jax.lax.scan(body, zero, (micros, jnp.arange(parts)))[0]
    # The optimiser's state has the parameters' dtype, and would otherwise not keep it.
    return total, jax.tree.map(lambda grad, param: grad.astype(param.dtype), grads, params)


def eval_step(
    params: Any,
    batch: DeviceBatch,
    *,
    model: LanguageModel,
    config: TrainConfig,
    answers: AnswersOf | None = None,
) -> dict[str, jax.Array]:
    """Sums of a batch by position: losses (nats) and weights, each float32 [N].

    Of a task's batch also what `training.answers.answer_sums` says; `answers` are as `train_step` takes them.
    """
    length = batch["labels"].shape[1]
    # A run of a task can be evaluated on a text as well, all of whose labels count.
    known = answers(length) if answers is not None and "starts" in batch else None
    start = 0 if known is None else known.first
    hidden: Any = model.apply({"params": params}, batch["inputs"], start=start, method=model.hidden_states)
    labels, weights, sums = batch["labels"][:, start:], batch["weights"], {}
    if "starts" in batch:
        places = None if known is None else weighted_places(weights[:, start:], known.most)
        if places is not None:
            hidden, labels = at_places(hidden, places), at_places(labels, places)
        losses, hits = token_losses_and_hits(hidden, params["embedding"], labels, LOSS_CHUNK)
        if places is not None:
            losses, hits = put_back(losses, places, length - start, 0), put_back(hits, places, length - start, True)
        losses, hits = (
            jnp.pad(array, ((0, 0), (start, 0)), constant_values=fill) for array, fill in ((losses, 0), (hits, True))
        )
        sums = answer_sums(hits, batch["starts"], batch["cells"])
    else:
        losses = token_losses(hidden, params["embedding"], labels, LOSS_CHUNK)
    return {"losses": jnp.sum(losses * weights, axis=0), "weights": jnp.sum(weights, axis=0), **sums}


def jit_train_step(
    model: LanguageModel,
    config: TrainConfig,
    horizon: Horizon,
    state_shardings: Any,
    batch_sharding: Any,
    window_losses: bool = False,
    answers: AnswersOf | None = None,
    stages: tuple[Stage, ...] = (),
) -> Any:
    """`train_step`, compiled for the shardings of its arguments; the old state's memory is reused.

    To be called under `jax.set_mesh` of their mesh, which decides how the batch is shared out.
    """
    return jax.jit(
        functools.partial(
            train_step,
            model=model,
            config=config,
            horizon=horizon,
            window_losses=window_losses,
            answers=answers,
            stages=stages,
        ),
        in_shardings=(state_shardings, batch_sharding),
        out_shardings=(state_shardings, replicated(batch_sharding.mesh)),
        donate_argnums=0,
        compiler_options=compiler_options(),
    )


def compiler_options() -> dict[str, Any] | None:
    """Options for XLA: on NVIDIA GPUs products go to cuBLAS, whose trial of Triton's kernels beside it is left out.

    On an H100 these were never faster at the shapes of training, and trying them took a third of the compilation.
    """
    return {"xla_gpu_enable_triton_gemm": False} if is_nvidia_gpu() else None


def jit_eval_step(
    model: LanguageModel,
    config: TrainConfig,
    param_shardings: Any,
    batch_sharding: Any,
    answers: AnswersOf | None = None,
) -> Any:
    """`eval_step`, compiled for the shardings of its arguments; every process gets the whole sums."""
    return jax.jit(
        functools.partial(eval_step, model=model, config=config, answers=answers),
        in_shardings=(param_shardings, batch_sharding),
        out_shardings=replicated(batch_sharding.mesh),
        compiler_options=compiler_options(),
    )
