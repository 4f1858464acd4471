"""Converts published weights to a working directory, and a working directory to published weights."""

import os
import pathlib
import shutil

import jax

from tlinformer_jax.analysis.flops import num_parameters
from tlinformer_jax.config.run import RunConfig, load_config, save_config
from tlinformer_jax.data.tokenizers import build_tokenizer, save_tokenizer
from tlinformer_jax.errors import DataError, UserError
from tlinformer_jax.files import writing
from tlinformer_jax.interop.files import SAFETENSORS, read_weights, write_safetensors
from tlinformer_jax.interop.reference import params_from_reference, params_to_reference
from tlinformer_jax.training.checkpoint import load_params
from tlinformer_jax.training.saving import Checkpoints
from tlinformer_jax.training.setup import build_run


def weights_to_workdir(source: pathlib.Path, config: RunConfig, workdir: pathlib.Path) -> str:
    """Creates a new working directory, at step 0, from published weights."""
    workdir = workdir.absolute()
    try:
        if workdir.exists() and (not workdir.is_dir() or any(workdir.iterdir())):
            raise DataError(f"workdir {workdir}: must be a new or an empty directory")
    except OSError as error:
        raise DataError(f"workdir {workdir}: cannot be read ({error.strerror or error})") from None
    run = build_run(config, build_tokenizer(config.data.tokenizer))
    arrays = read_weights(source)
    try:
        params = params_from_reference(arrays, config.model)["params"]
    except DataError as error:
        raise DataError(f"{source}: {error}") from None
    with writing(f"workdir {workdir}:"):
        workdir.parent.mkdir(parents=True, exist_ok=True)
        draft = workdir.with_name(f".{workdir.name}.{os.getpid()}.draft")
        try:
            draft.mkdir()
            state = run.initial_state().starting_from(jax.device_put(params, run.shardings.params))
            with Checkpoints(draft, keep=1) as checkpoints:
                checkpoints.save(state)
            save_tokenizer(run.tokenizer, draft)
            save_config(run.config, draft)
            draft.rename(workdir)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return f"{workdir}: {config.model.architecture}, {num_parameters(config.model):,} parameters, step 0, from {source}"


def workdir_to_weights(workdir: pathlib.Path, target: pathlib.Path) -> str:
    """Writes the last checkpoint's parameters as float32 under the published names."""
    if target.suffix != SAFETENSORS:
        raise UserError(f"--to={target}: must end in {SAFETENSORS}")
    config = load_config(workdir).model
    step, params = load_params(workdir, config)
    write_safetensors(target, params_to_reference({"params": params}, config), config)
    return f"{target}: {config.architecture}, {num_parameters(config):,} parameters, step {step} of {workdir}"
