"""Times training steps on random tokens, for `benchmarks.training` and `benchmarks.training_cost`; has no flags.

Steps are dispatched as in a training loop and waited for in groups; the time of a step is the median over the groups.
Compilation is timed separately.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.training_report import COLUMNS
from tlinformer_jax.config.run import RunConfig, run_config, unknown_field
from tlinformer_jax.errors import ConfigError

GROUP = 5  # most steps that are dispatched before they are waited for
# Fields that a row sets, and the flag that chooses their values.
BY_ROW = {
    ("model", "architecture"): "--architectures",
    ("data", "sequence_length"): "--lengths",
    ("train", "batch_size"): "--batch_tokens",
}
DOCUMENT_TOKENS = 70  # mean length of a document, about a paragraph of a book
# Number of kernels in the table of a profile; a step has 100 to 300.
TRACED_KERNELS = 60


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: a configuration with the row's data.sequence_length and train.batch_size."""

    config: RunConfig
    setting: str


def overrides(text: str, flag: str) -> dict[tuple[str, str], Any]:
    """Returns the fields of 'section.field=value,section.field=value'; any other part continues the value before.

    `flag` is the flag whose value is `text`, for messages.

    Raises:
      ConfigError: if a part names no field.
    """
    fields, last = {}, None
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        section, _, field = name.partition(".")
        if equals and field and unknown_field(name) is None:
            last = (section, field)
            fields[last] = _value(value)
        elif last is not None and (not equals or (last == ("train", "mesh") and not field)):  # a value with a comma
            fields[last] = f"{fields[last]},{part}"
        else:
            raise ConfigError(flag, part, "must be section.field=value of a configuration's field")
    return fields


def _value(text: str) -> Any:
    """Returns a field's value: JSON if the text is that, Python's True, False and None, else the text itself."""
    try:
        return json.loads({"True": "true", "False": "false", "None": "null"}.get(text, text))
    except ValueError:
        return text


