"""Several processes: how they are found, what is refused, which rows each reads."""

import socket
import subprocess

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from tests.support.commands import ROOT, check_refusal, command_line, in_forks
from tests.support.processes import SMALL, free_port
from tlinformer_jax.errors import UserError
from tlinformer_jax.parallel.processes import Cluster, find_cluster, joined
from tlinformer_jax.parallel.sharding import process_rows

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
CPU = {"JAX_PLATFORMS": "cpu"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({**SLURM, "SLURM_NTASKS": "2"}, "SLURM"),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        # Inside an allocation, but not started by srun: one process, however many tasks were asked for.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "Open MPI"),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (KUBERNETES, None),
        ({**KUBERNETES, "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "host"}, "a TPU"),
    ],
)
def test_processes_are_found_by_what_started_them(environment, found):
    expected = Cluster(found) if found else None
    assert find_cluster(None, None, None, {**CPU, **environment}) == expected
    assert find_cluster(None, 1, None, {**CPU, **environment}) is None, "--num_processes=1 runs alone"
    by_hand = Cluster("--coordinator_address", "host:1234", 2, 1)
    assert find_cluster("host:1234", 2, 1, {**CPU, **environment}) == by_hand, "flags count more"


MISTAKES = {
    "no address": ((None, 2, 0), "--coordinator_address: missing; give"),
    "a number alone": ((None, None, 0), "--coordinator_address, --num_processes: missing"),
    "no process": (("host:1234", 2, None), "--process_id: missing"),
    "one process of two": ((None, 1, 1), "--coordinator_address: missing"),
    "no port": (("host", 2, 0), "--coordinator_address=host: must be HOST:PORT"),
    "a port that is none": (("host:70000", 2, 0), "--coordinator_address=host:70000: must be"),
    "no processes": (("host:1", 0, 0), "--num_processes=0: must be an integer >= 1"),
    "a process too many": (("host:1", 2, 2), "--process_id=2: must be one of 0 .. 1, for --num_processes=2"),
    "a negative one": (("host:1", 2, -1), "--process_id=-1: must be"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_flags_that_do_not_fit_are_refused(name):
    values, message = MISTAKES[name]
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        find_cluster(*values, CPU)


def test_the_commands_refuse_them_with_one_line(tmp_path):
    wrong = ("--num_processes=2", "--process_id=0")
    train = ["--config=configs/tiny.py", f"--workdir={tmp_path}/run", *wrong]
    evaluate = [f"--workdir={tmp_path}", *wrong]
    trained, evaluated = in_forks([("tlinformer_jax.main", train), ("evaluate", evaluate)])
    check_refusal(trained, "--coordinator_address: missing; give")
    assert not (tmp_path / "run").exists()
    check_refusal(evaluated, "--coordinator_address: missing")


def test_a_process_holds_the_rows_of_its_devices(monkeypatch):
    devices = np.array(jax.devices())
    mesh = Mesh(devices.reshape(4, 2, 1), ("data", "fsdp", "expert"), axis_types=(AxisType.Auto,) * 3)
    np.testing.assert_array_equal(process_rows(mesh, 16), np.arange(16))

    class Half:  # of the devices, as another process would see them
        def addressable_devices_indices_map(self, shape):
            whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp", "expert")))
            return {
                device: index for device, index in whole.devices_indices_map(shape).items() if device.id in (1, 2, 5, 6)
            }

    monkeypatch.setattr("tlinformer_jax.parallel.sharding.batch_sharding", lambda *_: Half())
    np.testing.assert_array_equal(process_rows(mesh, 16), [2, 3, 4, 5, 10, 11, 12, 13])


def test_a_port_that_is_taken_is_refused_before_jax_crashes_on_it(tmp_path):
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("", 0))
        other.listen()
        where = f"localhost:{other.getsockname()[1]}"
        with (
            pytest.raises(UserError, match=rf"--coordinator_address={where}: .* \(Address already in use\)"),
            joined(Cluster("--coordinator_address", where, 2, 0)),
        ):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_whose_others_never_come_says_so(number, tmp_path):
    where = (f"--coordinator_address=localhost:{free_port()}", "--num_processes=2", f"--process_id={number}")
    line, environment = command_line("tlinformer_jax.main", *SMALL, f"--workdir={tmp_path}/run", *where)
    line[2] = f"from tlinformer_jax.parallel import processes; processes.JOIN_TIMEOUT = 3; {line[2]}"
    result = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "error: the processes found by --coordinator_address could not be joined within 3 s; have all been started?"
    )
    assert not list((tmp_path / "run").iterdir())
