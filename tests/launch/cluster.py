"""A SLURM cluster of two nodes on this machine, set up for a test and torn down after it, whatever happens.

Two `slurmd` with a node each, one `slurmctld`, and a `munged` with a key of its own; all files in one folder, all ports
free ones, no systemd, no cgroups, nothing of the machine's own SLURM touched.
"""

import contextlib
import getpass
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence

from tests.support.processes import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "setpriv")
# Where Debian puts daemons; it is not in everyone's PATH.
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
# Both lead to this machine, and a node's name is what processes look for each other by.
NODES = ("127.0.0.1", "127.0.0.2")

CONF = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,requeue_setup_env_fail
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
KillWait=60
FirstJobId={first}
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """What is not installed of all that a cluster needs."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


class Cluster:
    """A running cluster: its commands, and its logs for the message of a failed test."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        # Jobs inherit this, so it must not hold what a SLURM around the tests has set.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.environment = kept | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def command(self, *line: str, cwd: pathlib.Path | None = None, timeout: float = 120, **variables: str) -> str:
        """What a command of SLURM prints; its failure is an AssertionError with the logs."""
        done = subprocess.run(
            line,
            cwd=cwd,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{line}: status {done.returncode}\n{done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def logs(self) -> str:
        """The last lines of all daemons."""
        found = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {path.name}\n" + "\n".join(path.read_text().splitlines()[-40:]) for path in found)

    def start(self) -> None:
        """Starts all daemons and waits until both nodes are idle."""
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        (self.folder / "state").mkdir()
        names = ("socket", "pid", "log", "seed")
        files = [f"--{name}{'' if name == 'socket' else '-file'}={self.folder}/munge.{name}" for name in names]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *files)
        self._wait_for(lambda: (self.folder / "munge.socket").exists(), "munged's socket")
        self._write_configuration()
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-c", "-N", node)
        self._wait_for(lambda: self._states() == ["idle"] * len(NODES), "two idle nodes")

    def stop(self) -> None:
        """Ends all jobs and daemons; none is left."""
        with contextlib.suppress(Exception):
            self.command("scancel", "--me", "--signal=KILL", "--full", timeout=10)
        # The daemons last started first, so that munged outlives those that ask it.
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for pid in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _left(self) -> list[int]:
        """Processes, of steps perhaps, that still carry this cluster's configuration in their environment."""
        mark = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        found = []
        for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
        return found

    def _daemon(self, name: str, *arguments: str) -> None:
        program = shutil.which(name, path=PATH)
        assert program is not None
        with open(self.folder / f"{name}.{len(self._daemons)}.out.log", "wb") as log:
            # Debian's `setpriv`: they end with this process too, should it be killed before it can end them.
            line = ["setpriv", "--pdeathsig", "TERM", program, *arguments]
            daemon = subprocess.Popen(
                line, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
            self._daemons.append(daemon)

    def _states(self) -> Sequence[str]:
        line = ["sinfo", "--noheader", "--Node", "--format=%t"]
        return subprocess.run(line, env=self.environment, capture_output=True, text=True, check=False).stdout.split()

    def _wait_for(self, condition, what: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not condition():
            dead = [daemon.args for daemon in self._daemons if daemon.poll() is not None]
            assert not dead, f"ended: {dead}\n{self.logs()}"
            assert time.monotonic() < end, f"no {what} after {seconds} s\n{self.logs()}"
            time.sleep(0.2)

    def _write_configuration(self) -> None:
        host = socket.gethostname()
        nodes = [
            f"NodeName={node} NodeAddr={node} NodeHostname={host} Port={free_port()} CPUs=8 State=UNKNOWN"
            for node in NODES
        ]
        text = CONF.format(
            port=free_port(),
            user=getpass.getuser(),
            folder=self.folder,
            nodes="\n".join(nodes),
            names=",".join(NODES),
            first=random.randrange(1, 4000),  # JAX takes the port that it meets at from the job's number
        )
        (self.folder / "slurm.conf").write_text(text)
        version = self.command(shutil.which("slurmd", path=PATH) or "slurmd", "-V")
        release = int((re.findall(r"\d+", version) or ["0"])[0])
        if release >= 23:  # older ones do not know the word, and do without the file
            (self.folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")


@contextlib.contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster, in a folder of its own that is removed in the end."""
    # Not a test's own folder: the name of a socket in it may have 108 characters at most.
    with tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(pathlib.Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
