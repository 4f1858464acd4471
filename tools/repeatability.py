"""Checks that runs are reproducible, and at what cost: `python -m tools.repeatability --updates=300 [--config=FILE]`.

Trains on this machine's devices with train.deterministic: twice without interruption, and once killed (SIGKILL) and
resumed. Every array of the final states and the whole logs are compared bit for bit. Then trains twice without
train.deterministic. Each run is a process that compiles its own programs, since a cached program would hide what XLA
chooses by timing. The first runs of both kinds run alone and give the speeds; the others run together, which disturbs
XLA's timing as much as possible. Prints a table; the exit status is 1 if a run with the option differs.

All this is done for each configuration of DEFAULTS, or for that of --config and --config.FIELD. The defaults have
attention with and without dropout, since on a GPU each is another kernel.

Result: equal to the last bit in all three, 300 updates on NVIDIA H200s, JAX 0.11.2 (docs/reliability.md).
"""

import contextlib
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags

from tlinformer_jax.commands import cli
from tlinformer_jax.config.run import run_config
from tlinformer_jax.errors import UserError
from tlinformer_jax.files import markdown

cli.define_config_flag()
UPDATES = flags.DEFINE_integer("updates", 300, "Updates of each run.", lower_bound=12)
# The embedded corpus, and a model for which a GPU uses GPU-specific attention and our kernels.
BASE = (
    "--config=tiny",
    *("--config.model.d_model=256", "--config.model.num_heads=4"),
    *("--config.model.history_window=64", "--config.model.generation_window=64"),
    *("--config.data.sequence_length=512", "--config.train.batch_size=32", "--config.train.learning_rate=1e-3"),
)
DEFAULTS = {
    f"{architecture}, dropout {dropout}": (
        *BASE,
        f"--config.model.architecture={architecture}",
        f"--config.model.dropout={dropout}",
    )
    for architecture, dropout in (("tlinformer", 0.0), ("transformer", 0.0), ("tlinformer", 0.1))
}
LOG_FILE = "log.txt"
RESUMED = "continuing from step "
HANGS_AFTER = 300.0  # seconds


