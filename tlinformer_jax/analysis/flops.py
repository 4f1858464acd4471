"""Model FLOPs of a training step, as the architecture requires in any implementation, and devices' peaks.

Only products count, for experts only those that a row uses; a multiplication and an addition are two operations.
Causal attention is half the square. A product of the forward pass has two in the backward pass. Block 0's `compress`
projections count once per token; the last block has no `restore`. Rows that run in two windows count twice. With
`causal_history` the histories of later blocks count once for each row of the sequence, and so does block 0's `compress`
if all windows are trained. `benchmarks.flops` counts what a device executes.
"""

import dataclasses
from typing import NamedTuple

import jax

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.feed_forward import EXPERTS
from tlinformer_jax.models.model import attention_window, parameter_shapes
from tlinformer_jax.models.windows import num_windows

# Dense bfloat16 FLOP/s per device, by a part of `device_kind` in lower case; the first match counts. NVIDIA's sheets
# list twice these figures "with sparsity"; for TPUs see cloud.google.com/tpu/docs.
PEAKS = (
    ("h100 pcie", 756e12),
    ("h100 nvl", 835e12),
    ("h100", 989e12),
    ("h200", 989e12),  # also GH200
    ("b200", 2250e12),
    ("a100", 312e12),
    ("l40s", 362e12),
    ("l40", 181e12),
    ("l4", 121e12),
    ("tpu v6", 918e12),
    ("tpu v5 lite", 197e12),
    ("tpu v5e", 197e12),
    ("tpu v5", 459e12),
    ("tpu v4", 275e12),
    ("tpu v3", 61.5e12),
    ("tpu v2", 22.5e12),
)


@dataclasses.dataclass(frozen=True)
class Forward:
    """Operations of a forward pass, by kind."""

    matrix: float = 0.0  # projections and feed-forwards
    attention: float = 0.0  # scores and weighted values

    def __add__(self, other: "Forward") -> "Forward":
        return Forward(self.matrix + other.matrix, self.attention + other.attention)

    def __mul__(self, factor: float) -> "Forward":
        return Forward(self.matrix * factor, self.attention * factor)

    @property
    def total(self) -> float:
        return self.matrix + self.attention


class WindowShape(NamedTuple):
    """The sizes of one window with history."""

    rows: int  # rows that run in the generation window
    history: int  # rows of the history stream to restore; with `causal_history` none is
    observed: int  # rows of the observation window
    history_keys: int  # keys that a query of the history reads; with `causal_history` of the rows before z
    observed_keys: int  # keys that a query of the observation window reads
    causal_pairs: float  # pairs of query and key in the window's causal attention; with `causal_history` z's, too


def training_flops(
    config: ModelConfig,
    length: int,
    batch: int = 1,
    sampled_windows: int = 0,
    read: int | None = None,
    first: int = 0,
) -> float:
    """Returns the model FLOPs of one training step, forward and backward, on `batch` sequences of `length` tokens.

    With `sampled_windows` (0: all windows are trained), returns the expected count. The head reads `read` tokens of a
    sequence (None: all). Without sampling, windows before the one with token `first` are not computed.
    """
    share, skipped = trained_windows(config, length, sampled_windows, first)
    outside, inside = _model_forward(config, length, skipped, every=share == 1)
    head = 2.0 * (length if read is None else read) * share * config.vocab_size * config.d_model
    return batch * 3.0 * ((outside + inside * share).total + head)


def trained_windows(config: ModelConfig, length: int, sampled_windows: int, first: int) -> tuple[float, int]:
    """Returns the expected fraction of windows that are trained, and the number skipped at the start."""
    drawn = config.windowed and sampled_windows
    share = min(1.0, sampled_windows / num_windows(config, length)) if drawn else 1.0
    return share, first // config.generation_window if share == 1 else 0


