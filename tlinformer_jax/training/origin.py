"""A run that starts from another run's parameters: `--init_from=WORKDIR`; optimiser and step are those of a new run.

The working directory remembers where its parameters came from, and step 0 is saved at once: the other directory is
needed no more, and the same command, with or without the flag, goes on.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from tlinformer_jax.config import RunConfig, differences, load_config
from tlinformer_jax.data.tokenizers import load_tokenizer
from tlinformer_jax.errors import ConfigError, DataError
from tlinformer_jax.files import local_path, read_json, write_text
from tlinformer_jax.models.model import build_model
from tlinformer_jax.training.checkpoint import check_size, restore_params
from tlinformer_jax.training.metrics import say
from tlinformer_jax.training.setup import Run

ORIGIN_FILE = "init_from.json"
# The fields of the model that decide the parameters' names and shapes.
SHAPING = ("architecture", "vocab_size", "d_model", "num_heads", "num_blocks", "hidden_depth", "d_ff")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a run's first parameters come from.

    Attributes:
      workdir: of the other run, absolute.
      step: of its checkpoint; None for the newest good one.
    """

    workdir: pathlib.Path
    step: int | None = None


def find_origin(workdir: pathlib.Path, asked: str | pathlib.Path | None, begun: bool) -> Origin | None:
    """The origin that a working directory remembers, or the one asked for; None for a run from scratch.

    Args:
      workdir: of the run.
      asked: --init_from, or None.
      begun: whether `workdir` holds a run already.

    Raises:
      ConfigError: if the directory holds a run of another origin than the one asked for.
      DataError: if what it remembers cannot be read.
    """
    there = _remembered(workdir)
    if asked is None:
        return there
    origin = Origin(local_path(asked, "init_from"))
    if origin.workdir == workdir.absolute():
        raise ConfigError("init_from", str(asked), "must be another directory than workdir")
    if there is not None and there.workdir != origin.workdir:
        raise ConfigError("init_from", str(asked), f"must be {there.workdir}, from which the run in {workdir} started")
    if there is None and begun:
        raise ConfigError(
            "init_from", str(asked), f"needs a new workdir; {workdir} holds a run that began from scratch"
        )
    return there or origin


def check_origin(origin: Origin, config: RunConfig) -> None:
    """Refuses a run whose parameters do not have the same names and shapes.

    Raises:
      DataError: if the directory holds no run.
      ConfigError: naming the first parameter that differs, and the fields that make it so.
    """
    other = load_config(origin.workdir)
    check_size(origin.workdir, other.model, origin.step)
    there, here = _shapes(other), _shapes(config)
    for name in [*here, *there]:
        if there.get(name) == here.get(name):
            continue
        fields = [f"model.{field}" for field in SHAPING]
        lines = [line for line in differences(other, config) if line.split(":")[0] in fields]
        raise ConfigError(
            "init_from",
            str(origin.workdir),
            f"parameter {name} is {_shape(there.get(name))} there and {_shape(here.get(name))} here; "
            f"must agree in {', '.join(lines)}",
        )


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


def _remembered(workdir: pathlib.Path) -> Origin | None:
    path = workdir / ORIGIN_FILE
    if not path.exists():
        return None
    try:
        values = read_json(path)
        return Origin(local_path(values["workdir"], "init_from"), int(values["step"]))
    except (OSError, ValueError, TypeError, KeyError):
        raise DataError(f"{path}: cannot be read, or is damaged; it names the run that this one started from") from None


def _shapes(config: RunConfig) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters."""
    init = build_model(config.model).init
    params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(str(key.key) for key in path): leaf.shape for path, leaf in leaves}


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))
