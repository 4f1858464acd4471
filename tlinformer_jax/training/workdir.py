"""A run's working directory: whether it holds this run, what is written into it first, and what is said of the run."""

import json
import pathlib
from collections.abc import Mapping

import jax
import numpy as np

from tlinformer_jax.analysis.flops import attention_by_device
from tlinformer_jax.analysis.ngram import BYTE_VOCABULARY, byte_floor
from tlinformer_jax.config.run import CONFIG_FILE, differences, load_config, save_config
from tlinformer_jax.config.train import TrainConfig
from tlinformer_jax.data.batches import TrainingBatches, num_samples
from tlinformer_jax.data.tasks import Split, TaskSplit
from tlinformer_jax.data.tokenizers import TOKENIZER_FILE, Tokenizer, load_tokenizer
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.files import read_json, write_text
from tlinformer_jax.training.metrics import say
from tlinformer_jax.training.optimizer import warmup_note
from tlinformer_jax.training.setup import Run

TEXTS_FILE = "texts.json"  # split -> SHA-256 of the tokens that the last training here has read
# What makes a run the run it is: a working directory that holds another one is not continued. The same goes for its
# tokenizer, which is compared by content.
IDENTITY = (
    *(f"model.{name}" for name in ("architecture", "vocab_size", "d_model", "num_heads", "num_blocks", "hidden_depth")),
    *(f"model.{name}" for name in ("d_ff", "history_window", "generation_window", "dropout", "param_dtype")),
    "model.observed_selection",
    *(f"data.{name}" for name in ("dataset", "sequence_length", "curriculum")),
    *(f"data.{name}" for name in ("examples", "num_items", "questions")),
    *(f"train.{name}" for name in ("batch_size", "equal_updates", "sampled_windows", "seed", "clip_norm")),
)


def check_workdir(run: Run, splits: Mapping[str, Split], workdir: pathlib.Path) -> None:
    """Makes the working directory, or checks that it holds the same run; tells what else has changed.

    Raises:
      ConfigError: if it cannot be made, or holds a run of another identity, naming what differs.
      DataError: if what it holds of a run cannot be read.
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
    tell_changed_texts(splits, workdir)


def check_tokenizer(tokenizer: Tokenizer, name: str, workdir: pathlib.Path) -> None:
    """Refuses another tokenizer than that of the run in the working directory, if there is one.

    Args:
      tokenizer: that the run is to go on with.
      name: by which the configuration calls it.
      workdir: of the run.

    Raises:
      ConfigError: for another one.
      DataError: if the directory's cannot be read.
    """
    if not any((workdir / file).exists() for file in (CONFIG_FILE, TOKENIZER_FILE)):
        return
    there = load_tokenizer(workdir).name
    if there != tokenizer.name:
        allowed = f"must be the tokenizer of the run in {workdir}, {there!r}; its content is that of {tokenizer.name!r}"
        raise ConfigError("data.tokenizer", name, allowed)


def tell_changed_texts(splits: Mapping[str, Split], workdir: pathlib.Path) -> None:
    """Says in a line which of the splits have other tokens than when the directory's run last trained.

    Raises:
      DataError: if the directory's record of them cannot be read.
    """
    path = workdir / TEXTS_FILE
    try:
        recorded = dict(read_json(path))
    except FileNotFoundError:
        return  # weights that were converted, or a run that was stopped before its first step
    except (OSError, ValueError, TypeError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({why}); without this file no texts are compared") from None
    for name, text in _texts(splits).items():
        if recorded.get(name, text) != text:
            say(f"changed since the last run here: the text of the {name} split; its samples are others now")


def _texts(splits: Mapping[str, Split]) -> dict[str, str]:
    """Split -> hash of its tokens, for those that are read from anywhere."""
    texts = {
        name: getattr(split.task, "text", None) if isinstance(split, TaskSplit) else split
        for name, split in splits.items()
    }
    return {name: text.sha256 for name, text in texts.items() if text is not None}


def save_description(run: Run, splits: Mapping[str, Split], workdir: pathlib.Path) -> None:
    """Writes configuration, hashes of the texts and, where there is none yet, the tokenizer into the directory.

    Raises:
      DataError: if they cannot be written.
    """
    try:
        if not (workdir / TOKENIZER_FILE).exists():  # else it is this one: `check_tokenizer`
            run.tokenizer.save(workdir)
        write_text(workdir / TEXTS_FILE, json.dumps(_texts(splits), indent=1) + "\n")
        save_config(run.config, workdir)
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
