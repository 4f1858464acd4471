"""Messages to the user of a run: what is trained on what data, and what to do next."""

import contextlib
import datetime
import math
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tlinformer_jax.analysis.flops import active_parameters, num_parameters
from tlinformer_jax.analysis.ngram import BYTE_VOCABULARY, byte_floor
from tlinformer_jax.config.data import TOKENS, DataConfig, Stage
from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.config.train import EPOCH, TrainConfig
from tlinformer_jax.data.batches import LAG, TrainingBatches, num_samples
from tlinformer_jax.data.documents import DocumentStream
from tlinformer_jax.data.ordered import OrderedStream
from tlinformer_jax.data.tasks import Split, TaskSplit
from tlinformer_jax.kernels import common as kernels
from tlinformer_jax.kernels import delta as delta_kernel
from tlinformer_jax.models.attention import choose_backend
from tlinformer_jax.models.layers import Dropout
from tlinformer_jax.models.windows import num_windows, trained_tokens, training_plan
from tlinformer_jax.parallel.mesh import device_kind
from tlinformer_jax.parallel.sharding import PARTITIONED, BatchSplit
from tlinformer_jax.training.optimizer import Horizon
from tlinformer_jax.training.setup import Run, flops_per_token
from tlinformer_jax.training.step import WINDOW, Competence, TrainState

NAMED_SAMPLES = 8  # samples of a bad batch that a message names
# Prefix of a parameter's name -> the part of a layer that it belongs to.
PARTS = {"qkv": "attention", "out": "attention", "gate_up": "feed-forward", "down": "feed-forward", "norm": "norms"}
PARTS |= {"experts": "experts", "router": "router"}


