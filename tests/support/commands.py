"""The commands as a user types them, in a process of their own."""

import functools
import json
import os
import pathlib
import subprocess
import sys

from tests.support.compilation import quick_flags

ROOT = pathlib.Path(__file__).parents[2]
# In place of a config's own text: a short one, of which an evaluation takes little time.
TEXT_FILE = ROOT / "tests" / "support" / "text.txt"
TEXT = (
    "--config.data.dataset=text",
    *(f"--config.data.{split}_files={TEXT_FILE}" for split in ("train", "validation")),
)
# Seconds; against what hangs, on a machine that may be busy with other work.
TIMEOUT = 1200


def command_line(module: str, *arguments: str, blocked: tuple[str, ...] = ()) -> tuple[list[str], dict[str, str]]:
    """What starts a module on one CPU device, and its environment; imports of `blocked` packages fail."""
    hide = "".join(f"sys.modules[{name!r}] = None; " for name in blocked)
    # Tests that a shell runs in the background would hand down that Ctrl-C is ignored.
    hide += "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    hide += "import gc; gc.set_threshold(100_000, 20, 20); "  # as in conftest.py
    if "." not in module:  # a command of `python -m tlinformer_jax`
        module, arguments = "tlinformer_jax", (module, *arguments)
    script = f"import sys; {hide}import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"
    environment = os.environ | {"XLA_FLAGS": quick_flags(), "JAX_PLATFORMS": "cpu"}
    return [sys.executable, "-c", script, *arguments], {
        **environment,
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache")),
    }


def command(
    module: str, *arguments: str, blocked: tuple[str, ...] = (), many_steps: bool = False
) -> subprocess.CompletedProcess:
    """Runs a module on one CPU device; imports of `blocked` packages fail as if they were not installed.

    With `many_steps` XLA takes more time to make the program fast, which pays for a run of hundreds of them.
    """
    line, environment = command_line(module, *arguments, blocked=blocked)
    return run_line(line, environment | {"XLA_FLAGS": quick_flags(many_steps)})


def in_forks(cases: list[tuple[str, list[str]]]) -> list[subprocess.CompletedProcess]:
    """Runs modules or commands with their arguments, each in a fork of one process, which imports only once."""
    process, (_, environment) = _forking(), command_line("tests.support.forks")
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps([environment, cases]) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer, f"the process that forks has ended with status {process.wait()}"
    found = json.loads(answer)
    return [subprocess.CompletedProcess(case[1], *result) for case, result in zip(cases, found, strict=True)]


def in_fork(command: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs one module or command in such a fork."""
    return in_forks([(command, list(arguments))])[0]


@functools.cache
def _forking() -> subprocess.Popen:
    """The process that forks, for all tests of this one; it ends when its input does, with this process."""
    line, environment = command_line("tests.support.forks")
    return subprocess.Popen(line, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def run_line(line: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess:
    """Runs what `command_line` returned, perhaps changed, in the project's directory."""
    return subprocess.run(
        line, cwd=ROOT, env=environment, input="", capture_output=True, text=True, check=False, timeout=TIMEOUT
    )


def check_refusal(result: subprocess.CompletedProcess, message: str) -> None:
    """One line on stderr that says `message`, and status 2."""
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
