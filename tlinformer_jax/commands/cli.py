"""Shared parts of all entry points: flags by absl; user errors as one line and exit status 2."""

import contextlib
import faulthandler
import functools
import logging as std_logging
import os
import pathlib
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags, logging

from tlinformer_jax import environment
from tlinformer_jax.config.named import add_defaults, load_python
from tlinformer_jax.config.run import unknown_field
from tlinformer_jax.errors import LARGEST_INTEGER, ConfigError, DataError, UserError, file_errors_as, first_line
from tlinformer_jax.files import local_path

if TYPE_CHECKING:
    from tlinformer_jax.parallel.processes import Cluster

FLAG_OF_OPTION = {"stop_strings": "stop"}  # options whose flag has another name


def run(main: Callable[..., None], arguments: Sequence[str] = ()) -> NoReturn:
    """Parses the flags, runs `main`, exits.

    `main` gets the arguments that are no flags; `arguments` names them, for messages. A `UserError` becomes one line on
    stderr, and its status the exit status. SIGTERM, SIGHUP and Ctrl-C, unless `main` handles them, are raised as
    exceptions, so that half-written files are removed; status 143, 129 and 130. SIGUSR2 prints the Python stacks of all
    threads to stderr: it tells where a command hangs.
    """

    def guarded(argv: Sequence[str]) -> None:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, _terminate)
        with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # stderr is closed or no file
            faulthandler.register(signal.SIGUSR2)
        sys.unraisablehook = _send_again
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # at INFO Orbax logs every file
            logging.get_absl_logger().addFilter(_not_reported_otherwise)
        std_logging.getLogger("asyncio").setLevel(std_logging.CRITICAL)  # its errors are reported as one line
        try:
            main(*argv[1:])
        except SystemExit:
            raise
        except BaseException as error:
            status, message = environment.status_and_message(error)
            if message is None:
                raise
            fail(message, status)

    environment.settle()
    app.run(guarded, flags_parser=functools.partial(_parse_flags, arguments=arguments))
    raise AssertionError("app.run returns through sys.exit")


def _not_reported_otherwise(record: Any) -> bool:
    """Returns False for tracebacks that Orbax both logs and raises: the raised ones become one line."""
    return not (record.exc_info and "orbax" in record.pathname)


def _terminate(number: int, _: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second signal must not interrupt the clean-up
    raise environment.Terminated(number)


def _send_again(lost: Any) -> None:
    """Sends a signal again if Python ignored its exception, for example during garbage collection."""
    number = signal.SIGINT if lost.exc_type is KeyboardInterrupt else getattr(lost.exc_value, "number", None)
    if number is None:
        if str(lost.exc_value) != "Event loop is closed":  # raised by Orbax after a failed save
            sys.__unraisablehook__(lost)
        return
    if number != signal.SIGINT:
        signal.signal(number, _terminate)
    # Later, since an exception raised here would be ignored again.
    threading.Timer(0.05, os.kill, (os.getpid(), number)).start()


def fail(message: str, status: int = 2) -> NoReturn:
    """Prints `message` on stderr and exits with `status`."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(status)


def print_result(text: str) -> None:
    """Prints what a command is run for; see `check_printed`. A training's messages may be lost."""
    print(text, flush=True)
    check_printed()


def check_printed() -> None:
    """Raises a UserError if part of a result was lost on a full disk.

    A reader that has ended, such as `head` or a closed terminal, wants no more: that is no error.
    """
    lost = getattr(sys.stdout, "lost", "")
    if lost and not getattr(sys.stdout, "unread", False):
        raise UserError(f"stdout: the result cannot be written ({lost})")


def run_flags() -> tuple[flags.FlagHolder[str], flags.FlagHolder[int | None]]:
    """Defines --workdir and --step, for commands that read a run."""
    workdir = flags.DEFINE_string("workdir", "", "Working directory of a run.")
    step = "Step of the checkpoint; the newest intact one if not given."
    return workdir, flags.DEFINE_integer("step", None, step, lower_bound=0)


def given_path(flag: flags.FlagHolder[str], what: str) -> pathlib.Path:
    """Returns the path that a flag names."""
    if not flag.value:
        raise UserError(f"--{flag.name}: must name {what}")
    return local_path(flag.value, f"--{flag.name}")


def integers(
    flag: flags.FlagHolder[Any], least: int = 0, most: int = LARGEST_INTEGER, parts: Sequence[str] | None = None
) -> tuple[int, ...]:
    """Returns the numbers of a list flag, or those of `parts` of it: at least one, each from `least` to `most`."""
    texts = flag.value if parts is None else parts
    with contextlib.suppress(ValueError):  # a number of more digits than Python reads
        numbers = tuple(int(text) for text in texts if text.isascii() and text.isdecimal())  # int also takes 1_000
        if len(numbers) == len(texts) > 0 and least <= min(numbers) and max(numbers) <= most:
            return numbers
    allowed = f"must be integers from {least} to {most}, separated by commas"
    raise UserError(f"--{flag.name}={','.join(flag.value)}: {allowed}")


@contextlib.contextmanager
def errors_by_flag() -> Iterator[None]:
    """Names a refused option of an evaluation or a generation by its flag, as the user wrote it."""
    try:
        yield
    except ConfigError as error:
        section, _, name = error.field.rpartition(".")
        name = FLAG_OF_OPTION.get(name, name)
        if section in ("evaluation", "generation", "sampling") and name in flags.FLAGS:
            raise UserError(f"--{name}={error.value}: {error.allowed}") from None
        raise


def writable_workdir(path: str, flag: str = "--workdir") -> pathlib.Path:
    """Creates the directory that `flag` names if needed; returns its absolute path."""
    if not path:
        raise UserError(f"{flag}: must name a directory")
    workdir = local_path(path, flag)
    with file_errors_as(f"{flag}={path}: must be a directory that can be written"):
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    return workdir


def writable_file(path: str, flag: str = "--out") -> pathlib.Path:
    """Returns the file that `flag` names; raises a UserError if it cannot be written. For checks before long work."""
    target = local_path(path, flag)
    with file_errors_as(f"{flag}={path}: must be a file that can be written"):
        if target.is_dir():
            raise UserError(f"{flag}={path}: must be a file, not a directory")
        draft = target.with_name(f".{target.name}.{os.getpid()}.draft")
        draft.write_bytes(b"")
        draft.unlink()
    return target


def text_of_file(path: str, flag: str) -> str:
    """Returns the text of the UTF-8 file that `flag` names, read like training text."""
    from tlinformer_jax.data.files import read_text

    try:
        text = read_text(local_path(path, flag))
    except DataError as error:
        raise UserError(f"{flag}={error}") from None
    if not text:
        raise UserError(f"{flag}={path}: must hold some text; it is empty")
    return text


def define_process_flags() -> None:
    """Defines the flags by which several processes find each other if no cluster manager starts them."""
    flags.DEFINE_string("coordinator_address", None, "HOST:PORT on which process 0 of several listens.")
    flags.DEFINE_integer("num_processes", None, "Number of processes that run together; 1 ignores a detected cluster.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")


def cluster() -> "Cluster | None":
    """Returns the processes that run together, by `define_process_flags` or the cluster manager; None for one."""
    from tlinformer_jax.parallel.processes import find_cluster

    values = flags.FLAGS
    return find_cluster(values.coordinator_address, values.num_processes, values.process_id)


def define_config_flag(
    help: str = "Config file, or the name of one of the package's; NAME:VARIANT picks a variant.",
    flag_values: flags.FlagValues = flags.FLAGS,
    sys_argv: list[str] | None = None,
) -> None:
    """Defines --config. Fields that the file leaves out get their defaults, so that flags can override them all.

    `sys_argv` is the command line, by default the program's, from which the names of the fields' flags are read.
    """
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, help, flag_values, lock_config=False, sys_argv=sys_argv)
    flag_values["config"].parser = _CompletedConfig()


