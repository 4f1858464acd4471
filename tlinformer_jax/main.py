"""Trains a model: `python -m tlinformer_jax.main --config=FILE --workdir=DIR [--config.FIELD=VALUE ...]`."""

from absl import flags
from ml_collections import config_flags

from tlinformer_jax import cli

config_flags.DEFINE_config_file("config", None, "Config file; FILE:VARIANT picks a variant.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", "", "Directory of the run: configuration, metrics, checkpoints.")
PROFILE = flags.DEFINE_string("profile", "", "Directory for a trace of a few training steps, for xprof.")


def main() -> None:
    """Checks the whole configuration, then trains."""
    from tlinformer_jax.config import run_config
    from tlinformer_jax.training.loop import train_and_evaluate
    from tlinformer_jax.training.setup import use_compilation_cache

    config = run_config(cli.config_values())
    workdir = cli.writable_workdir(WORKDIR.value)
    use_compilation_cache()
    train_and_evaluate(config, workdir, cli.writable_workdir(PROFILE.value, "--profile") if PROFILE.value else None)


if __name__ == "__main__":
    cli.run(main)