def base_fields(values: Mapping[str, Any], window: int, changes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the fields that all rows start from: a configuration's, then `window` as both windows (0 keeps the
    configured ones), then `changes`.

    The configured data, accumulation and an end of `train.steps` by accuracy are replaced.

    Raises:
      ConfigError: if --set has a field that every row sets by itself.
    """
    base = {name: dict(values.get(name, {})) for name in ("model", "train", "data")}
    base["data"] = {}  # random tokens
    steps = str(base["train"]["steps"]).partition("@")[0]  # random tokens have no answers, and so no accuracy
    base["train"]["steps"] = int(steps) if steps.isdecimal() else steps
    base["train"]["accumulation"] = 1  # a configured number need not divide the rows' batches
    if window:
        base["model"] |= {"history_window": window, "generation_window": window}
    for text in changes:
        for (section, field), value in overrides(text, "--set").items():
            if flag := BY_ROW.get((section, field)):
                raise ConfigError("--set", f"{section}.{field}={value}", f"must not have this field; {flag} sets it")
            base[section][field] = value
    return base


def cases(
    base: Mapping[str, Any],
    architectures: Sequence[str],
    lengths: Sequence[int],
    settings: Sequence[str],
    sizes: Sequence[int],
) -> list[Case]:
    """Returns all rows, `sizes` being tokens of a step; each is checked before the first is timed.

    Raises:
      ConfigError: for a configuration that is not allowed.
    """
    made: dict[Case, None] = {}
    for architecture, length, setting, tokens in itertools.product(architectures, lengths, settings, sizes):
        values = {section: dict(fields) for section, fields in base.items()}
        values["model"]["architecture"] = architecture
        values["data"]["sequence_length"] = length
        values["train"]["batch_size"] = max(1, tokens // length)
        for (section, field), value in overrides(setting, "--try").items():
            values[section][field] = value
        made[Case(run_config(values), setting)] = None
    return list(made)


@dataclasses.dataclass(frozen=True)
class TimingOptions:
    """How to time a row: `steps` after `warmup` others, initial weights times `init_scale`, traced to `profile`."""

    steps: int
    warmup: int = 3
    init_scale: float = 1.0
    profile: str = ""


def time_case(case: Case, options: TimingOptions) -> dict[str, Any]:
    """Times one row.

    Returns:
      the columns in COLUMNS: batch in sequences; tokens, the number that a step predicts; tokens_per_second of those;
      step_bytes, the device memory of the compiled step; peak_bytes, the process's peak so far (None if unknown);
      losses in nats; error, None or why there are no figures; with a profile also kernels, the table of the three
      traced steps.
    """
    import jax

    from tlinformer_jax.training.device_memory import is_out_of_memory

    config = case.config
    row: dict[str, Any] = dict.fromkeys(COLUMNS) | {
        "architecture": config.model.architecture,
        "length": config.data.sequence_length,
        "batch": config.train.batch_size,
        "setting": case.setting,
    }
    row |= _counted(config)
    try:
        row |= _timed(config, options)
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        row["error"] = "out of memory"
        return row
    row["tokens_per_second"] = row["tokens"] / row["step_seconds"]
    row["mfu"] = _mfu(config, row["model_flops"] / row["step_seconds"])
    return row


def _counted(config: RunConfig) -> dict[str, Any]:
    """Returns the figures that are known before anything runs."""
    from benchmarks.flops import hardware_flops
    from tlinformer_jax.analysis.flops import training_flops
    from tlinformer_jax.models.windows import trained_tokens

    length, sampled = config.data.sequence_length, config.train.sampled_windows
    counted = (config.model, length, config.train.batch_size, sampled)
    tokens = round(config.train.batch_size * trained_tokens(config.model, length, sampled))
    return {"model_flops": training_flops(*counted), "hardware_flops": hardware_flops(*counted), "tokens": tokens}


def _mfu(config: RunConfig, speed: float) -> float | None:
    import jax

    from benchmarks.flops import utilisation

    return utilisation(speed, jax.device_count(), jax.devices()[0].device_kind, config.model.compute_dtype.name)


def _timed(config: RunConfig, options: TimingOptions) -> dict[str, Any]:
    """Compiles and runs the training step."""
    import jax

    from benchmarks.profiling import trace
    from tlinformer_jax.models import build_model
    from tlinformer_jax.parallel.sharding import batch_sharding, put_batch, tree_shardings
    from tlinformer_jax.training.device_memory import peak_bytes, program_bytes
    from tlinformer_jax.training.optimizer import Horizon
    from tlinformer_jax.training.step import init_state, jit_train_step

    train, model, mesh = config.train, build_model(config.model), checked_mesh(config)
    horizon = Horizon(options.steps, options.steps)

    def initial(key: jax.Array) -> Any:
        state = init_state(key, model, train, horizon)
        scales = jax.tree.map(lambda array: options.init_scale if array.ndim > 1 else 1.0, state.params)
        return dataclasses.replace(state, params=jax.tree.map(jax.numpy.multiply, state.params, scales))

    with jax.set_mesh(mesh):
        shardings = tree_shardings(jax.eval_shape(initial, jax.random.key(0)), mesh)
        state = jax.jit(initial, out_shardings=shardings)(jax.random.key(0))
        batch = put_batch(random_batch(config), mesh)
        step = jit_train_step(shardings, batch_sharding(mesh), model=model, config=train, horizon=horizon)
        lowered = step.lower(state, batch)
        started = time.perf_counter()
        compiled = lowered.compile()
        figures: dict[str, Any] = {"compile_seconds": time.perf_counter() - started}
        memory = program_bytes(compiled)
        figures["step_bytes"] = None if memory is None else memory.total
        outputs, groups = [], []
        for count in (options.warmup, *group_sizes(options.steps)):
            started = time.perf_counter()
            for _ in range(count):
                state, metrics = compiled(state, batch)
                outputs.append(metrics)
            jax.block_until_ready(state)
            groups.append((time.perf_counter() - started) / max(count, 1))
        if options.profile:
            steps = functools.partial(_three_steps, compiled, state, batch)
            figures["kernels"] = trace(pathlib.Path(options.profile), steps, most=TRACED_KERNELS)
    return figures | {
        "step_seconds": statistics.median(groups[1:]),
        "first_loss": float(outputs[0]["loss"]),
        "last_loss": float(outputs[-1]["loss"]),
        "peak_bytes": peak_bytes(),
    }


def group_sizes(steps: int) -> list[int]:
    """Returns the sizes of groups of at most GROUP steps, `steps` in all, as equal as possible."""
    groups = -(-steps // GROUP)
    return [(steps + number) // groups for number in range(groups)]


def _three_steps(compiled: Any, state: Any, batch: Mapping[str, Any]) -> Any:
    """Returns the state after three more steps; `state` is donated."""
    for _ in range(3):
        state, _ = compiled(state, batch)
    return state


def checked_mesh(config: RunConfig) -> Any:
    """Returns the devices of a row (`jax.sharding.Mesh`).

    Raises:
      ConfigError: if the devices cannot split its batch or its sequences evenly.
    """
    from tlinformer_jax.parallel.sharding import build_mesh, check_batch_divides
    from tlinformer_jax.training.setup import check_sequences_divide

    mesh = build_mesh(config.train.axes)
    check_batch_divides(config.train.batch_size, mesh, "--batch_tokens / --lengths")
    check_sequences_divide(mesh, config.model, config.data.sequence_length, config.train.sampled_windows)
    return mesh


def random_batch(config: RunConfig) -> dict[str, Any]:
    """Returns random tokens; with one sequence, shorter ones are a prefix of longer ones."""
    import numpy as np

    size = (config.train.batch_size, config.data.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, size, dtype=np.int32)
    weights = np.ones(tokens[:, 1:].shape, np.float32)
    batch = {"inputs": tokens[:, :-1], "labels": tokens[:, 1:], "weights": weights}
    if config.data.document_masking:
        begins = np.random.default_rng(1).random(weights.shape) < 1 / DOCUMENT_TOKENS
        batch["documents"] = np.cumsum(begins, axis=1, dtype=np.int32)
    return batch
