"""A run of a working directory, with the parameters that it has trained."""

import dataclasses
import pathlib

from tlinformer_jax.config.run import load_config
from tlinformer_jax.data.given import TokenData, given_loader
from tlinformer_jax.data.sources import load_stored_split
from tlinformer_jax.data.tokenizers import load_tokenizer
from tlinformer_jax.files import local_path
from tlinformer_jax.parallel.mesh import MeshConfig
from tlinformer_jax.training.checkpoint import check_size, restore_params
from tlinformer_jax.training.setup import LoadSplit, TrainedRun, build_run


def load_run(
    workdir: str | pathlib.Path, step: int | None = None, *, validation_data: TokenData | None = None
) -> TrainedRun:
    """A run of a working directory with its newest good checkpoint's parameters, or those of `step`, on all devices.

    `validation_data` takes the place of the configuration's, as in `train_and_evaluate`.

    Raises:
      UserError: if the directory holds no run, no checkpoint or no tokenizer that fits.
    """
    workdir = local_path(workdir, "workdir")
    # Any machine will do, whatever mesh the training had.
    config = dataclasses.replace(load_config(workdir), mesh=MeshConfig())
    check_size(workdir, config.model, step)
    load: LoadSplit = load_stored_split
    if validation_data is not None:
        load = given_loader({"validation": validation_data}, config.model.vocab_size)
    run = dataclasses.replace(build_run(config, load_tokenizer(workdir)), load_split=load)
    step, params = restore_params(workdir, run.abstract_state.params, step)
    return TrainedRun(run, params, step)