class Run:
    """A training process with the flags `config`, which starts at once; its output goes to log.txt in `folder`."""

    def __init__(self, folder: pathlib.Path, config: Sequence[str], deterministic: bool) -> None:
        folder.mkdir(exist_ok=True)
        self.workdir, self.log = folder / "run", folder / LOG_FILE
        command = [sys.executable, "-m", "tlinformer_jax.main", *config, f"--workdir={self.workdir}"]
        train = {"steps": UPDATES.value, "eval_every": 0, "deterministic": deterministic}
        train |= {"checkpoint_every": UPDATES.value // 3, "log_every": UPDATES.value // 12}
        command += [f"--config.train.{field}={value}" for field, value in train.items()]
        settings = {"JAX_ENABLE_COMPILATION_CACHE": "false", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | settings)

    def finish(self) -> "Run":
        """Waits for the end of the process."""
        try:
            status = self.process.wait(HANGS_AFTER)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise UserError(f"a run took more than {HANGS_AFTER:g} s: {self.last_line()}") from None
        if status:
            raise UserError(f"a run ended with status {status}: {self.last_line()}")
        return self

    def kill_after_saving(self) -> None:
        """Kills the process some updates after its first checkpoint."""
        ends = time.monotonic() + HANGS_AFTER
        while not any(path.name.isdecimal() for path in self.workdir.glob("checkpoints/*")):
            if self.process.poll() is not None or time.monotonic() > ends:
                raise UserError(f"a run has not saved before its end: {self.last_line()}")
            time.sleep(0.01)
        self.process.kill()
        self.process.wait()

    def last_line(self) -> str:
        """The last line of its output."""
        return (self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]

    def resumed_at(self) -> int:
        """The step from which its last process continued."""
        found = self.log.read_text(encoding="utf-8", errors="replace").rpartition(RESUMED)
        return int(found[2].split()[0]) if found[1] else 0


def main() -> None:
    """Trains, compares and prints for each configuration."""
    given = [argument for argument in sys.argv[1:] if argument.lstrip("-").startswith("config")]
    if cli.config_given():
        run_config(cli.config_values())  # refuses a wrong one before anything is written
    different = []
    for name, config in ({"": given} if given else DEFAULTS).items():
        root = pathlib.Path(tempfile.mkdtemp(prefix="repeatability-"))
        if name:
            print(f"\n{name}\n", flush=True)
        equal = False
        try:
            equal = compare(train(root, config))
        finally:  # also if a run has failed
            if equal:
                shutil.rmtree(root, ignore_errors=True)
            else:
                print(f"what the runs have left is in {root}", flush=True)
        if not equal:
            different.append(name)
    if different:
        sys.exit(1)


def train(root: pathlib.Path, config: Sequence[str]) -> dict[str, Run]:
    """Returns the finished runs by the names of their folders in `root`."""
    runs: dict[str, Run] = {}
    started: list[Run] = []

    def start(name: str, deterministic: bool) -> Run:
        runs[name] = Run(root / name, config, deterministic)
        started.append(runs[name])
        return runs[name]

    try:
        start("whole", True).finish(), start("free", False).finish()
        killed, again, free_again = start("killed", True), start("again", True), start("free-again", False)
        killed.kill_after_saving()
        start("killed", True).finish()
        again.finish(), free_again.finish()
    finally:
        for run in started:
            with contextlib.suppress(ProcessLookupError):
                run.process.kill()
    return runs


def compare(runs: Mapping[str, Run]) -> bool:
    """Prints what differs and what the option costs; returns whether runs with it are equal."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # this process only reads files
    whole, free, killed = runs["whole"], runs["free"], runs["killed"]
    differences = {
        "a second run": difference(whole, runs["again"]),
        f"killed and resumed from update {killed.resumed_at()}": difference(whole, killed),
    }
    rows = [(name, found or "equal to the last bit") for name, found in differences.items()]
    rows.append(("two runs without the option", difference(free, runs["free-again"]) or "equal to the last bit"))
    print("\n".join(markdown(("train.deterministic", f"after {UPDATES.value} updates"), rows)))
    speeds, losses = [speed(run) for run in (whole, free)], [last_loss(run) for run in (whole, free)]
    cost = 1 - speeds[0] / speeds[1]
    print(f"{speeds[0]:,.0f} tokens/s with it, {speeds[1]:,.0f} without: it costs {cost:.1%}")
    print(f"validation loss {losses[0]:.4f} with it, {losses[1]:.4f} without", flush=True)
    return not any(differences.values()) and bool(killed.resumed_at())


def difference(one: Run, other: Run) -> str | None:
    """Returns the first difference of two logs and the number of differing arrays; None if all are equal."""
    from tools.fault_check import final_state, log_difference, logged

    first, second = final_state(one.workdir), final_state(other.workdir)
    differ = [name for name, array in first.items() if array.tobytes() != second[name].tobytes()]
    differences = [f"{len(differ)} of {len(first)} arrays differ"] if differ else []
    if found := log_difference(logged(one.workdir), logged(other.workdir)):
        differences.append(found)
    return "; ".join(differences) or None


def speed(run: Run) -> float:
    """Returns the median of the logged tokens/s."""
    return statistics.median(event["train/tokens_per_second"] for event in events(run, "train/tokens_per_second"))


def last_loss(run: Run) -> float:
    """Returns the loss of the validation split after the last update."""
    return float(events(run, "eval/loss")[-1]["eval/loss"])


def events(run: Run, name: str) -> list[dict[str, Any]]:
    """Returns the logged events with a figure `name`."""
    lines = (run.workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event.get(name) is not None]


if __name__ == "__main__":
    cli.run(main)
