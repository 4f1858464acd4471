"""Lists the points of a sweep and what each would train: `python -m tlinformer_jax sweep --check`."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from tlinformer_jax.analysis.flops import num_parameters
from tlinformer_jax.config.run import RunConfig, default_config_dict
from tlinformer_jax.data.sources import find_split
from tlinformer_jax.data.tokenizers import build_tokenizer
from tlinformer_jax.experiments.job import Job
from tlinformer_jax.experiments.plan import SEED, overrides_between
from tlinformer_jax.models.windows import trained_tokens
from tlinformer_jax.training.optimizer import run_horizon
from tlinformer_jax.training.setup import training_batches

HEADS = ("", "point", "updates", "parameters", "tokens", "fields that it sets")


def list_points(groups: Sequence[Sequence[Job]], base: Mapping[str, Any]) -> str:
    """Returns a table of the points: updates, at most, parameters, and tokens trained on; above it the base's fields.

    Points that one program trains are a group and share its number, which `--point` takes. Of the base only fields that
    differ from their defaults are shown, without the seed and those that every point sets itself.
    """
    changed = overrides_between(default_config_dict(), base)
    own = [point.overrides for group in groups for point in group]
    unread = {SEED}.union(field for field in changed if all(field in fields for fields in own))
    shared = {field: value for field, value in changed.items() if field not in unread}
    rows = [HEADS, *(_row(number, point) for number, group in enumerate(groups) for point in group)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = "\n".join(
        f"{number:>{widths[0]}}  {name:{widths[1]}}  "
        + "".join(f"{figure:>{width}}  " for figure, width in zip(figures, widths[2:]))
        + fields
        for number, name, *figures, fields in rows
    )
    return f"base: {_shown(shared) or 'all defaults'}\n{table}"


def _shown(fields: Mapping[str, Any]) -> str:
    return " ".join(f"{field}={value}" for field, value in fields.items())


def _row(number: int, point: Job) -> tuple[str, ...]:
    config, updates = point.config, _updates(point.config)
    train = config.train
    each = train.batch_size * trained_tokens(config.model, config.data.sequence_length, train.sampled_windows)
    return (
        str(number),
        point.name,
        str(train.steps) if updates is None else f"{updates:,}",
        f"{_num_parameters(config.model):,}",
        "unknown" if updates is None else f"{updates * each:,.0f}",
        _shown(point.overrides),
    )


def _updates(config: RunConfig) -> int | None:
    """Returns the number of updates, at most; None for epochs of a text that is not tokenised yet."""
    if config.train.updates:
        return config.train.updates
    train = find_split(config.data, "train", build_tokenizer(config.data.tokenizer))
    return None if train is None else run_horizon(config.train, training_batches(config, train)).steps


_num_parameters = functools.cache(num_parameters)  # many points have the same model
