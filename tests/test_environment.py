"""What commands find around them: closed streams, readers that go away, JAX's settings, no device, no home."""

import os
import pathlib
import pty
import pwd
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from tests.support.commands import ROOT, TEXT, command_line
from tlinformer_jax.data.cache import cache_folder
from tlinformer_jax.environment import describe_failure, settle
from tlinformer_jax.errors import UserError
from tlinformer_jax.training.setup import use_compilation_cache

TALKS = """
import os, sys
from tlinformer_jax.commands import cli
path, way = sys.argv.pop(), sys.argv.pop()
def main():
    print("first", file=sys.stderr, flush=True)
    sys.stdin.readline()
    for stream in (sys.stdout, sys.stderr) * 5000:
        print("a line of text that fills the buffer of a stream", file=stream)
    with open(path, "w") as file:
        if way == "closed":
            os.write(1, b"of a library in C")
            os.write(2, b"of a library in C")
        file.write("done")
cli.run(main)
"""

ASKS = """
from tlinformer_jax.commands import cli
def main():
    import jax
    import jax.numpy as jnp
    drawn = jax.random.normal(jax.random.key(0), 3)
    print((jnp.ones((2, 3)) * jnp.arange(3) + jnp.arange(2.0, dtype=float).sum()).dtype, drawn)
cli.run(main)
"""


def asks(option: str = "-u", **environment: str) -> subprocess.CompletedProcess:
    line = [sys.executable, option, "-c", ASKS]
    environment = {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run(line, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_a_command_goes_on_when_its_reader_goes_away(tmp_path):
    line = [sys.executable, "-c", TALKS, "gone", str(tmp_path / "file")]
    with subprocess.Popen(
        line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.write("\n")
    assert process.returncode == 0
    assert (tmp_path / "file").read_text() == "done"


def test_a_command_goes_on_when_the_disk_below_its_log_is_full(tmp_path):
    line = [sys.executable, "-c", TALKS, "full", str(tmp_path / "file")]
    with open("/dev/full", "w") as full:
        done = subprocess.run(line, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=full, stderr=full, check=False)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "done"


def test_a_result_that_a_full_disk_loses_is_an_error_and_one_that_nobody_reads_is_not():
    code = "from tlinformer_jax.commands import cli; cli.run(lambda: cli.print_result('figures'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: stdout: the result cannot be written (No space left on device)\n"
    unread = subprocess.run(
        ["bash", "-c", 'exec 3> >(true); sleep 1; "$0" -c "$1" >&3', sys.executable, code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (unread.returncode, unread.stderr) == (0, "")
    ours, terminal = pty.openpty()
    os.close(ours)  # what a program writes to a closed terminal fails with EIO
    with os.fdopen(terminal, "wb") as closed:
        line = [sys.executable, "-c", code]
        left = subprocess.run(line, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert (left.returncode, left.stderr) == (0, "")


def test_a_signal_asks_for_the_stacks_and_the_command_goes_on():
    code = """
import os, signal
from tlinformer_jax.commands import cli
def hangs():
    os.kill(os.getpid(), signal.SIGUSR2)
    print("went on")
cli.run(hangs)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "went on\n")
    assert "in hangs" in done.stderr


def test_closed_streams_are_not_taken_for_the_next_file(tmp_path):
    line = [sys.executable, "-c", TALKS, "closed", str(tmp_path / "file")]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *line], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "done"


def test_settings_of_jax_that_change_what_is_computed_are_named_and_not_used():
    settings = {"JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}
    settings |= {"JAX_DEFAULT_PRNG_IMPL": "rbg", "JAX_THREEFRY_PARTITIONABLE": "0", "JAX_TRANSFER_GUARD": "disallow"}
    done = asks(**settings)
    assert (done.returncode, done.stdout) == (0, f"float32 {jax.random.normal(jax.random.key(0), 3)}\n"), done.stderr
    told = [f"{name}={value} is ignored: the run's configuration says" for name, value in settings.items()]
    assert [line.split(" what")[0] for line in done.stderr.splitlines()] == told


def test_a_setting_that_jax_has_read_is_set_back(monkeypatch, capsys):
    before = jax.config.jax_numpy_rank_promotion
    try:
        jax.config.update("jax_numpy_rank_promotion", "raise")  # as JAX, imported before, has read it
        monkeypatch.setenv("JAX_NUMPY_RANK_PROMOTION", "raise")
        settle()
        assert jax.config.jax_numpy_rank_promotion == "allow"
        assert "JAX_NUMPY_RANK_PROMOTION=raise" in capsys.readouterr().err
    finally:
        jax.config.update("jax_numpy_rank_promotion", before)


@pytest.mark.parametrize(("platform", "option"), [("cuda", "-O"), ("abacus", "-u")])
def test_a_device_that_is_not_there_is_one_line(platform, option):
    if platform == "cuda" and pathlib.Path("/dev/nvidia0").exists():
        pytest.skip("there is one")
    done = asks(option, JAX_PLATFORMS=platform)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"error: JAX_PLATFORMS={platform}: must name devices of this machine")


def test_a_number_that_debug_nans_finds_is_one_line():
    with jax.debug_nans(True), pytest.raises(FloatingPointError) as caught:
        jnp.log(jnp.float32(-1))
    told = describe_failure(caught.value)
    assert "nan" in told
    assert "JAX_DEBUG_NANS" in told
    assert "\n" not in told
    assert describe_failure(ValueError("of the program")) is None


def test_without_a_home_directory_nothing_is_cached_there(monkeypatch):
    def no_entry(*_):
        raise KeyError("uid not found")

    for name in ("HOME", "XDG_CACHE_HOME", "TLINFORMER_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_entry)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    with pytest.raises(
        UserError, match=r"^TLINFORMER_CACHE: must be set to a folder, because there is no home directory"
    ):
        cache_folder()
    with pytest.raises(RuntimeError) as caught:
        pathlib.Path("~/run").expanduser()
    assert "write the path in full" in describe_failure(caught.value)


@pytest.mark.slow
def test_training_is_saved_though_nobody_reads_what_it_tells(tmp_path):
    """`main 2>&1 | head -1`."""
    arguments = [
        "--config=configs/tiny.py",
        *TEXT,
        *("--config.model.d_model=16", "--config.model.num_heads=2", "--config.model.num_blocks=1"),
        *("--config.data.sequence_length=64", "--config.train.steps=3", "--config.train.log_every=1"),
        f"--workdir={tmp_path}",
    ]
    line, environment = command_line("tlinformer_jax.main", *arguments)
    with subprocess.Popen(
        line, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        process.stdout.readline()
        process.stdout.close()
    assert process.returncode == 0
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
