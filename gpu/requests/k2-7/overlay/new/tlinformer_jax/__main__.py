"""Runs `python -m tlinformer_jax COMMAND [flags]`, also installed as the console script `tlinformer`."""

import importlib
import sys
from typing import NoReturn

from tlinformer_jax.errors import did_you_mean

_HOMES = {
    "train": "tlinformer_jax.main",
    "check": "tlinformer_jax.main",
    "evaluate": "tlinformer_jax.commands.evaluate",
    "generate": "tlinformer_jax.commands.generate",
    "prepare": "tlinformer_jax.commands.prepare",
    "convert": "tlinformer_jax.commands.convert",
    "sweep": "tlinformer_jax.commands.sweep",
    "report": "tlinformer_jax.commands.report",
    "history": "tlinformer_jax.commands.history",
}


def run() -> NoReturn:
    """Runs the command that the first argument names; the command's own `--help` lists its flags."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(f"usage: tlinformer COMMAND [flags]; COMMAND is one of {', '.join(_HOMES)}")
        sys.exit(0)
    if name not in _HOMES:
        print(f"error: {name}: must be one of {', '.join(_HOMES)}{did_you_mean(name, _HOMES)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"tlinformer {name}", *(["--check"] if name == "check" else []), *sys.argv[2:]]
    command = importlib.import_module(_HOMES[name])
    from absl.flags import FLAGS

    from tlinformer_jax.commands import cli

    if hasattr(command, "define_flags"):  # flags that depend on the command line
        command.define_flags()
    if {"-h", "--help", "--helpshort"} & set(sys.argv[1:]):  # absl's help would describe this module, without flags
        print("\n".join([command.__doc__ or "", *(FLAGS.module_help(module) for module in (command, cli))]))
        sys.exit(0)
    cli.run(command.main)


if __name__ == "__main__":
    run()
