"""A run's working directory: whether it holds this run, what is written into it first, and what is said of the run."""

import pathlib

import jax
import numpy as np

from tlinformer_jax.analysis.flops import attention_by_device
from tlinformer_jax.analysis.ngram import BYTE_VOCABULARY, byte_floor
from tlinformer_jax.config import CONFIG_FILE, differences, load_config, save_config
from tlinformer_jax.data.batches import TrainingBatches, num_samples
from tlinformer_jax.data.tasks import Split, TaskSplit
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.training.config import TrainConfig
from tlinformer_jax.training.metrics import say
from tlinformer_jax.training.optimizer import warmup_note
from tlinformer_jax.training.setup import Run

# What makes a run the run it is: a working directory that holds another one is not continued.
IDENTITY = (
    *(f"model.{name}" for name in ("architecture", "vocab_size", "d_model", "num_heads", "num_blocks", "hidden_depth")),
    *(f"model.{name}" for name in ("d_ff", "history_window", "generation_window", "dropout", "param_dtype")),
    "model.observed_selection",
    *(f"data.{name}" for name in ("dataset", "tokenizer", "sequence_length", "wikitext_variant", "curriculum")),
    *(f"data.{name}" for name in ("train_examples", "pairs", "passkeys", "questions")),
    *(f"train.{name}" for name in ("batch_size", "equal_updates", "sampled_windows", "seed", "clip_norm")),
)


def check_workdir(run: Run, workdir: pathlib.Path) -> None:
    """Makes the working directory, or checks that it holds the same run; tells what else has changed.

    Raises:
      ConfigError: if it cannot be made, or holds a run of another identity, naming what differs.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("workdir", str(workdir), f"must be a directory that can be written ({error})") from None
    if not (workdir / CONFIG_FILE).exists():
        return
    changed = differences(load_config(workdir), run.config)
    other = [line for line in changed if line.split(":")[0] in IDENTITY]
    if other:
        raise ConfigError("workdir", str(workdir), f"holds a run with another configuration: {'; '.join(other)}")
    for line in changed:
        say(f"changed since the last run here: {line}")


def save_description(run: Run, workdir: pathlib.Path) -> None:
    """Writes configuration and tokenizer into the working directory.

    Raises:
      DataError: if they cannot be written.
    """
    try:
        save_config(run.config, workdir)
        run.tokenizer.save(workdir)
    except OSError as error:
        raise DataError(f"workdir {workdir}: its configuration cannot be written ({error.strerror})") from None


def checkpoint_line(config: TrainConfig) -> str:
    """When a run saves checkpoints."""
    every = f"every {config.checkpoint_every:,} updates" if config.checkpoint_every else ""
    minutes = f"every {config.checkpoint_minutes:g} minutes or less" if config.checkpoint_minutes else ""
    return f"checkpoints: {', '.join(filter(None, (every, minutes, 'at the end')))}"


def describe(run: Run, train: Split, validation: Split, batches: TrainingBatches) -> None:
    """Says what is about to be trained, and on what."""
    config = run.config
    say(
        f"{config.model.architecture}, {config.model.num_layers} layers, on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}, mesh {dict(run.mesh.shape)}, {config.model.compute_dtype.name}"
    )
    say(checkpoint_line(config.train))
    if note := warmup_note(config.train, run.horizon):
        say(note)
    steps = f"{run.horizon.steps:,} steps of {config.train.batch_size * config.data.sequence_length:,} tokens"
    if isinstance(train, TaskSplit) or isinstance(validation, TaskSplit):
        say(
            f"{config.data.dataset}: {batches.samples_per_epoch:,} samples of {batches.sequence_length} to train on, "
            f"{num_samples(validation, batches.sequence_length):,} to validate; {steps}"
        )
        return
    say(
        f"train {len(train.tokens):,} tokens, {batches.samples_per_epoch:,} samples of {batches.sequence_length}; "
        f"validation {len(validation.tokens):,} tokens; {steps}"
    )
    parts = run.mesh.shape["window"]
    if parts > 1:
        loads = attention_by_device(config.model, config.data.sequence_length, parts)
        say(f"windows over {parts} devices: the busiest has {loads.max() / loads.mean():.3f} times the mean attention")
    if config.data.dataset == "pydoc" and run.tokenizer.vocab_size <= BYTE_VOCABULARY:
        bits, context = byte_floor(np.asarray(train.tokens), np.asarray(validation.tokens), run.tokenizer.vocab_size)
        bits *= len(validation.tokens) / validation.num_bytes
        say(f"to beat: {bits:.3f} bits per byte, those of the best n-gram ({context} bytes of context, Kneser-Ney)")