def _model_forward(config: ModelConfig, length: int, skipped: int, every: bool) -> tuple[Forward, Forward]:
    """Counts a sequence's operations without the head: outside the windows, and in the windows not skipped.

    `every` says whether all windows not skipped are trained.
    """
    inner = config.d_model
    if not config.windowed:
        attention = causal_layers(config, length, inner, causal_pairs(length, attention_window(config)))
        return Forward(), attention + delta_layers(config, length)
    size, outside = config.generation_window, project(config, length, 3, inner)
    if config.causal_history:
        outside += later_histories(config, length, length, own_window_pairs(config, length), inner)
    once = config.causal_history and every and not skipped
    if once:
        outside += compress_rows(config, length, causal_pairs(length), inner)
    first, total = min(length, size), Forward()
    if not skipped:
        # Subtract the first window's projections, and its `compress` if that counts with the whole sequence.
        total = causal_layers(config, first, inner, causal_pairs(first)) + project(config, -first, 3, inner)
        if once:
            total += compress_rows(config, -first, -causal_pairs(first), inner)
    for begin in range(size * max(skipped, 1), length, size):
        start = begin - config.window_overlap
        rows, observed = min(begin + size, length) - start, config.observed_rows(start)
        shape = WindowShape(rows, start, observed, start, observed, causal_pairs(rows))
        if config.causal_history:
            pairs = causal_pairs(observed + rows)
            shape = shape._replace(history_keys=start - observed, causal_pairs=pairs)
            # In the last layer rows of z are only read: they need no queries.
            total += project(config, -observed, 1, inner) + _attend(-causal_pairs(observed), inner)
        total += window(config, shape, inner)
        if once:
            total += compress_in_window(config, shape, inner) * -1
    return outside, total


def causal_layers(config: ModelConfig, rows: int, inner: int, pairs: float) -> Forward:
    """Counts all attention layers as ordinary causal layers over `rows` rows."""
    layer = project(config, rows, 3, inner) + _update(config, rows, inner) + _attend(pairs, inner)
    return layer * config.attention_layers


def delta_layers(config: ModelConfig, rows: int) -> Forward:
    """Counts all Gated DeltaNet layers over `rows` rows."""
    delta, layers = config.delta, config.num_layers - config.attention_layers
    per_row = 5 * delta.inner + 2 * delta.heads + _feed_forward(config, delta.feed_forward)
    return Forward(matrix=2.0 * rows * config.d_model * per_row, attention=6.0 * rows * delta.state_size) * layers


def window(config: ModelConfig, shape: WindowShape, inner: int) -> Forward:
    """Counts a window with history in all blocks, without block 0's `compress` projections."""
    rows, observed, both = shape.rows, shape.observed, shape.observed + shape.rows
    blocks, last = config.num_blocks, config.num_blocks - 1
    if config.causal_history:
        return _causal_window(config, shape, inner)
    readers = both if config.architecture == "tlinformer" else observed
    # compress, the hidden layers, restore; then the projections of later blocks that block 0 does not need.
    total = _attend(readers * shape.history_keys, inner) + _update(config, both, inner)
    hidden = project(config, both, 3, inner) + _attend(both * shape.observed_keys, inner) + _update(config, both, inner)
    total += hidden * config.hidden_depth
    total += project(config, observed, 2, inner) + project(config, rows, 3, inner)
    total += _attend(rows * shape.observed_keys, inner) + _update(config, rows, inner)
    total += _attend(shape.causal_pairs, inner) * config.layers_per_block
    total = total * blocks + restored(config, shape, inner) + project(config, rows, 3, inner) * last
    return total + project(config, observed, 1, inner) if last else total


def _causal_window(config: ModelConfig, shape: WindowShape, inner: int) -> Forward:
    """Counts what `window` does for `causal_history`: z and x, side by side, run causal layers."""
    both = shape.observed + shape.rows
    layer = project(config, both, 3, inner) + _attend(shape.causal_pairs, inner) + _update(config, both, inner)
    total = layer * config.num_layers + _attend(both * shape.history_keys, inner) * config.num_blocks
    # Without block 0's `compress` projections. The last layer computes no z'.
    return total + project(config, -both, 3, inner) + _update(config, -shape.observed, inner)


