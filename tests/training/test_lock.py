"""Two runs on one working directory: the second is refused; what a dead run left is no obstacle."""

import os
import platform
import subprocess
import sys

import pytest

from tlinformer_jax.errors import DataError
from tlinformer_jax.training.workdir import LOCK_FILE, sole_run

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 12 on host other\\n")
file.flush()
print("held", flush=True)
time.sleep(60)
"""


def test_the_second_run_is_refused_and_told_who_holds_the_directory(tmp_path):
    with sole_run(tmp_path):
        holder = rf"another run .*process {os.getpid()} on host {platform.node()}"
        with pytest.raises(DataError, match=holder), sole_run(tmp_path):
            pass
        assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text(), "the refused one changes nothing"
    with sole_run(tmp_path):
        pass


def test_a_killed_holder_is_no_obstacle(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / LOCK_FILE)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(DataError, match="process 12 on host other"), sole_run(tmp_path):
            pass
        holder.kill()
        holder.wait()
    with sole_run(tmp_path):
        assert "other" not in (tmp_path / LOCK_FILE).read_text()
