"""Checks that a killed run loses nothing: `python -m tools.faults --trials=100 [--signal=term] [--out=DIR]`.

Trains a small model on the CPU once without interruption. Then trains it TRIALS times with one to three kills at seeded
random moments in training steps, saving, evaluation, tokenisation and anywhere, each time resumed by the same command.
Every logged step, loss, gradient norm, learning rate and evaluation, and every array of the final checkpoint, is
compared bit for bit with the uninterrupted run. Prints a table; DIR receives faults_SIGNAL.json. The exit status is 1
if any trial differs, hangs or fails; the last line says where its files are.
"""

import collections
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

from absl import flags

from tlinformer_jax.commands import cli
from tlinformer_jax.config.train import NUM_SEEDS
from tlinformer_jax.files import write_text

if TYPE_CHECKING:
    from tools.fault_runs import Outcome
    from tools.fault_trials import Trial

TRIALS = flags.DEFINE_integer("trials", 30, "Runs that are killed and resumed.", lower_bound=1)
SIGNAL = flags.DEFINE_enum("signal", "kill", ["kill", "term"], "kill: SIGKILL (kill -9); term: SIGTERM.")
SEED = flags.DEFINE_integer("seed", 0, "Of the moments.", lower_bound=0, upper_bound=NUM_SEEDS - 1)
OUT = flags.DEFINE_string("out", "", "Directory for faults_SIGNAL.json and what failed; none: print only.")


def main() -> None:
    """Runs all trials; exits with status 1 if one of them failed."""
    out = cli.writable_workdir(OUT.value, "--out").absolute() if OUT.value else None
    root = pathlib.Path(tempfile.mkdtemp(prefix="faults-", dir=out))
    # Set before JAX is imported: programs that all processes share are compiled once.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    from tools.fault_trials import compare_states, run_trials

    number = {"kill": signal.SIGKILL, "term": signal.SIGTERM}[SIGNAL.value]
    started = time.monotonic()
    trials = compare_states(root, run_trials(root, TRIALS.value, SEED.value, number))
    values = report(trials, time.monotonic() - started)
    print(table(values), flush=True)
    if out is not None:
        write_text(out / f"faults_{SIGNAL.value}.json", as_json(values))
    if not values["lost"]:
        shutil.rmtree(root, ignore_errors=True)
        return
    print(f"what the failed trials left is in {root}", flush=True)
    sys.exit(1)


def report(trials: list["Trial"], seconds: float) -> dict[str, Any]:
    """Returns the figures of all trials, as in the JSON file."""
    import jax

    import tlinformer_jax
    from tools.fault_runs import AIMS, PHASES, fault_config

    config = fault_config(pathlib.Path())
    killed = [trial for trial in trials if trial.number >= 0]
    hits = [outcome for trial in trials for outcome in trial.outcomes if outcome.signal is not None]
    aims = collections.Counter(outcome.signal.aim for outcome in hits if outcome.signal is not None)
    phases = collections.Counter(outcome.phase for outcome in hits)
    saving = collections.Counter(outcome.phase for outcome in hits if outcome.saving)
    repeated = [steps for trial in killed for steps in trial.repeated_steps]
    return {
        "command": f"python -m tools.faults {' '.join(sys.argv[1:])}".rstrip(),
        "signal": SIGNAL.value,
        "seed": SEED.value,
        "trials": len(killed),
        "survived": sum(trial.problem is None for trial in killed),
        "lost": [{"trial": trial.number, "problem": trial.problem} for trial in trials if trial.problem is not None],
        "never_hit": sum(all(outcome.signal is None for outcome in trial.outcomes) for trial in killed),
        "signals": len(hits),
        "signals_by_aim": {aim: aims[aim] for aim in AIMS},
        "signals_by_phase": {phase: phases[phase] for phase in PHASES},
        "while_saving_by_phase": {phase: saving[phase] for phase in PHASES},
        "answered": sum(outcome.noticed for outcome in hits),
        "longest_seconds_to_end": max((outcome.seconds for outcome in hits), default=0.0),
        "repeated_steps_mean": sum(repeated) / len(repeated) if repeated else 0.0,
        "repeated_steps_most": max(repeated, default=0),
        "checkpoint_every": config.train.checkpoint_every,
        "epochs": config.train.epochs,
        "seconds": seconds,
        "jax": jax.__version__,
        "version": tlinformer_jax.__version__,
        "details": [[_brief(outcome) for outcome in trial.outcomes if outcome.signal] for trial in killed],
    }


def table(values: dict[str, Any]) -> str:
    """Returns the figures as text."""
    name = {"kill": "SIGKILL", "term": "SIGTERM"}[values["signal"]]
    lines = [
        f"{name}: {values['trials']} trials, {values['signals']} signals; survived {values['survived']}, "
        f"lost {len(values['lost'])}; {values['never_hit']} trials ended before their signal came",
        f"{'hit during':14} {'signals':>7} {'of them while a checkpoint was written or deleted':>50}",
    ]
    for phase, count in values["signals_by_phase"].items():
        lines.append(f"{phase:14} {count:>7} {values['while_saving_by_phase'][phase]:>50}")
    lines.append(
        f"steps done again after a signal: {values['repeated_steps_mean']:.1f} on average, at most "
        f"{values['repeated_steps_most']} (train.checkpoint_every = {values['checkpoint_every']})"
    )
    if values["signal"] == "term":
        lines.append(
            f"answered by saving and status 0: {values['answered']}, the others were before training began or after "
            f"its end; all ended within {values['longest_seconds_to_end']:.1f} s"
        )
    lines += [f"LOST trial {lost['trial']}: {lost['problem']}" for lost in values["lost"]]
    return "\n".join(lines)


def _brief(outcome: "Outcome") -> str:
    """Returns a signal as 'aim>phase@step', with '+saving' if a checkpoint was being saved."""
    aim = outcome.signal.aim if outcome.signal else ""
    return f"{aim}>{outcome.phase}{'+saving' if outcome.saving else ''}@{outcome.last_step or 0}"


def as_json(values: dict[str, Any]) -> str:
    """Returns the figures as JSON, one field per line."""
    fields = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
    return f"{{\n{fields}\n}}\n"


if __name__ == "__main__":
    cli.run(main)