def say(message: str) -> None:
    """Prints a progress line on stderr, in the first process only."""
    if jax.process_index() == 0:
        print(message, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Formats a duration as h:mm:ss."""
    return str(datetime.timedelta(seconds=round(seconds)))


def is_of_bytes(run: Run) -> bool:
    """Returns whether a token is a byte, so that byte n-grams can be compared with the run."""
    return run.tokenizer.vocab_size <= BYTE_VOCABULARY


@contextlib.contextmanager
def compilation(step: int, length: int) -> Iterator[None]:
    """Prints that step `step` is being compiled, and how long it took."""
    began = time.perf_counter()
    say(f"compiling the step for samples of {length:,} tokens; this may take a minute or more")
    yield
    say(f"compiled and ran step {step} in {time.perf_counter() - began:.0f} s")


def parameter_table(params: Any) -> str:
    """Returns a table of the parameters by layer and part; equal layers of all blocks are summed."""
    sizes: dict[str, list[int]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *layer, name = (str(key.key) for key in path)
        part = next((part for start, part in PARTS.items() if name.startswith(start)), name)
        kind = re.sub(r"_\d+", "", layer[-1]) + ": " if layer else ""
        sizes.setdefault(f"{kind}{part}", []).append(leaf.size)
    total = sum(map(sum, sizes.values()))
    rows = [(name, len(found), sum(found)) for name, found in sizes.items()] + [("all", None, total)]
    lines = [f"{'parameters':24}  {'arrays':>6}  {'numbers':>13}  share"]
    lines += [f"{name:24}  {count or '':>6}  {size:>13,}  {size / total:5.0%}" for name, count, size in rows]
    return "\n".join(lines)


# ---- Before the first update


def plan_line(run: Run) -> str:
    """Says how a step computes the windows of a sample.

    Windows before the first answer have no loss and are left out.
    """
    model, length = run.config.model, run.config.data.sequence_length
    positions, split = run.answers(length), run.mesh.shape["window"] * run.mesh.shape["context"] > 1
    sampled = 0 < run.config.train.sampled_windows < num_windows(model, length)
    first = 0 if positions is None or sampled else positions.first // model.generation_window
    mesh = run.mesh.abstract_mesh
    manual = dict.fromkeys(BatchSplit.of(mesh).manual, jax.sharding.AxisType.Manual)
    with jax.sharding.use_abstract_mesh(mesh.update_axis_types(manual)):  # its axes inside the step are manual
        plan = training_plan(model, length, first, sampled or split, run.config.data.document_masking)
    return f"model.memory = {model.memory!r}: {plan}"


def describe(run: Run, splits: Mapping[str, Split]) -> str | None:
    """Prints what is trained on which data; returns the figure to beat, None if unknown."""
    config, model, length = run.config, run.config.model, run.config.data.sequence_length
    train, validation = splits["train"], splits["validation"]
    say(model_line(run))
    say(plan_line(run))
    say(kernels.serving())
    if config.data.document_masking:
        say(f"data.document_masking: no token sees another document; attention by {attention_backend(config)!r}")
    if config.train.deterministic:
        chosen = f"model.attention = {model.attention!r}, here by {attention_backend(config)!r}"
        say(f"train.deterministic: runs repeat themselves to the last bit; {chosen}")
    if model.recurrent:
        partitioned = any(run.mesh.shape[axis] > 1 for axis in PARTITIONED)
        say(delta_kernel.serving(model.compute_dtype, model.delta.width, partitioned))
    every = config.train.checkpoint_every
    unit = " updates" if isinstance(every, int) else ""
    say(f"checkpoints: {f'every {every}{unit}, ' if every else ''}at the end")
    for line in (*length_lines(run, run.horizon, train), *(split_line(*item, length) for item in splits.items())):
        say(line)
    if config.data.dataset != "pydoc" or not is_of_bytes(run):
        return None
    assert not isinstance(train, TaskSplit)
    assert not isinstance(validation, TaskSplit)
    bits, context = byte_floor(np.asarray(train.tokens), np.asarray(validation.tokens), run.tokenizer.vocab_size)
    bits *= len(validation.tokens) / validation.num_bytes
    goal = f"{bits:.3f} bits per byte, those of the best n-gram ({context} bytes of context, Kneser-Ney)"
    say(f"to beat: {goal}")
    return goal


def attention_backend(config: RunConfig) -> str:
    """Returns the attention back end of training on one device."""
    model = config.model
    query = jnp.zeros((1, 1, 1, model.head_dim), model.compute_dtype)
    dropout = Dropout.by_key(jax.random.key(0), model.dropout) if model.dropout else None
    return choose_backend(query, dropout, False, config.data.document_masking, model.attention)


def model_line(run: Run) -> str:
    """Describes a run's model, parameters and devices."""
    model = run.config.model
    devices = f"{model.compute_dtype.name} on {run.mesh.size} x {device_kind()}, mesh {dict(run.mesh.shape)}"
    active = f", {active_parameters(model):,} of them active for a token" if model.mixture else ""
    return f"{model.architecture}, {model.num_layers} layers, {num_parameters(model):,} parameters{active}; {devices}"


def length_lines(run: Run, horizon: Horizon | None, train: Split | None) -> list[str]:
    """Describes FLOPs, steps and tokens; `horizon` and `train` are None while unknown."""
    config, length = run.config, run.config.data.sequence_length
    predicted = trained_tokens(config.model, length, config.train.sampled_windows)
    step = config.train.batch_size * length
    lines = [f"model FLOPs per trained token, forward and backward: {flops_per_token(run, length):,.0f}"]
    if config.train.goal:
        lines.append(goal_line(config.train))
    if horizon is None:
        known = "known when the text is tokenised: python -m tlinformer_jax prepare"
        return [*lines, f"{config.train.epochs:,} epochs, steps of {step:,} tokens; their number will be {known}"]
    text = f"{horizon.steps:,} steps of {step:,} tokens, {horizon.steps * step:,} tokens in all"
    if train is not None and not isinstance(train, OrderedStream):
        seen = config.data.samples_before(horizon.steps, config.train.batch_size)
        text += f", {seen / num_samples(train, length):.2f} epochs"
    if predicted < length:
        text += f"; of them {horizon.steps * config.train.batch_size * predicted:,.0f} in sampled windows"
    lines.append(text)
    if config.data.stages:
        lines.append("first " + ", then ".join(map(stage_text, config.data.stages)))
    if (warmup := config.train.warmup_steps) > horizon.steps:
        reached = f"{horizon.steps / warmup:.0%} of train.learning_rate at most"
        more = f"note: train.warmup_steps = {warmup} is more than the run's {horizon.steps} updates"
        lines.append(f"{more}: the learning rate rises to {reached}")
    return lines


def stage_text(stage: Stage) -> str:
    """Says how long a stage of a curriculum is."""
    text = f"{stage.updates:,} updates on samples of {stage.length:,} tokens"
    return f"at most {text}, until {stage.accuracy:.0%} of the answers are right" if stage.accuracy else text


def goal_line(train: TrainConfig) -> str:
    """Says at what accuracy a run ends, and how often it is measured."""
    if not train.eval_every:
        return "note: train.eval_every = 0 evaluates only after the last update, so no accuracy ends the run early"
    when = "after each epoch" if train.eval_every == EPOCH else f"every {train.eval_every:,} updates"
    return f"ends early at an accuracy of {train.goal:g}; evaluated {when}"


def split_line(name: str, split: Split | None, length: int) -> str:
    """Describes a split's size; `split` is None if it has not been tokenised."""
    if split is None:
        return f"{name} split: not tokenised yet; training does it, or python -m tlinformer_jax prepare"
    if isinstance(split, OrderedStream):
        return f"{name} split: an iterable, read in its own order"
    if isinstance(split, TaskSplit):
        return f"{name} split: {split.count:,} samples of {length:,}, generated as they are read"
    text = f"{name} split: {len(split.tokens):,} tokens, {num_samples(split, length):,} samples of {length:,}"
    if isinstance(split, DocumentStream):
        text += f" of packed documents, {split.packing(length).padding:.1%} of them padding"
    return text


# ---- During and after training


def describe_stage(stage: Stage, step: int, competence: Competence | None) -> str:
    """Says which curriculum stage ended after update `step`, and why."""
    text = f"step {step}: the stage on samples of {stage.length} tokens ends after {stage.updates:,} updates"
    if not stage.accuracy or competence is None:
        return f"{text}, as configured"
    if step in competence.ends.tolist():
        return f"{text}: training accuracy has reached {stage.accuracy:g} over {WINDOW} updates, {LAG} updates ago"
    return f"{text}, the most it may take"


def describe_end_of_run(run: Run, workdir: pathlib.Path, figures: Mapping[str, float], goal: str | None) -> None:
    """Prints the figure reached beside the one to beat, and the commands to run next."""
    if goal is not None:
        say(f"reached: {figures['bits_per_byte']:.3f} bits per byte; to beat: {goal}")
    if not run.config.data.is_task:
        how = generation_flags(run.config.data)
        say(f"next: python -m tlinformer_jax generate --workdir={shlex.quote(str(workdir))} {how}")
    if run.config.data.dataset == TOKENS and not run.config.data.validation_files:  # the caller's arrays are not stored
        say(f"next, in Python: evaluate_run(load_run({str(workdir)!r}, validation_data=...))")
    else:
        say(f"next: python -m tlinformer_jax evaluate --workdir={shlex.quote(str(workdir))}")


def generation_flags(data: DataConfig) -> str:
    """Returns the flags of a first generation; for data other than text those of docs/guides/other_data.md."""
    if data.dataset == "idx":
        square = math.isqrt(data.sequence_length) ** 2 == data.sequence_length  # --save needs it
        flags = f"--prompt=0 --max_new_tokens={data.sequence_length} --temperature=1 --num_samples=50"
        return f"{flags} --save=images.png" if square else flags
    if data.dataset == "wav":
        return "--prompt=128 --max_new_tokens=16000 --temperature=1 --save=speech.wav"
    if data.letters:
        prompt = next(start for start in ("M", "ATGAAA", data.letters[:4]) if set(start) <= set(data.letters))
        return f"--prompt={shlex.quote(prompt)} --temperature=1"
    return '--prompt="1 2 3"' if data.tokenizer.startswith("ids:") else '--prompt="..."'


def describe_divergence(run: Run, state: TrainState, batches: TrainingBatches) -> str:
    """Names the last skipped update, the parameters that were not finite, and the batch."""
    skips, step, most = state.skips, int(state.step), run.config.train.skippable
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(run.abstract_state.params)]
    where = "the loss is not finite"
    if int(skips.nonfinite):
        name = jax.tree_util.keystr(paths[int(skips.first_nonfinite)], simple=True, separator="/")
        where = f"the gradient of {name} is not finite"
        if int(skips.nonfinite) > 1:
            where += f", nor are {int(skips.nonfinite) - 1} of the other {len(paths) - 1}"
    before = f" (train.max_skipped_updates = {most} before it were skipped)" if most else ""
    samples = [int(index) for index in batches.indices(step - 1) if index >= 0]
    more = f" and {len(samples) - NAMED_SAMPLES} more" if len(samples) > NAMED_SAMPLES else ""
    named = ", ".join(map(str, samples[:NAMED_SAMPLES]))
    return f"at step {step} {where}{before}; its batch holds samples {named}{more} of the train split"