def compress_in_window(config: ModelConfig, shape: WindowShape, inner: int) -> Forward:
    """Counts what block 0's `compress` does in a window for `causal_history`, without its projections."""
    both = shape.observed + shape.rows
    return compress_rows(config, both, shape.causal_pairs + both * shape.history_keys, inner)


def compress_rows(config: ModelConfig, rows: int, pairs: float, inner: int) -> Forward:
    """Counts block 0's `compress` for `causal_history`, without its projections; `pairs` of a query and a key."""
    return _attend(pairs, inner) + _update(config, rows, inner)


def later_histories(config: ModelConfig, rows: int, updated: int, pairs: float, inner: int) -> Forward:
    """Counts what `causal_history` computes once for all windows: C' of each block but the last, and its projections.

    Args:
      rows: rows of C' to project for the next block.
      updated: rows of C' to compute.
      pairs: pairs of a query and a key that they attend to.
    """
    between = config.num_blocks - 1
    total = (_attend(pairs, inner) + _update(config, updated, inner)) * between
    # The last of these histories is only read: it needs no queries.
    return total + project(config, rows, (3 * between - 1) * (between > 0), inner)


def own_window_pairs(config: ModelConfig, length: int) -> float:
    """Counts pairs of a row and those that it reads in its own window: z, and the window up to its own row."""
    size, pairs = config.generation_window, 0.0
    for begin in range(0, length, size):
        rows = min(size, length - begin)
        pairs += rows * config.observed_rows(begin) + causal_pairs(rows)
    return pairs


def restored(config: ModelConfig, shape: WindowShape, inner: int) -> Forward:
    """Counts the history between blocks: restored, and projected for the next block."""
    between, rows = config.num_blocks - 1, shape.history
    restore = _attend(rows * shape.observed_keys, inner) + _update(config, rows, inner)
    return restore * between + project(config, shape.history, (3 * between - 1) * (between > 0), inner)


def project(config: ModelConfig, rows: int, parts: int, inner: int) -> Forward:
    """Counts projections of rows, each to `parts` times `inner` columns."""
    return Forward(matrix=2.0 * rows * config.d_model * parts * inner)


def _update(config: ModelConfig, rows: int, inner: int) -> Forward:
    return Forward(matrix=2.0 * rows * config.d_model * (inner + _feed_forward(config, config.feed_forward_dim)))


def _feed_forward(config: ModelConfig, width: int) -> int:
    """Returns the number of weight columns, of D rows each, that a row uses in a feed-forward of this width."""
    return 3 * width * config.active_experts + (config.num_experts if config.mixture else 0)


def num_parameters(config: ModelConfig) -> int:
    """Counts all parameters of a model."""
    return sum(size for _, size in _parameter_sizes(config))


def active_parameters(config: ModelConfig) -> int:
    """Counts the parameters without the experts that a row does not use."""
    experts = sum(size for name, size in _parameter_sizes(config) if name.startswith(EXPERTS))
    unused = experts - experts * config.active_experts // max(config.num_experts, 1)
    return num_parameters(config) - unused


def _parameter_sizes(config: ModelConfig) -> list[tuple[str, int]]:
    """Returns the name and the size of each parameter."""
    leaves = jax.tree_util.tree_leaves_with_path(parameter_shapes(config))
    return [(path[-1].key, leaf.size) for path, leaf in leaves]


def _attend(pairs: float, inner: int) -> Forward:
    return Forward(attention=4.0 * pairs * inner)


def causal_pairs(rows: int, window: int | None = None) -> float:
    """Counts pairs of a query and a key at or before it, at most `window` per query."""
    if window is None or window >= rows:
        return rows * (rows + 1) / 2
    return window * (window + 1) / 2 + (rows - window) * window


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns a device's peak in half precision, FLOP/s; None if unknown."""
    if dtype not in ("bfloat16", "float16"):
        return None
    kind = device_kind.lower()
    return next((peak for part, peak in PEAKS if part in kind), None)
