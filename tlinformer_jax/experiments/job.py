"""One training run as a driver orders it, and whether it has been done already. Without JAX."""

import dataclasses
import json
import pathlib
from typing import Any

from tlinformer_jax.config.run import RunConfig, differences, run_config
from tlinformer_jax.errors import DataError, UserError
from tlinformer_jax.experiments.results import RESULT_FILE, read_result
from tlinformer_jax.parallel.mesh import MeshConfig

STOPPED = 3  # exit status of a job's process that a signal has stopped


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to train, and what the record of it says besides.

    Attributes:
      name: of the run.
      config: of the run.
      workdir: its working directory, which also gets the record, result.json.
      command: as a user types it.
      then: actions of `experiments.actions` after the training.
      study: see `plan.Sweep`.
      sweep: name of the sweep's file, or None.
      point: name of the point, the same for all seeds, or None.
      overrides: the point's.
    """

    name: str
    config: RunConfig
    workdir: pathlib.Path
    command: str
    then: tuple[str, ...] = ()
    study: str = "architectures"
    sweep: str | None = None
    point: str | None = None
    overrides: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """One line, for another process."""
        return json.dumps(dataclasses.asdict(self) | {"workdir": str(self.workdir)})

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """The job of such a line."""
        values = json.loads(text)
        values |= {"config": run_config(values["config"]), "workdir": pathlib.Path(values["workdir"])}
        return cls(**values | {"then": tuple(values["then"])})


def essence(config: RunConfig) -> RunConfig:
    """The configuration without what only says where a run finds its text and its devices.

    Of the text's files the names stay, without their folders.
    """

    def names(files: str) -> str:
        return ",".join(pathlib.PurePath(part.strip()).name for part in files.split(","))

    data = dataclasses.replace(
        config.data,
        train_files=names(config.data.train_files),
        validation_files=names(config.data.validation_files),
        test_files=names(config.data.test_files),
        manual_dir="",
        cache_dir="",
    )
    return dataclasses.replace(config, data=data, mesh=MeshConfig())


def finished_result(job: Job) -> dict[str, Any] | None:
    """The record of the job where it is finished: trained, with all of its actions; else None.

    Raises:
      UserError: if the directory holds the record of another configuration.
    """
    path = job.workdir / RESULT_FILE
    if not path.exists():
        return None
    try:
        result = read_result(path)
        recorded = run_config(result["config"])
    except DataError:
        return None  # it is written anew
    except UserError as error:
        raise UserError(
            f"{path}: its configuration does not fit this version ({error}); take another directory"
        ) from None
    changed = differences(essence(recorded), essence(job.config))
    if changed:
        raise UserError(f"{path}: is of another configuration ({'; '.join(changed)}); take another directory")
    return result if set(job.then) <= set(result["then"]) else None
