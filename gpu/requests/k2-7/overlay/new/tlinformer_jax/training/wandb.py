"""A callback for Weights & Biases: `train_and_evaluate(config, workdir, callbacks=[WandB("my-project")])`."""

import dataclasses
import importlib.util
import secrets
from collections.abc import Mapping
from typing import Any

import jax

from tlinformer_jax.errors import UserError
from tlinformer_jax.files import read_own, write_text
from tlinformer_jax.training.callbacks import Callback, TrainingView

ID_FILE = "wandb_id.txt"


@dataclasses.dataclass
class WandB(Callback):
    """A callback that sends the figures of updates and evaluations to Weights & Biases.

    A training continued in the same directory continues the same W&B run. `settings` are passed to `wandb.init`.
    """

    project: str
    every: int | str = 50
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise UserError('WandB: needs the package wandb; pip install "tlinformer-jax[wandb]"')
        self._run: Any = None
        self._evaluated = 0.0  # step of the last evaluation that was sent

    def __call__(self, view: TrainingView) -> None:
        if jax.process_index() != 0:
            return
        if self._run is None:
            self._run = self._start(view)
        values = {f"train/{name}": value for name, value in view.metrics.items()}
        step = view.evaluation.get("step", 0)
        if step > self._evaluated:
            values |= {f"eval/{name}": value for name, value in view.evaluation.items()}
            self._evaluated = step
        self._run.log(values, step=view.step)

    def finish(self, view: TrainingView) -> None:
        if jax.process_index() == 0:
            self(view)
            self._run.finish()
            self._run = None

    def _start(self, view: TrainingView) -> Any:
        import wandb

        path = view.workdir / ID_FILE
        if not path.exists():
            write_text(path, secrets.token_hex(4))
        known = {"project": self.project, "name": view.workdir.name, "dir": str(view.workdir)}
        more = {"id": read_own(path), "resume": "allow", "config": view.config.to_dict()}
        return wandb.init(**(known | more | dict(self.settings)))
