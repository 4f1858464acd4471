"""The trials of `tools.faults`: an uninterrupted run, then runs that are killed at seeded random moments."""

import dataclasses
import itertools
import pathlib
import shutil
import signal
import sys

import numpy as np

from tools.fault_check import damaged, final_state, log_difference, logged, state_difference
from tools.fault_runs import AIMS, Durations, Outcome, PlannedSignal, Process, fault_config, write_texts

# Numbers of signals in a trial, with their probabilities.
SIGNALS, ODDS = (1, 2, 3), (0.5, 0.3, 0.2)
# Signals arrive in this first part of a run, measured by time or by occurrences of a phase.
LATEST = 0.8
# Phases in which SIGTERM may end a run at once, since there is nothing to save.
UNANSWERED = ("start", "tokenisation")


@dataclasses.dataclass(frozen=True)
class Trial:
    """A run that was killed and resumed until it ended.

    Attributes:
      number: from 0.
      outcomes: of its processes in order; the last process got no signal.
      problem: None if the result equals that of the uninterrupted run, bit for bit.
    """

    number: int
    outcomes: tuple[Outcome, ...]
    problem: str | None

    @property
    def repeated_steps(self) -> list[int]:
        """For each process that logged a step after a signal, the number of logged steps that it repeated."""
        done = 0
        repeated: list[int] = []
        for before, after in itertools.pairwise(self.outcomes):
            done = max(done, before.last_step or 0)
            if after.last_step is not None:
                repeated.append(max(0, done - (after.resumed or 0)))
        return repeated


def run_trials(root: pathlib.Path, count: int, seed: int, number: int) -> list[Trial]:
    """Runs two uninterrupted runs in root/whole and root/again, then `count` trials in root/0, root/1, ...

    Compares logs right after each trial. Final states are compared later, because that needs JAX, which a process that
    forks others must not use.

    Args:
      root: an empty directory.
      count: number of trials.
      seed: seed of the moments.
      number: the signal.

    Returns:
      the second uninterrupted run, as trial -1, and the trials.

    Raises:
      RuntimeError: if an uninterrupted run fails.
    """
    write_texts(root)
    undisturbed(root, root / "whole")
    durations = undisturbed(root, root / "again")
    say("undisturbed: " + ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in durations.seconds.items()))
    again = Trial(-1, (), log_difference(logged(root / "whole" / "run"), logged(root / "again" / "run")))
    return [again, *(run_trial(root, trial, durations, seed, number) for trial in range(count))]


def undisturbed(root: pathlib.Path, folder: pathlib.Path) -> Durations:
    """Runs in `folder` to the end; returns how long its phases took."""
    folder.mkdir()
    process = Process(fault_config(root), folder, 0)
    status = process.wait().status
    if status != 0:
        raise RuntimeError(f"the uninterrupted run ended with status {status}:\n{process.text}")
    return process.durations()


def run_trial(root: pathlib.Path, trial: int, durations: Durations, seed: int, number: int) -> Trial:
    """Kills a run at seeded moments, resumes it until it ends, and compares its log with that of root/whole."""
    folder = root / f"{trial}"
    folder.mkdir()
    config = fault_config(root)
    outcomes: list[Outcome] = []
    for planned in draw_signals(np.random.default_rng([seed, trial]), trial, durations):
        outcomes.append(Process(config, folder, len(outcomes)).wait(planned, number))
        if outcomes[-1].signal is None:  # it ended before the planned moment
            break
    if not outcomes or outcomes[-1].signal is not None:
        outcomes.append(Process(config, folder, len(outcomes)).wait())
    problem = process_problem(outcomes, number)
    if problem is None:
        workdir = folder / "run"
        problem = damaged(workdir) or log_difference(logged(root / "whole" / "run"), logged(workdir))
    say(f"trial {trial}: {', '.join(map(str, outcomes))}; {problem or 'log equal'}")
    return Trial(trial, tuple(outcomes), problem)


def draw_signals(rng: np.random.Generator, trial: int, durations: Durations) -> list[PlannedSignal]:
    """Draws the signals of a trial. The first signals of the trials cycle through AIMS, the others are random."""
    count = int(rng.choice(SIGNALS, p=ODDS))
    aims = [AIMS[trial % len(AIMS)], *rng.choice(AIMS, count - 1)]
    return [
        PlannedSignal(
            str(aim),
            # Each signal gets a share of the run, so that the later ones still find it running.
            1 + int(rng.integers(max(1, int(LATEST * durations.counts[aim]) // count))),
            float(rng.uniform(0, (LATEST if aim == "anywhere" else 1) * durations.seconds[aim])),
        )
        for aim in aims
    ]


def process_problem(outcomes: list[Outcome], number: int) -> str | None:
    """Returns what is wrong with how a trial's processes ended; None if nothing is."""
    for index, outcome in enumerate(outcomes):
        if outcome.status is None:
            return f"process {index} did not end"
        wanted = 0 if outcome.signal is None or outcome.noticed else -number
        if outcome.status != wanted and not (outcome.finished and outcome.status == 0):
            return f"process {index} ended with status {outcome.status} instead of {wanted} ({outcome})"
        answered = outcome.noticed or outcome.finished or outcome.phase in UNANSWERED
        if number == signal.SIGTERM and outcome.status != 0 and not answered:
            return f"process {index} did not answer SIGTERM ({outcome})"
        later = [after.resumed for after in outcomes[index + 1 :] if after.resumed is not None]
        if outcome.noticed and later and later[0] != (outcome.last_step or outcome.resumed or 0):
            return f"process {index} stopped after step {outcome.last_step}, the next went on from {later[0]}"
    return None


def compare_states(root: pathlib.Path, trials: list[Trial]) -> list[Trial]:
    """Compares every array of each trial's final checkpoint with root/whole; removes trials without a problem."""
    whole = final_state(root / "whole" / "run")
    compared = []
    for trial in trials:
        folder = root / ("again" if trial.number < 0 else f"{trial.number}")
        problem = trial.problem or state_difference(whole, final_state(folder / "run"))
        if problem is None:
            shutil.rmtree(folder)
        compared.append(dataclasses.replace(trial, problem=problem))
    return compared


def say(message: str) -> None:
    """Prints a line of progress to stderr."""
    print(message, file=sys.stderr, flush=True)
