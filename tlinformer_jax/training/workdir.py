"""A run's working directory: its lock, the check that it belongs to this run, its files, and the run's origin.

A run started with `--init_from=WORKDIR` takes another run's parameters, of an architecture with equal layers. Step 0 is
saved at once, so that the run can later continue, with the same command, without the other directory.
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
from flax.traverse_util import flatten_dict, unflatten_dict

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.config.run import CONFIG_FILE, RunConfig, differences, load_config, save_config
from tlinformer_jax.data.tasks import Split, TaskSplit
from tlinformer_jax.data.tokenizers import TOKENIZER_FILE, Tokenizer, load_tokenizer, save_tokenizer
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.files import local_path, open_own, read_json, write_text, writing
from tlinformer_jax.interop.reference import layer_names
from tlinformer_jax.models.model import parameter_shapes
from tlinformer_jax.training.checkpoint import existing_folder, restore_params
from tlinformer_jax.training.console import say
from tlinformer_jax.training.setup import Run

LOCK_FILE = ".lock"
TEXTS_FILE = "texts.json"  # split -> SHA-256 of its tokens at the last training in this directory
ORIGIN_FILE = "init_from.json"
# The model's fields that decide names and shapes of parameters.
SHAPES = (
    *("architecture", "vocab_size", "d_model", "num_heads", "num_blocks", "hidden_depth", "d_ff"),
    *("num_experts", "token_shift", "key_taps"),
)
# Parameters whose initial values have no effect, so the origin may lack them.
NEUTRAL = ("shift", "taps")
# The model's fields that decide only how it is computed.
EXECUTION = ("dtype", "attention", "memory")
# A run continues only with the same values of these fields, and not across a change to or from the paper's schedule.
IDENTITY = (
    *(f"model.{field.name}" for field in dataclasses.fields(ModelConfig) if field.name not in EXECUTION),
    *("data.dataset", "data.sequence_length", "data.curriculum", "data.examples", "data.num_items"),
    *("data.document_masking", "train.batch_size", "train.sampled_windows", "train.seed", "train.optimizer"),
    *("train.clip_norm", "train.ema"),
)


# ---- The lock


@contextlib.contextmanager
def sole_run(workdir: pathlib.Path, name: str = LOCK_FILE) -> Iterator[None]:
    """Holds the working directory's lock; process 0 holds it for all processes of a run.

    The system releases the lock when the process ends. The file `name`, which names the holder, stays.
    """
    if jax.process_index() != 0:
        yield
        return
    with contextlib.ExitStack() as stack:
        with writing(f"workdir {workdir}: {name}"):
            file = stack.enter_context(open_own(workdir / name, "a+"))
            _lock(file, workdir)
            # Written without the file's buffer, which would raise a second error when the file is closed.
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on host {platform.node()}\n".encode())
        yield


def _lock(file: Any, workdir: pathlib.Path) -> None:
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


# ---- The check that the directory belongs to this run


def check_workdir(run: Run, splits: Mapping[str, Split], workdir: pathlib.Path) -> None:
    """Creates the directory, or checks that it holds the same run."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError("workdir", str(workdir), f"must be a directory that can be written ({error})") from None
    if not (workdir / CONFIG_FILE).exists():
        return
    before = load_config(workdir)
    changed = differences(before, run.config)
    schedule = before.train.equal_updates != run.config.train.equal_updates
    fields = (*IDENTITY, "train.schedule") if schedule else IDENTITY
    if other := [line for line in changed if line.split(":")[0] in fields]:
        raise ConfigError("workdir", str(workdir), f"holds a run with another configuration: {'; '.join(other)}")
    for line in changed:
        say(f"changed since the last run here: {line}")
    tell_changed_texts(splits, workdir)


def check_tokenizer(tokenizer: Tokenizer, name: str, workdir: pathlib.Path) -> None:
    """Checks that a run in the working directory has the same tokenizer."""
    if not any((workdir / file).exists() for file in (CONFIG_FILE, TOKENIZER_FILE)):
        return
    there = load_tokenizer(workdir).name
    if there != tokenizer.name:
        allowed = f"must be the tokenizer of the run in {workdir}, {there!r}; its content is that of {tokenizer.name!r}"
        raise ConfigError("data.tokenizer", name, allowed)


def tell_changed_texts(splits: Mapping[str, Split], workdir: pathlib.Path) -> None:
    """Prints which splits have changed since the last training in this directory."""
    path = workdir / TEXTS_FILE
    try:
        recorded = dict(read_json(path))
    except FileNotFoundError:
        return  # converted weights, or a run that stopped before its first step
    except (OSError, ValueError, TypeError) as error:
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({why}); without this file no texts are compared") from None
    for name, text in _text_hashes(splits).items():
        if recorded.get(name, text) != text:
            say(f"changed since the last run here: the text of the {name} split; it has other samples now")


def _text_hashes(splits: Mapping[str, Split]) -> dict[str, str]:
    """Returns split -> hash of its tokens, for the splits that are read from files."""
    texts = {
        name: getattr(split.task, "text", None) if isinstance(split, TaskSplit) else split
        for name, split in splits.items()
    }
    return {name: text.sha256 for name, text in texts.items() if text is not None}


