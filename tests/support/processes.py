"""The training command as two processes that find each other on this machine."""

import pathlib
import socket
import subprocess

from tests.support.commands import ROOT, TEXT, command_line

SMALL = (
    "--config=configs/tiny.py",
    *TEXT,
    *("--config.model.d_model=16", "--config.model.num_heads=2", "--config.model.num_blocks=1"),
    *("--config.model.dropout=0.1", "--config.data.sequence_length=32"),
    *("--config.train.batch_size=8", "--config.train.accumulation=2", "--config.train.eval_every=0"),
    *("--config.train.warmup_steps=2", "--config.train.log_every=1"),
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(module: str, *arguments: str, devices: int = 1) -> subprocess.Popen:
    """Starts a module on so many simulated devices; its stderr is a pipe."""
    line, environment = command_line(module, *arguments)
    environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    environment["NPROC"] = "8"  # see conftest.py
    return subprocess.Popen(line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start_many(count: int, module: str, *arguments: str) -> list[subprocess.Popen]:
    """Starts a module as processes 0 .. count - 1 of so many, with a device each."""
    where = f"--coordinator_address=localhost:{free_port()}", f"--num_processes={count}"
    return [start(module, *arguments, *where, f"--process_id={number}") for number in range(count)]


def start_two(module: str, *arguments: str) -> list[subprocess.Popen]:
    """Starts a module as processes 0 and 1 of two, with a device each."""
    return start_many(2, module, *arguments)


def wait_for(process: subprocess.Popen, text: str) -> None:
    """Reads the process's stderr up to a line that holds `text`."""
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"ended without saying {text!r}")


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """The steps of the finished checkpoints."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal()) if folder.is_dir() else []
