"""The flag --config of the benchmarks, which is optional."""

import sys

from tlinformer_jax.commands import cli


def define_config_flag() -> None:
    """Defines --config only if the command line has it, so that ml_collections is needed only then."""
    if not any(argument.lstrip("-").split("=")[0].split(".")[0] == "config" for argument in sys.argv[1:]):
        return
    try:
        cli.define_config_flag()
    except ImportError:
        cli.fail("--config: config files need the package ml_collections, which is not installed")