def save_description(run: Run, splits: Mapping[str, Split], workdir: pathlib.Path) -> None:
    """Writes the configuration, the texts' hashes, and the tokenizer if the directory has none."""
    with writing(f"workdir {workdir}: its configuration"):
        if not (workdir / TOKENIZER_FILE).exists():  # `check_tokenizer` has compared an existing one
            save_tokenizer(run.tokenizer, workdir)
        write_text(workdir / TEXTS_FILE, json.dumps(_text_hashes(splits), indent=1) + "\n")
        save_config(run.config, workdir)


# ---- The run's origin


@dataclasses.dataclass(frozen=True)
class Origin:
    """Another run's directory, and a step of it (None: the newest intact one)."""

    workdir: pathlib.Path
    step: int | None = None


def find_origin(config: RunConfig, workdir: pathlib.Path, asked: str | pathlib.Path | None) -> Origin | None:
    """Returns the recorded origin, or the one that --init_from asks for; None if the run starts from scratch."""
    origin, begun = _remembered_origin(workdir), (workdir / CONFIG_FILE).exists()
    if asked is not None:
        wanted, allowed = local_path(asked, "init_from"), None
        if wanted == workdir.absolute():
            allowed = "must not be workdir itself"
        elif origin is not None and origin.workdir != wanted:
            allowed = f"must be {origin.workdir}, from which the run in {workdir} started"
        elif origin is None and begun:
            allowed = f"needs a new workdir; {workdir} holds a run that began from scratch"
        if allowed:
            raise ConfigError("init_from", str(asked), allowed)
        origin = origin or Origin(wanted)
    if origin is not None and not begun:
        check_origin(origin, config)
    return origin


def check_origin(origin: Origin, config: RunConfig) -> None:
    """Checks that the origin's parameters have the same names and shapes; an error names the first difference."""
    other = load_config(origin.workdir)
    existing_folder(origin.workdir)
    layers = _same_layers(other, config)
    there = {_renamed(name, layers): shape for name, shape in _parameter_shapes(other).items()}
    here = _parameter_shapes(config)
    for name in [*here, *there]:
        if there.get(name) == here.get(name) or (name.split("/")[-1] in NEUTRAL and name not in there):
            continue
        texts = [str(list(shapes[name])) if name in shapes else "missing" for shapes in (there, here)]
        fields = [f"model.{field}" for field in SHAPES]
        lines = [line for line in differences(other, config) if line.split(":")[0] in fields]
        # Architectures of equal layers may differ, so this field is the reason only if it is the one difference.
        lines = [line for line in lines if not line.startswith("model.architecture")] or lines
        allowed = f"parameter {name} is {texts[0]} there and {texts[1]} here; must agree in {', '.join(lines)}"
        raise ConfigError("init_from", str(origin.workdir), allowed)


def _same_layers(one: RunConfig, other: RunConfig) -> dict[str, str]:
    """Maps the path of each layer's parameters in one model to its path in the other."""
    paths = [["/".join(path) for path, _ in layer_names(config.model)] for config in (one, other)]
    return dict(zip(*paths))


def _renamed(name: str, layers: Mapping[str, str]) -> str:
    """Returns a parameter's path in the other model."""
    layer, slash, own = name.rpartition("/")
    return layers.get(layer, layer) + slash + own


def _parameter_shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in flatten_dict(parameter_shapes(config.model), sep="/").items()}


def initial_params(origin: Origin, run: Run, fresh: Any) -> tuple[int, Any]:
    """Returns the origin's step and its parameters; a parameter that the origin lacks is taken from `fresh`."""
    name = load_tokenizer(origin.workdir).name
    if name != run.tokenizer.name:
        say(f"init_from: its tokenizer is {name!r}, that of this run {run.tokenizer.name!r}; ids may differ in meaning")
    abstract, other = run.abstract_state.params, load_config(origin.workdir)
    layers = _same_layers(run.config, other)
    if any(ours != theirs for ours, theirs in layers.items()):
        say(f"init_from: layers there -> here: {', '.join(f'{there} -> {here}' for here, there in layers.items())}")
    there = _parameter_shapes(other)
    wanted = {_renamed(name, layers): leaf for name, leaf in flatten_dict(abstract, sep="/").items()}
    known = {name: leaf for name, leaf in wanted.items() if name in there}
    step, found = restore_params(origin.workdir, unflatten_dict(known, sep="/"), origin.step)
    own, found = flatten_dict(fresh, sep="/"), flatten_dict(found, sep="/")
    params = unflatten_dict({name: found.get(_renamed(name, layers), leaf) for name, leaf in own.items()}, sep="/")
    return step, jax.device_put(params, run.shardings.params)


def remember_origin(origin: Origin, workdir: pathlib.Path) -> None:
    """Records the origin in the working directory."""
    with writing(f"workdir {workdir}: {ORIGIN_FILE}"):
        write_text(workdir / ORIGIN_FILE, json.dumps({"workdir": str(origin.workdir), "step": origin.step}) + "\n")


def _remembered_origin(workdir: pathlib.Path) -> Origin | None:
    path = workdir / ORIGIN_FILE
    if not path.exists():
        return None
    try:
        values = read_json(path)
        return Origin(local_path(values["workdir"], "init_from"), int(values["step"]))
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError(f"{path}: cannot be read, or is damaged; it names the run that this one started from") from None
