"""Commands in forks of one process: `python -m tests.support.forks`.

The process imports once what commands import, which is most of the time that a refusal takes. Each line of its input is
JSON: [environment, cases], where a case is [command, arguments]. It answers with a line: a JSON list of [status,
stdout, stderr].
"""

import gc
import json
import os
import pathlib
import runpy
import signal
import sys
import tempfile
import traceback

from tests.support.commands import ROOT, TIMEOUT


def forked(
    command: str, arguments: list[str], folder: pathlib.Path, environment: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """Status, stdout and stderr of `python -m COMMAND ARGUMENTS`, or of a command of `python -m tlinformer_jax`.

    In `environment`, if given; but JAX and what else is imported has read its variables before.
    """
    outputs = [folder / ".out", folder / ".err"]
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(TIMEOUT)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the next cases are not the command's input
            for number, path in enumerate(outputs, 1):
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
            os.chdir(ROOT)
            if environment is not None:
                os.environ.clear()
                os.environ.update(environment)
            module = command if "." in command else "tlinformer_jax"  # a benchmark or tool, or a command of ours
            sys.argv = [module, *([] if "." in command else [command]), *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, code = os.waitpid(pid, 0)
    out, err = (path.read_text(encoding="utf-8", errors="replace") for path in outputs)
    for path in outputs:
        path.unlink()
    return os.waitstatus_to_exitcode(code), out, err


def import_what_commands_import() -> None:
    """All but the use of JAX, after which a process must not be forked."""
    import ml_collections.config_flags  # noqa: F401
    from jax._src import xla_bridge

    import tlinformer_jax.decoding.generator
    import tlinformer_jax.evaluation.report
    import tlinformer_jax.experiments.driver
    import tlinformer_jax.experiments.report
    import tlinformer_jax.training.check
    import tlinformer_jax.training.conversion
    import tlinformer_jax.training.loop  # noqa: F401

    assert not xla_bridge._backends, "a process that has used JAX must not be forked"
    gc.freeze()  # or a fork's collections would copy all memory


if __name__ == "__main__":
    import_what_commands_import()
    for request in sys.stdin:
        environment, cases = json.loads(request)
        with tempfile.TemporaryDirectory() as outputs:
            print(json.dumps([forked(*case, pathlib.Path(outputs), environment) for case in cases]), flush=True)
