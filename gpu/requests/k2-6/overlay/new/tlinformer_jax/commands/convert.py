"""Converts weights: a published checkpoint into a working directory, or the other way round.

    python -m tlinformer_jax convert --from=FILE.pt|FILE.safetensors --config=FILE --workdir=DIR
    python -m tlinformer_jax convert --workdir=DIR --to=FILE.safetensors

The config file describes the weights: its section `model` must fit them, and its section `data` names the tokenizer,
and the text for `evaluate`. No content of a weights file is executed. Results appear complete or not at all.
"""

from absl import flags

from tlinformer_jax.commands import cli
from tlinformer_jax.config.run import run_config
from tlinformer_jax.errors import UserError
from tlinformer_jax.files import local_path

cli.define_config_flag("Config file of the weights given by --from.")
FROM = flags.DEFINE_string("from", "", "Weights to read: .pt or .pth of torch.save, or .safetensors.")
TO = flags.DEFINE_string("to", "", "Weights to write: a new .safetensors file.")
WORKDIR = flags.DEFINE_string("workdir", "", "Directory of a run: new for --from, read for --to.")


def main() -> None:
    """Converts in the direction that the flags give."""
    if bool(FROM.value) == bool(TO.value):
        raise UserError("--from, --to: give one of them: the weights to read, or the file to write")
    workdir = cli.given_path(WORKDIR, "a directory")
    from tlinformer_jax.training.conversion import weights_to_workdir, workdir_to_weights

    if FROM.value:
        print(weights_to_workdir(local_path(FROM.value, "--from"), run_config(cli.config_values()), workdir))
    elif cli.config_given():
        raise UserError("--config: must be left out with --to; the working directory has its own configuration")
    else:
        print(workdir_to_weights(workdir, local_path(TO.value, "--to")))
