"""Converts weights: a published checkpoint into a working directory, or the other way round.

    python -m tlinformer_jax.convert --from=FILE.pt|FILE.safetensors --config=FILE --workdir=DIR
    python -m tlinformer_jax.convert --workdir=DIR --to=FILE.safetensors

The config file says what the weights are of: its section `model` must fit them, its section `data` names the tokenizer
and the text that `evaluate` reads. Nothing of the weights' file is ever executed, and what a command leaves is whole:
it appears under its name when it is complete, or not at all.
"""

import os
import pathlib
import shutil
from typing import TYPE_CHECKING, Any

from absl import flags
from ml_collections import config_flags

from tlinformer_jax import cli
from tlinformer_jax.errors import DataError, UserError

if TYPE_CHECKING:
    from tlinformer_jax.config import RunConfig

config_flags.DEFINE_config_file("config", None, "Config file of the weights given by --from.", lock_config=True)
FROM = flags.DEFINE_string("from", "", "Weights to read: .pt or .pth of torch.save, or .safetensors.")
TO = flags.DEFINE_string("to", "", "Weights to write: a new .safetensors file.")
WORKDIR = flags.DEFINE_string("workdir", "", "Directory of a run: new for --from, read for --to.")


def main() -> None:
    """Converts in the direction that the flags tell."""
    if bool(FROM.value) == bool(TO.value):
        raise UserError("--from, --to: give one of them: the weights to read, or the file to write")
    if not WORKDIR.value:
        raise UserError("--workdir: must name a directory")
    workdir = pathlib.Path(WORKDIR.value).expanduser()
    if FROM.value:
        from tlinformer_jax.config import run_config

        print(weights_to_workdir(pathlib.Path(FROM.value).expanduser(), run_config(cli.config_values()), workdir))
    elif cli.config_given():
        raise UserError("--config: must be left out with --to; the working directory has its own configuration")
    else:
        print(workdir_to_weights(workdir, pathlib.Path(TO.value).expanduser()))


def weights_to_workdir(source: pathlib.Path, config: "RunConfig", workdir: pathlib.Path) -> str:
    """Makes a working directory, at step 0, of published weights.

    Args:
      source: a .pt, .pth or .safetensors file.
      config: of the model, its tokenizer and its data.
      workdir: must not exist, or be empty.

    Returns:
      what was written, in a line.

    Raises:
      DataError: if the file cannot be used, does not fit the model, or the directory cannot be made.
      ConfigError: if the tokenizer is not there or does not fit.
    """
    from tlinformer_jax.data.tokenizers import build_tokenizer
    from tlinformer_jax.interop.files import read_weights
    from tlinformer_jax.interop.reference import params_from_reference
    from tlinformer_jax.training.setup import build_run

    workdir = workdir.absolute()
    _check_new(workdir)
    run = build_run(config, build_tokenizer(config.data.tokenizer, config.data.end_of_text_token))
    arrays = read_weights(source)
    try:
        params = params_from_reference(arrays, config.model)["params"]
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    try:
        workdir.parent.mkdir(parents=True, exist_ok=True)
        draft = workdir.with_name(f".{workdir.name}.{os.getpid()}.draft")
        try:
            draft.mkdir()
            _fill(draft, run, params)
            draft.rename(workdir)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise DataError(f"workdir {workdir}: cannot be written ({error.strerror or error})") from None
    return f"{workdir}: {config.model.architecture}, {_size(params):,} parameters, step 0, from {source}"


def workdir_to_weights(workdir: pathlib.Path, target: pathlib.Path) -> str:
    """Writes the last checkpoint's parameters as float32 under the published names; returns a line that says so.

    Raises:
      DataError: if the directory holds no checkpoint, or the file exists, cannot be written or has a wrong ending.
    """
    import jax
    import jax.numpy as jnp

    from tlinformer_jax.config import load_config
    from tlinformer_jax.interop.files import SAFETENSORS, write_safetensors
    from tlinformer_jax.interop.reference import params_to_reference
    from tlinformer_jax.models.model import build_model
    from tlinformer_jax.training.checkpoint import restore_params

    if target.suffix != SAFETENSORS:
        raise UserError(f"--to={target}: must end in {SAFETENSORS}")
    config = load_config(workdir).model
    shapes = jax.eval_shape(build_model(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes)
    step, params = restore_params(workdir, abstract)
    write_safetensors(target, params_to_reference({"params": params}, config))
    return f"{target}: {config.architecture}, {_size(params):,} parameters, step {step} of {workdir}"


def _check_new(workdir: pathlib.Path) -> None:
    try:
        if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
            raise DataError(f"workdir {workdir}: must be a new or an empty directory")
    except OSError as error:
        raise DataError(f"workdir {workdir}: cannot be read ({error.strerror or error})") from None


def _fill(directory: pathlib.Path, run: Any, params: Any) -> None:
    """Writes configuration, tokenizer and checkpoint; the optimiser is as before the first update."""
    import jax

    from tlinformer_jax.config import save_config
    from tlinformer_jax.training.checkpoint import Checkpoints

    state = run.initial_state().replace(params=jax.device_put(params, run.shardings.params))
    with Checkpoints(directory, keep=1) as checkpoints:
        checkpoints.save(state)
    run.tokenizer.save(directory)
    save_config(run.config, directory)


def _size(params: Any) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))


if __name__ == "__main__":
    cli.run(main)
