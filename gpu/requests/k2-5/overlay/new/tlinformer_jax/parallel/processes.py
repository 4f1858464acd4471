"""Several processes of one run, named by environment variables or flags and connected by `jax.distributed`.

If one process ends early, the others end too: they print one line and do not hang.
"""

import contextlib
import ctypes
import dataclasses
import errno
import glob
import importlib.util
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from tlinformer_jax.environment import status_and_message
from tlinformer_jax.errors import UserError, first_line

# Seconds. The join timeout is long because processes start, tokenise and read their files at different speeds.
JOIN_TIMEOUT = 300
HEARTBEAT_TIMEOUT = 30
# Process 0 runs the service that the others connect to. It ends last, so that each can print its own last line.
LEAVES_LAST = 3

LOST = "another process of this run has ended, or cannot be reached"
AGAIN = "start all processes again; training continues from the last checkpoint"
LOST_SIGNS = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|socket closed|broken pipe|heartbeat|coordination|unavailable:", re.I
)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run. `found` names where they were found; a field is None if JAX finds out its value."""

    found: str
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None


def find_cluster(
    coordinator_address: str | None,
    num_processes: int | None,
    process_id: int | None,
    environment: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """Returns the processes to join, from flags or variables of SLURM, Open MPI, Kubernetes or TPU pods.

    Either all three flags are given, or none, or only num_processes = 1. Returns None if this process runs alone.
    """
    values = {"coordinator_address": coordinator_address, "num_processes": num_processes, "process_id": process_id}
    given = {name: value for name, value in values.items() if value is not None}
    if not given:
        found = _find_launcher(environment)
        return Cluster(found) if found else None
    if given == {"num_processes": 1}:
        return None
    _check_flags(values)
    return Cluster("--coordinator_address", coordinator_address, num_processes, process_id)


@contextlib.contextmanager
def joined(cluster: Cluster | None) -> Iterator[None]:
    """Connects to the other processes of `cluster`; for entry points, before JAX is used.

    An error inside ends the process at once: an orderly end would wait for processes that wait for this one.
    """
    if cluster is None:
        yield
        return
    _join(cluster)
    import jax

    try:
        yield
        jax.distributed.shutdown()
    except BaseException as error:
        sys.stdout.flush()  # os._exit would lose buffered output
        status = _report(error)
        with contextlib.suppress(Exception):  # JAX may have no device
            if jax.process_index() == 0:
                time.sleep(LEAVES_LAST)
        os._exit(status)


def _find_launcher(environment: Mapping[str, str]) -> str:
    """Returns the name of the launcher that started several processes, from its variables; "" if there is none."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm) and environment["SLURM_NTASKS"] != "1":
        return "SLURM"
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes"
    if "MEGASCALE_COORDINATOR_ADDRESS" in environment or _on_tpu(environment):
        return "a TPU"
    return ""


def _on_tpu(environment: Mapping[str, str]) -> bool:
    """Returns whether JAX will run on a TPU, which may have several hosts."""
    chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    wanted = "tpu" in (environment.get("JAX_PLATFORMS") or "tpu").split(",")
    return bool(wanted and chips and importlib.util.find_spec("libtpu"))


def _check_flags(values: Mapping[str, Any]) -> None:
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: missing; give --coordinator_address, --num_processes and --process_id together, "
            "or none of them if SLURM, Open MPI, Kubernetes or a TPU provides them"
        )
    address, count, number = values["coordinator_address"], values["num_processes"], values["process_id"]
    port = re.fullmatch(r"\S+:(\d{1,5})", address)
    if not port or not 0 < int(port[1]) < 2**16:
        raise UserError(f"--coordinator_address={address}: must be HOST:PORT, on which process 0 listens")
    if count < 1:
        raise UserError(f"--num_processes={count}: must be an integer >= 1")
    if not 0 <= number < count:
        raise UserError(f"--process_id={number}: must be one of 0 .. {count - 1}, for --num_processes={count}")


def _join(cluster: Cluster) -> None:
    import jax

    if cluster.coordinator_address and cluster.process_id == 0:
        _check_free(cluster.coordinator_address)
    who = f"the processes found by {cluster.found}"
    _say_at_abort(f"{who} could not be joined within {JOIN_TIMEOUT} s; have all been started?")
    try:
        jax.distributed.initialize(
            cluster.coordinator_address,
            cluster.num_processes,
            cluster.process_id,
            initialization_timeout=JOIN_TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except Exception as error:
        raise UserError(
            f"{who} cannot be joined ({first_line(error)}); --coordinator_address, --num_processes and "
            "--process_id name them by hand; --num_processes=1 runs this one alone"
        ) from error
    _say_at_abort(f"{LOST}; see JAX's messages above; {AGAIN}")


def _check_free(address: str) -> None:
    """Raises a UserError if the port is in use on this machine, which would crash JAX."""
    port, both = int(address.rsplit(":", 1)[1]), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            why = os.strerror(error.errno)
            raise UserError(f"--coordinator_address={address}: process 0 cannot listen on this port ({why})") from None


_kept_alive: list[Any] = []  # handlers that C calls; the list keeps Python from collecting them


def _say_at_abort(message: str) -> None:
    """Prints `message` as the last line and exits with status 1 if JAX's client aborts this process.

    The client aborts when it loses another process, in a thread that Python's exceptions and handlers do not reach.
    """

    def handle(_: int) -> None:
        with contextlib.suppress(OSError):  # stderr may be closed
            os.write(2, f"error: {message}\n".encode())
        os._exit(1)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
    _kept_alive.append(handler)
    ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


def _report(error: BaseException) -> int:
    """Prints an error on stderr; returns the exit status."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    lost = 1, f"{LOST} ({first_line(error)}); {AGAIN}"
    status, message = lost if _is_loss(error) else status_and_message(error)
    if message is None:
        traceback.print_exception(error)
    else:
        print(f"error: {message}", file=sys.stderr)
    sys.stderr.flush()
    return status


def _is_loss(error: BaseException | None) -> bool:
    """Returns whether an error means that another process was lost."""
    import jax

    if error is None:
        return False
    # JAX raises a ValueError when the host fetches the result of a failed collective.
    from_jax = isinstance(error, jax.errors.JaxRuntimeError | ValueError) and not isinstance(error, UserError)
    return bool(from_jax and LOST_SIGNS.search(str(error))) or _is_loss(error.__cause__)
