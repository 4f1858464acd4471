"""The fixed parts of a run, built alike for training and evaluation: mesh, model, shardings and splits."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tlinformer_jax.analysis.flops import training_flops
from tlinformer_jax.config.data import DataConfig
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.config.run import RunConfig
from tlinformer_jax.config.train import EPOCH
from tlinformer_jax.data.batches import (
    Batch,
    Rows,
    TrainingBatches,
    check_holds_a_sample,
    evaluation_batches,
    label_documents,
    num_samples,
)
from tlinformer_jax.data.documents import DocumentStream
from tlinformer_jax.data.given import POSITIONS_FILE, TokenData, given_loader, with_given_files
from tlinformer_jax.data.ordered import OrderedBatches, OrderedStream
from tlinformer_jax.data.sources import answer_positions, load_split
from tlinformer_jax.data.streams import RowStream, check_token_ids
from tlinformer_jax.data.tasks import AnswerPositions, Split, TaskSplit, answer_batches
from tlinformer_jax.data.tokenizers import Tokenizer, check_vocab
from tlinformer_jax.errors import POSITIVE, ConfigError, check_value
from tlinformer_jax.models.model import LanguageModel, build_model
from tlinformer_jax.models.windows import num_windows, trained_tokens
from tlinformer_jax.parallel.mesh import platform
from tlinformer_jax.parallel.sharding import (
    EVALUATION_AXES,
    batch_sharding,
    build_mesh,
    check_batch_divides,
    connect,
    mesh_error,
    process_rows,
    put_batch,
    replicated,
    tree_shardings,
    ways,
)
from tlinformer_jax.training.evaluation import Evaluation, document_sums, eval_step
from tlinformer_jax.training.optimizer import Horizon
from tlinformer_jax.training.step import TrainState, compiler_options, init_state, jit_train_step

# For what depends on no run's length: the shapes of a train state, and the memory of a step.
ANY_LENGTH = Horizon(steps=1, decay_end=1)
LoadSplit = Callable[[DataConfig, str, Tokenizer], Split]
MASKED_ITERABLE = "must be False if train_data is an iterable or validation_data contains batches"
COMPILATION_CACHE = "~/.cache/tlinformer_jax/xla"


@dataclasses.dataclass(frozen=True)
class Run:
    """The fixed parts of a run; `load_split` loads its splits.

    `horizon` is None in a run that does not train, and before the training data is read.
    """

    config: RunConfig
    tokenizer: Tokenizer
    mesh: Mesh
    model: LanguageModel
    horizon: Horizon | None = None
    load_split: LoadSplit = load_split
    # The evaluation step of another run that differs in nothing that is compiled; None to compile one.
    shared_eval_step: Any = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def last_step(self) -> int:
        """The number of updates of a training run."""
        assert self.horizon is not None
        return self.horizon.steps

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the train state."""
        shapes = jax.eval_shape(self._init, jax.random.key(0))
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            tree_shardings(shapes, self.mesh),
        )

    @property
    def shardings(self) -> TrainState:
        """Shardings of the train state."""
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    def answers(self, length: int) -> AnswerPositions | None:
        """Returns the positions of a sample whose labels count; None if all do."""
        return answer_positions(self.config.data, self.tokenizer, length)

    def initial_state(self) -> TrainState:
        """Returns the state before the first update, created with its shardings."""
        return jax.jit(self._init, out_shardings=self.shardings)(jax.random.key(self.config.train.seed))

    def _init(self, rng: jax.Array) -> TrainState:
        return init_state(rng, self.model, self.config.train, self.horizon or ANY_LENGTH, self.config.data.stages)

    def split(self, name: str, length: int | None = None) -> Split:
        """Loads a split for samples of `length` tokens (None: data.sequence_length)."""
        return self.checked(name, self.load_split(self.config.data, name, self.tokenizer), length)

    def checked(self, name: str, stream: Split, length: int | None = None) -> Split:
        """Checks that `stream`, the split `name`, fits the configuration; packs it under `data.document_masking`."""
        if isinstance(stream, TaskSplit | OrderedStream):
            return stream  # a task's ids are the tokenizer's; an iterable's ids are checked as they are read
        data = self.config.data
        if data.document_masking:
            if isinstance(stream, RowStream):
                raise ConfigError("data.document_masking", True, MASKED_ITERABLE)
            stream = DocumentStream.of(stream, self.tokenizer.end_of_text)
        check_holds_a_sample(stream, data.sequence_length if length is None else length, f"{name} split")
        check_token_ids(stream, self.config.model.vocab_size, f"split '{name}' of data.dataset = {data.dataset}")
        return stream

    def evaluation_batch_size(self, length: int, samples: int, batch_size: int | None = None) -> int:
        """Returns the sequences per evaluation batch: `batch_size` or the configured number, rounded up to the mesh.

        A batch larger than the split shrinks to a power of two, so that texts of many sizes compile few shapes.
        """
        if batch_size is None:
            batch_size = self.config.train.evaluation_batch_size(self.config.data.sequence_length, length)
        parts = ways(self.mesh, EVALUATION_AXES)
        return -(-min(batch_size, 1 << (samples - 1).bit_length()) // parts) * parts

    @functools.cached_property
    def train_step(self) -> Any:
        """The jitted training step."""
        assert self.horizon is not None
        return jit_train_step(
            self.shardings,
            batch_sharding(self.mesh),
            model=self.model,
            config=self.config.train,
            horizon=self.horizon,
            answers=self.answers,
            stages=self.config.data.stages,
        )

    def compiled_train_step(self, length: int | None = None) -> jax.stages.Compiled:
        """Compiles the training step for samples of `length` tokens (None: data.sequence_length).

        Calls of `train_step` then use the result.
        """
        longest, sharding = self.config.data.sequence_length, batch_sharding(self.mesh)
        length = longest if length is None else length
        shape = (self.config.train.batch_size * (longest // length), length)
        dtypes: dict[str, Any] = {"inputs": jnp.int32, "labels": jnp.int32, "weights": jnp.float32}
        if self.config.data.document_masking:
            dtypes["documents"] = jnp.int32
        batch = {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, dtype in dtypes.items()}
        state = self.abstract_state  # before set_mesh: under it, even creating a key would run on the mesh's devices
        with jax.set_mesh(self.mesh):
            return self.train_step.lower(state, batch).compile()

    @functools.cached_property
    def eval_step(self) -> Any:
        """The jitted evaluation step; every process gets the sums over all devices."""
        if self.shared_eval_step is not None:
            return self.shared_eval_step
        check_kernel(self.config.model)
        return jax.jit(
            functools.partial(eval_step, model=self.model, answers=self.answers),
            in_shardings=(self.shardings.params, batch_sharding(self.mesh, EVALUATION_AXES)),
            out_shardings=replicated(self.mesh),
            compiler_options=compiler_options(self.config.train),
        )

    def evaluate(
        self,
        params: Any,
        stream: Split,
        watch: Callable[[Iterable[Batch]], Iterator[Batch]] = iter,
        *,
        length: int | None = None,
        batch_size: int | None = None,
        rest: bool = False,
    ) -> Evaluation:
        """Evaluates the parameters on a split in samples of `length` tokens; the arguments are those of `sums_over`."""
        sums = self.sums_over(stream, self.eval_step, params, watch, length=length, batch_size=batch_size, rest=rest)
        return Evaluation.of(sums, stream, length or self.config.data.sequence_length)

    def sums_over(
        self,
        stream: Split,
        step: Callable[[Any, Batch], dict[str, Any]],
        params: Any,
        watch: Callable[[Iterable[Batch]], Iterator[Batch]] = iter,
        *,
        length: int | None = None,
        batch_size: int | None = None,
        rest: bool = False,
    ) -> dict[str, np.ndarray]:
        """Adds up what `step(params, batch)` returns for a split's batches, in float64, with the sums by document.

        Args:
          step: `eval_step`, or one like it. Without its `token_losses` there are no sums by document.
          watch: passes on the batches, and may raise to give up.
          length: tokens of a sample; None for data.sequence_length.
          batch_size: see `evaluation_batch_size`.
          rest: whether a shorter last sample counts too.
        """
        for name, value in (("length", length), ("batch_size", batch_size)):
            if value is not None:
                check_value(f"evaluation.{name}", value, POSITIVE)
        length = length or self.config.data.sequence_length
        batch_size = self.evaluation_batch_size(length, num_samples(stream, length, rest), batch_size)
        rows = process_rows(self.mesh, batch_size, EVALUATION_AXES)
        batches = self.evaluation_batches(stream, length, batch_size, rows, rest)
        owners = label_documents(stream, self.tokenizer.end_of_text, length, batch_size, rest)  # read only if used
        totals: dict[str, np.ndarray] = {}
        with jax.set_mesh(self.mesh):
            for batch in watch(batches):
                sums = step(params, put_batch(batch, self.mesh, EVALUATION_AXES))
                token_losses = sums.pop("token_losses", None)
                if token_losses is not None and (documents := next(owners)) is not None:
                    sums |= document_sums(np.asarray(token_losses), documents)
                for name, part in sums.items():
                    totals[name] = totals.get(name, 0.0) + np.asarray(part, np.float64)
        return totals

    def evaluation_batches(
        self, stream: Split, length: int, batch_size: int, rows: Rows, rest: bool = False
    ) -> Iterator[Batch]:
        """Yields a split's batches in order; those of a task also say where its answers are, by the model's windows."""
        if not isinstance(stream, TaskSplit):
            return evaluation_batches(stream, length, batch_size, rows, rest)
        model = self.config.model
        windows = model.generation_window, model.observed_rows, model.window_overlap
        return answer_batches(stream, length, batch_size, rows, *windows)


@dataclasses.dataclass(frozen=True)
class TrainedRun:
    """A run with its model's parameters after `step` updates, on the run's mesh."""

    run: Run
    params: Any
    step: int
    figures: dict[str, float] | None = None  # of the last evaluation; None if training was stopped before


def build_run(
    config: RunConfig, tokenizer: Tokenizer, horizon: Horizon | None = None, devices: Sequence[Any] | None = None
) -> Run:
    """Builds the fixed parts of a run and checks that they fit together; for training see `check_trainable` too."""
    check_vocab(tokenizer, config.model.vocab_size)
    mesh = build_mesh(config.train.axes, devices)
    if mesh.shape["expert"] > 1 and not config.model.mixture:
        raise mesh_error(mesh, f"expert must be 1 for model.num_experts = {config.model.num_experts}")
    if devices is None:
        connect(mesh)
    return Run(config, tokenizer, mesh, build_model(config.model), horizon)


def check_trainable(run: Run) -> None:
    """Checks that the devices can train: that the mesh can split batch and sequences, and that the attention runs."""
    config, train = run.config, run.config.train
    field = "train.batch_size" if train.accumulation == 1 else "train.batch_size / train.accumulation"
    check_batch_divides(train.micro_batch_size, run.mesh, field)
    check_sequences_divide(run.mesh, config.model, config.data.sequence_length, train.sampled_windows)
    check_kernel(config.model)


def check_sequences_divide(mesh: Mesh, config: ModelConfig, length: int, sampled_windows: int) -> None:
    """Checks that the mesh can split sequences of `length` tokens."""
    for name in ("window", "context"):
        if mesh.shape[name] > 1 and not config.windowed:
            raise mesh_error(mesh, f"{name} must be 1 for model.architecture = {config.architecture!r}")
    windows = min(num_windows(config, length), sampled_windows or length)
    if mesh.shape["window"] > windows:
        raise mesh_error(mesh, f"window must be at most the {windows} windows of a sequence")


def given_data(
    config: RunConfig, workdir: pathlib.Path, given: Mapping[str, TokenData | None]
) -> tuple[RunConfig, LoadSplit]:
    """Returns the configuration of a run on the caller's data, if any, and the function that loads its splits."""
    if not any(data is not None for data in given.values()):
        return config, load_split
    config = dataclasses.replace(config, data=with_given_files(config.data, given))
    sizes, main = (config.model.vocab_size, config.train.batch_size), jax.process_index() == 0
    return config, given_loader(given, *sizes, workdir / POSITIONS_FILE, main)


def check_kernel(config: ModelConfig) -> None:
    """Checks that cuDNN's attention runs on a GPU."""
    if config.attention == "cudnn" and platform() != "gpu":
        raise ConfigError("model.attention", "cudnn", f"needs an NVIDIA GPU; JAX runs on {platform()} here")


def training_batches(config: RunConfig, train: Split) -> TrainingBatches:
    """Returns the batches of a run over its training split."""
    data, how = config.data, config.train
    sizes = data.sequence_length, how.batch_size
    if isinstance(train, OrderedStream):
        if data.document_masking:
            raise ConfigError("data.document_masking", True, MASKED_ITERABLE)
        if how.eval_every == EPOCH:
            raise ConfigError("train.eval_every", EPOCH, "must be in updates if train_data is an iterable")
        return OrderedBatches(train, *sizes, how.seed, how.equal_updates)
    return TrainingBatches(train, *sizes, how.seed, how.equal_updates, how.micro_batch_size, data.stages)


def flops_per_token(run: Run, length: int) -> float:
    """Returns the model FLOPs per trained token in samples of `length` tokens."""
    model, sampled = run.config.model, run.config.train.sampled_windows
    positions = run.answers(length)
    read, first = (None, 0) if positions is None else (positions.most, positions.first)
    flops = training_flops(model, length, sampled_windows=sampled, read=read, first=first)
    return flops / trained_tokens(model, length, sampled)


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, unless the user has chosen a folder for them."""
    folder = os.path.expanduser(COMPILATION_CACHE)
    if not getattr(jax.config, "jax_compilation_cache_dir", None) and os.path.isabs(folder):
        jax.config.update("jax_compilation_cache_dir", folder)
