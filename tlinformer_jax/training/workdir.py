"""A run's working directory: its lock, whether it holds this run, what is written into it, and where it started from.

A run started by `--init_from=WORKDIR` takes another run's parameters; optimiser and step are those of a new run. Its
directory remembers the other one and saves step 0 at once: the other directory is needed no more, and the same command,
with or without the flag, goes on.
"""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from tlinformer_jax.config.run import CONFIG_FILE, RunConfig, differences, load_config, save_config
from tlinformer_jax.data.tasks import Split, TaskSplit
from tlinformer_jax.data.tokenizers import TOKENIZER_FILE, Tokenizer, load_tokenizer
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.files import local_path, open_own, read_json, write_text
from tlinformer_jax.models.model import build_model
from tlinformer_jax.training.checkpoint import check_size, restore_params
from tlinformer_jax.training.metrics import say
from tlinformer_jax.training.setup import Run

LOCK_FILE = ".lock"
TEXTS_FILE = "texts.json"  # split -> SHA-256 of the tokens that the last training here has read
ORIGIN_FILE = "init_from.json"
# The fields of the model that decide the parameters' names and shapes.
SHAPES = ("architecture", "vocab_size", "d_model", "num_heads", "num_blocks", "hidden_depth", "d_ff")
# A directory that holds a run with other values here is not continued; nor one with another tokenizer, compared by
# content, or where only one of the two has the paper's schedule, whose batches are others.
IDENTITY = (
    *(f"model.{name}" for name in SHAPES),
    *(f"model.{name}" for name in ("history_window", "generation_window", "dropout", "param_dtype")),
    *(f"data.{name}" for name in ("dataset", "sequence_length", "curriculum")),
    *(f"data.{name}" for name in ("examples", "num_items", "questions")),
    *(f"train.{name}" for name in ("batch_size", "sampled_windows", "seed", "clip_norm")),
)


# ---- The lock


@contextlib.contextmanager
def sole_run(workdir: pathlib.Path, name: str = LOCK_FILE) -> Iterator[None]:
    """Holds the lock of the working directory; process 0 does so for all processes of a run.

    The system releases it when the process ends, however that happens. The file `name` says which process and host
    hold it; it stays, but only the lock on it counts, so the file of a killed run is no obstacle.

    Raises:
      DataError: if another run holds it, or the file cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    try:
        file = open_own(workdir / name, "a+")
    except OSError as error:
        raise DataError(f"workdir {workdir}: {name} cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "not named"
            raise DataError(f"workdir {workdir}: another run is training into it ({holder})") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                raise
            say(f"workdir {workdir}: its file system has no locks; a second run here would not be noticed")
        try:  # past the file's buffer, which would raise once more when it is closed
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on host {platform.node()}\n".encode())
        except OSError as error:
            raise DataError(f"workdir {workdir}: {name} cannot be written ({error.strerror})") from None
        yield


# ---- Whether it holds this run


def check_workdir(run: Run, splits: Mapping[str, Split], workdir: pathlib.Path) -> None:
    """Makes the working directory, or checks that it holds the same run; says what else has changed.

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
    before = load_config(workdir)
    changed = differences(before, run.config)
    fields = IDENTITY
    if before.train.equal_updates != run.config.train.equal_updates:
        fields += ("train.schedule",)
    other = [line for line in changed if line.split(":")[0] in fields]
    if other:
        raise ConfigError("workdir", str(workdir), f"holds a run with another configuration: {'; '.join(other)}")
    for line in changed:
        say(f"changed since the last run here: {line}")
    tell_changed_texts(splits, workdir)


def check_tokenizer(tokenizer: Tokenizer, name: str, workdir: pathlib.Path) -> None:
    """Refuses another tokenizer (`name` in the configuration) than that of a run in the working directory.

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
    """Says which of the splits have other tokens than when the directory's run last trained.

    Raises:
      DataError: if the directory's record of them cannot be read.
    """
    path = workdir / TEXTS_FILE
    try:
        recorded = dict(read_json(path))
    except FileNotFoundError:
        return  # converted weights, or a run that was stopped before its first step
    except (OSError, ValueError, TypeError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({why}); without this file no texts are compared") from None
    for name, text in _text_hashes(splits).items():
        if recorded.get(name, text) != text:
            say(f"changed since the last run here: the text of the {name} split; its samples are others now")


def _text_hashes(splits: Mapping[str, Split]) -> dict[str, str]:
    """Split -> hash of its tokens, for those that are read from a file."""
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
        write_text(workdir / TEXTS_FILE, json.dumps(_text_hashes(splits), indent=1) + "\n")
        save_config(run.config, workdir)
    except OSError as error:
        raise DataError(f"workdir {workdir}: its configuration cannot be written ({error.strerror})") from None


# ---- Where it started from


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a run's first parameters come from: another run's directory and a step, None for the newest good one."""

    workdir: pathlib.Path
    step: int | None = None