class _CompletedConfig(flags.ArgumentParser):
    """A parser that reads a config file and adds the fields that it leaves out."""

    def parse(self, argument: str) -> Any:
        from ml_collections import ConfigDict

        config = load_python(argument, "--config", "get_config")
        if not isinstance(config, ConfigDict):
            fault = f"get_config must return a ml_collections.ConfigDict, not {type(config).__name__}"
            raise UserError(f"--config={argument}: {fault}")
        add_defaults(config)
        config.lock()
        return config

    def flag_type(self) -> str:
        return "config file"


def config_given() -> bool:
    """Returns whether the flag --config was defined and given."""
    return "config" in flags.FLAGS and flags.FLAGS.config is not None


def config_values() -> Any:
    """Returns the config that --config has loaded."""
    if flags.FLAGS.config is None:
        raise UserError("--config: must name a config file, or one of the package's, such as tiny")
    return flags.FLAGS.config


def _parse_flags(argv: Sequence[str], arguments: Sequence[str]) -> list[str]:
    logging.set_verbosity(logging.ERROR)  # config_flags also warns about errors that are reported below
    try:
        rest = flags.FLAGS(list(argv))
    except flags.Error as error:
        text = str(_user_error(error) or first_line(error))
        for pattern, meaning in PLAIN.items():
            text = re.sub(pattern, meaning, text)
        fail(text)
    except Exception as error:
        fail(str(_user_error(error) or describe(error, argv)))
    given = rest[1:]
    if len(given) > len(arguments):
        fail(f"{given[len(arguments)]}: unexpected argument; flags are written --name=value")
    if len(given) < len(arguments):
        fail(f"{arguments[len(given)]}: must be given; the arguments are {' '.join(arguments)}")
    return rest


def describe(error: Exception, argv: Sequence[str]) -> str:
    """Describes an exception from config_flags in one line that names the override that caused it."""
    for argument in argv:
        match = re.match(r"--?config\.([\w.]+)", argument)
        if match and isinstance(error, AttributeError | KeyError | TypeError) and (missing := unknown_field(match[1])):
            form = "must be --config.SECTION.FIELD=VALUE; " if match[1].count(".") > 1 else ""
            return f"{argument}: {form}{missing}"
    return f"--config: {first_line(error)}"


# Messages of absl and Python about a flag's value -> messages for the user.
PLAIN = {
    r"\('Non-boolean argument to boolean flag', .*\)$": "must be true or false",
    r"invalid literal for int\(\) with base \d+: .*$": "must be an integer",
    r"could not convert string to float: .*$": "must be a number",
    r"-?\d+ is not an integer in the range \[(\d+), (\d+)\]$": r"must be an integer from \1 to \2",
}


def _user_error(error: BaseException | None) -> UserError | None:
    """Returns the config file's `UserError` that led to `error`, since absl and config_flags wrap it."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error
