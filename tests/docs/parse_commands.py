"""Checks the commands of pages without running them: `python -m tests.docs.parse_commands < COMMANDS`.

A line of the input is a command. Each is parsed in a process of its own, since flags are global: its flags must exist,
and the configuration that it names must be allowed. Prints a line for each command that is wrong; the status is their
number.
"""

import importlib
import os
import re
import shlex
import sys
import tomllib

from tests.docs.blocks import ROOT
from tests.support.forks import import_what_commands_import

# Commands of the system, scripts that tests/launch runs, and what has flags of its own kind.
OTHERS = (
    "source",
    "sudo apt-get install",
    "python3 -m venv",
    "sbatch",
    "launch/",
    "mkdocs",
    "python -m tlinformer_jax.interop.harness",
)


def module_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The module that a command runs, and its arguments; None if it runs no module of ours."""
    from tlinformer_jax.__main__ import _HOMES

    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    if words[0] == "tlinformer":
        return _HOMES[words[1]], words[2:]
    if words[0].endswith("python") and words[1] == "-m":
        if words[2] == "tlinformer_jax":
            return _HOMES[words[3]], words[4:]
        if words[2].split(".")[0] in ("benchmarks", "tools") or words[2] == "tlinformer_jax.main":
            return words[2], words[3:]
    return None


def parse(command: str) -> None:
    """Parses a command as it would before it does anything."""
    words = shlex.split(command)
    if words[0].endswith("pip"):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for names in re.findall(r"\.\[(.*?)\]", command):
            assert set(names.split(",")) <= set(extras), f"no extra {names}"
        return
    found = module_of(words)
    if found is None:
        assert command.startswith(OTHERS) or words[1:3] == ["-m", "pytest"], "is no command that is known here"
        return
    from absl import flags

    from tlinformer_jax.commands import cli

    name, sys.argv = found[0], [words[0], *found[1]]
    module = importlib.import_module(name)
    if hasattr(module, "define_flags"):
        module.define_flags()
    elif name.startswith("tools.") and "config" not in flags.FLAGS:
        cli.define_config_flag()  # as those do that are run as scripts
    left = flags.FLAGS(sys.argv)[1:]
    assert len(left) == len(getattr(module, "ARGUMENTS", ())), f"takes no {left}"
    if "config" in flags.FLAGS and "sweep" not in flags.FLAGS:
        from tlinformer_jax.config.run import run_config

        if flags.FLAGS["config"].value is not None:
            run_config(cli.config_values())


def main() -> int:
    """Parses all, each in a fork of a process that has imported what most of them import."""
    import_what_commands_import()
    failed = 0
    for command in sys.stdin.read().splitlines():
        sys.stdout.flush()
        child = os.fork()
        if not child:
            try:
                parse(command)
            except BaseException as error:
                print(f"{command}: {type(error).__name__}: {error}", flush=True)
                os._exit(1)
            os._exit(0)
        failed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