def find_origin(config: RunConfig, workdir: pathlib.Path, asked: str | pathlib.Path | None) -> Origin | None:
    """The origin that a working directory remembers, or the one asked for by --init_from; None for random parameters.

    Raises:
      ConfigError: if the directory holds a run of another origin than the one asked for, or its parameters do not fit.
      DataError: if what it remembers, or the other run, cannot be read.
    """
    begun = (workdir / CONFIG_FILE).exists()
    origin = _asked_or_remembered(workdir, asked, begun)
    if origin is not None and not begun:
        check_origin(origin, config)
    return origin


def _asked_or_remembered(workdir: pathlib.Path, asked: str | pathlib.Path | None, begun: bool) -> Origin | None:
    there = _remembered_origin(workdir)
    if asked is None:
        return there
    origin = Origin(local_path(asked, "init_from"))
    if origin.workdir == workdir.absolute():
        raise ConfigError("init_from", str(asked), "must be another directory than workdir")
    if there is not None and there.workdir != origin.workdir:
        raise ConfigError("init_from", str(asked), f"must be {there.workdir}, from which the run in {workdir} started")
    if there is None and begun:
        allowed = f"needs a new workdir; {workdir} holds a run that began from scratch"
        raise ConfigError("init_from", str(asked), allowed)
    return there or origin


def check_origin(origin: Origin, config: RunConfig) -> None:
    """Refuses a run whose parameters do not have the same names and shapes.

    Raises:
      DataError: if the directory holds no run.
      ConfigError: naming the first parameter that differs, and the fields that make it so.
    """
    other = load_config(origin.workdir)
    check_size(origin.workdir, other.model, origin.step)
    there, here = _parameter_shapes(other), _parameter_shapes(config)
    for name in [*here, *there]:
        if there.get(name) == here.get(name):
            continue
        texts = [str(list(shapes[name])) if name in shapes else "missing" for shapes in (there, here)]
        fields = [f"model.{field}" for field in SHAPES]
        lines = [line for line in differences(other, config) if line.split(":")[0] in fields]
        allowed = f"parameter {name} is {texts[0]} there and {texts[1]} here; must agree in {', '.join(lines)}"
        raise ConfigError("init_from", str(origin.workdir), allowed)


def initial_params(origin: Origin, run: Run) -> tuple[int, Any]:
    """The parameters that a run starts from, in its own dtype and shardings, and the step they are of.

    Raises:
      DataError: if the directory holds no checkpoint that can be used.
    """
    name = load_tokenizer(origin.workdir).name
    if name != run.tokenizer.name:
        say(f"init_from: tokenizer {name!r} there, {run.tokenizer.name!r} here; equal ids may mean different texts")
    abstract = run.abstract_state.params
    step, params = restore_params(origin.workdir, abstract, origin.step)
    cast = jax.jit(
        lambda tree: jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), tree, abstract),
        out_shardings=run.shardings.params,
    )
    return step, cast(params)


def remember_origin(origin: Origin, workdir: pathlib.Path) -> None:
    """Writes the origin into the working directory.

    Raises:
      DataError: if that cannot be written.
    """
    try:
        write_text(workdir / ORIGIN_FILE, json.dumps({"workdir": str(origin.workdir), "step": origin.step}) + "\n")
    except OSError as error:
        raise DataError(f"workdir {workdir}: {ORIGIN_FILE} cannot be written ({error.strerror})") from None


def _remembered_origin(workdir: pathlib.Path) -> Origin | None:
    path = workdir / ORIGIN_FILE
    if not path.exists():
        return None
    try:
        values = read_json(path)
        return Origin(local_path(values["workdir"], "init_from"), int(values["step"]))
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError(f"{path}: cannot be read, or is damaged; it names the run that this one started from") from None


def _parameter_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters."""
    init = build_model(config.model).init
    params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(str(key.key) for key in path): leaf.shape for path, leaf in leaves}
