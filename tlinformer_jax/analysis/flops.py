"""Floating-point operations of a training step, counted from the architecture as it is executed.

Counted are the products: projections, feed-forwards, attended pairs, the head; a multiplication and an addition are
two operations. What is elementwise (LayerNorm, rotary embedding, softmax, SwiGLU's gate, optimiser) is left out.

**Model FLOPs** are what the architecture asks for, whatever the implementation: true widths of heads, half the square
for causal attention, no row or key that is masked, every value computed once in the forward pass and two products for
each of its products in the backward pass. Block 0's `compress` projections are counted once per token, the last block
without `restore`, and of its history only the keys, the values and the observation window's queries.

**Hardware FLOPs** are what training gives the device: heads padded to what the attention kernel wants, the vocabulary
as the loss pads it, the last window and the masked history of each segment of windows at full length or by whole
chunks, the first window's own projections, and once more what is computed again in the backward pass: the chunks of a
history, and the baselines' layers where `remat` says so, less their last product and what `remat_save` keeps. Attention
by XLA's plain products counts the whole rectangle of queries and keys; a fused kernel skips what is masked but computes
the scores again in the backward pass, so there attention counts 2.5 times its forward products instead of 2, and 3.5
times by the kernel with dropout, which computes scores and weights' gradients both for the queries' gradient and for
the keys' (the rounding to tiles is not counted). Counted is the program of one device; what devices of the mesh's axes
`window` and `context` compute each for itself, block 0's projections and the windows' own rows, counts once.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models import dropout_kernel
from tlinformer_jax.models.attention import fused_kernel, head_multiple
from tlinformer_jax.models.model import padded_vocabulary
from tlinformer_jax.models.transformer import attention_window
from tlinformer_jax.models.windows import (
    FIRST_WINDOW,
    Segment,
    assign_runs,
    num_windows,
    padded_length,
    plan_segments,
)
from tlinformer_jax.parallel.batch_split import SequenceSplit, SplitWindows


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations of one forward and backward pass; see the module's docstring for the two definitions."""

    model: float
    hardware: float


@dataclasses.dataclass(frozen=True)
class Forward:
    """Operations of a forward pass, by what their backward pass costs.

    Attributes:
      matrix: projections and feed-forwards.
      attention: scores and weighted values.
    """

    matrix: float = 0.0
    attention: float = 0.0

    def __add__(self, other: "Forward") -> "Forward":
        return Forward(self.matrix + other.matrix, self.attention + other.attention)

    def __mul__(self, factor: float) -> "Forward":
        return Forward(self.matrix * factor, self.attention * factor)

    @property
    def total(self) -> float:
        """All operations."""
        return self.matrix + self.attention


@dataclasses.dataclass(frozen=True)
class WindowShape:
    """What one window with history computes.

    Attributes:
      rows: of the generation window.
      history: rows of the history stream that are restored; observed: rows of the observation window.
      history_keys: keys that a query of the history reads; observed_keys: of the observation window.
      causal_pairs: queries times keys of the window's causal attention.
    """

    rows: int
    history: int
    observed: int
    history_keys: int
    observed_keys: int
    causal_pairs: float


def training_flops(
    config: ModelConfig,
    length: int,
    batch: int = 1,
    sampled_windows: int = 0,
    read: int | None = None,
    first: int = 0,
) -> StepFlops:
    """Operations of a training step's forward and backward passes on this machine's default device.

    Args:
      config: of the model.
      length: tokens of a sequence.
      batch: sequences.
      sampled_windows: windows that are trained on, drawn from all with equal probability, so that the expected
        count is given; 0 for all of them.
      read: tokens of a sequence that the head reads; None for all of them. Hardware FLOPs too count each of them once.
      first: position of the first of them: windows before it are not run where none are drawn.
    """
    kernel, dtype = config.attention, config.compute_dtype
    if kernel == "auto" and config.dropout:
        kernel = "triton" if dropout_kernel.use_kernel(dtype, config.head_dim) else "xla"
    elif kernel == "auto" and fused_kernel(dtype):
        kernel = "cudnn"
    fused = kernel in ("cudnn", "triton")
    width = config.head_dim + -config.head_dim % head_multiple(
        config.compute_dtype, config.attention, config.head_padding
    )
    windows = num_windows(config, length)
    share = min(1.0, sampled_windows / windows) if config.windowed and sampled_windows else 1.0
    skipped = first // config.generation_window if share == 1 else 0
    model_outside, model_inside = _model_forward(config, length, skipped)
    together = 1 if share < 1 else None
    outside, inside, again = _hardware_forward(config, length, width * config.num_heads, fused, together, skipped)
    head = 2.0 * (length if read is None else read) * share * config.vocab_size * config.d_model
    padded_head = head * padded_vocabulary(config.vocab_size, config.compute_dtype) / config.vocab_size
    model = 3.0 * (model_outside + model_inside * share).total + 3.0 * head
    once = outside + inside * share
    times = {"cudnn": 3.5, "triton": 4.5}.get(kernel, 3.0)
    hardware = 3.0 * once.matrix + times * once.attention + again.total * share + 3.0 * padded_head
    return StepFlops(batch * model, batch * hardware)


def attention_by_device(config: ModelConfig, length: int, parts: int) -> np.ndarray:
    """Forward FLOPs of attention in the windows that each device of the mesh's axis `window` computes, float64 [parts].

    As by a fused kernel, which skips masked keys, with true heads. By plain products all devices execute the same,
    because their windows have the same static shapes.
    """
    split = SequenceSplit(SplitWindows("window", parts))
    runs = (FIRST_WINDOW, *plan_segments(config, num_windows(config, length), 1, split))
    causal = _causal_pairs(config.generation_window)
    loads = np.zeros(parts)
    for run, assigned in zip(runs, assign_runs(runs, parts)):
        if run is FIRST_WINDOW:
            costs = [_causal_layers(config, config.generation_window, config.d_model, causal).attention]
        else:
            shapes = _segment_shapes(config, run, causal, True)
            costs = [_window(config, shape, config.d_model).attention for shape in shapes]
        # Where no window is left, a device computes the run's first one in vain.
        loads += np.asarray(costs)[np.maximum(assigned, 0)].sum(axis=0)
    return loads


def _model_forward(config: ModelConfig, length: int, skipped: int) -> tuple[Forward, Forward]:
    """Model FLOPs of a sequence's forward pass without the head: outside the windows, and in those not skipped."""
    inner = config.d_model
    if not config.windowed:
        return Forward(), _causal_layers(config, length, inner, _causal_pairs(length, attention_window(config)))
    size = config.generation_window
    first, total = min(length, size), Forward()
    if not skipped:
        # Less what the projections of the whole sequence give the first window, too.
        total = _causal_layers(config, first, inner, _causal_pairs(first)) + _project(config, -first, 3, inner)
    for start in range(size * max(skipped, 1), length, size):
        rows, observed = min(size, length - start), config.observed_rows(start)
        shape = WindowShape(rows, start, observed, start, observed, _causal_pairs(rows))
        total = total + _window(config, shape, inner)
    return _project(config, length, 3, inner), total


def _hardware_forward(
    config: ModelConfig, length: int, inner: int, fused: bool, together: int | None, skipped: int
) -> tuple[Forward, Forward, Forward]:
    """The same for hardware FLOPs, and what the backward pass computes again.

    `inner` is the width of all padded heads, `together` as `plan_segments` has it.
    """
    if not config.windowed:
        seen = attention_window(config)
        layers = _causal_layers(config, length, inner, _causal_pairs(length, seen) if fused else length**2)
        again = _computed_again(config, layers, length, inner, fused) if config.remat == "window" else Forward()
        return Forward(), layers, again
    windows, size = num_windows(config, length), config.generation_window
    segments = plan_segments(config, windows, together, first=skipped)
    causal = _causal_pairs(size) if fused else size**2
    total, again = Forward(), Forward()
    if not skipped:
        total = _causal_layers(config, size, inner, causal) + _project(config, -size, 3, inner)
    for segment in segments:
        for shape in _segment_shapes(config, segment, causal, fused):
            total = total + _window(config, shape, inner)
            again = again + (_restored(config, shape, inner) if segment.history_chunk else Forward())
    return _project(config, padded_length(config, windows, segments), 3, inner), total, again


def _computed_again(config: ModelConfig, layers: Forward, rows: int, inner: int, fused: bool) -> Forward:
    """What the backward pass computes again of a baseline's layers, whose forward pass is `layers`."""
    product = Forward(matrix=2.0 * rows * config.d_model * config.feed_forward_dim * config.num_layers)
    again = layers + product * -1  # only the next layer reads the last product, and its input is kept
    if "gate_up" in config.saved_names:
        again = again + product * -2
    if "projected" in config.saved_names:
        again = again + _project(config, rows, 3, inner) * -config.num_layers
    if "attended" in config.saved_names and not fused:
        again = again + Forward(attention=-layers.attention / 2)  # the scores are needed all the same
    return again


def _segment_shapes(config: ModelConfig, segment: Segment, causal: float, fused: bool) -> Iterator[WindowShape]:
    """The windows with history as the loop of a segment executes them."""
    size, rows, together = config.generation_window, segment.history_rows, segment.together
    for number, observed in enumerate(segment.observed):
        history = (segment.first + number) * size
        keys = (history, observed) if fused else (rows, segment.observed_width)
        # Windows that run together restore as many chunks as the last of them needs.
        longest = (segment.first + number + together - 1 - number % together) * size
        restored = longest + -longest % segment.history_chunk if segment.history_chunk else rows
        yield WindowShape(size, restored, segment.observed_width, *keys, causal)


def _causal_layers(config: ModelConfig, rows: int, inner: int, pairs: float) -> Forward:
    """All layers as ordinary causal ones over `rows` rows."""
    layer = _project(config, rows, 3, inner) + _update(config, rows, inner) + _attend(pairs, inner)
    return layer * config.num_layers


def _window(config: ModelConfig, shape: WindowShape, inner: int) -> Forward:
    """A window with history through all blocks, block 0's `compress` projections being known."""
    rows, observed = shape.rows, shape.observed
    causal = _attend(shape.causal_pairs, inner)
    readers = observed + (rows if config.architecture == "tlinformer" else 0)
    compress = _attend(readers * shape.history_keys, inner) + causal + _update(config, observed + rows, inner)
    hidden = (
        _project(config, observed + rows, 3, inner)
        + _attend((observed + rows) * shape.observed_keys, inner)
        + causal
        + _update(config, observed + rows, inner)
    )
    restore = (
        _project(config, observed, 2, inner)
        + _project(config, rows, 3, inner)
        + _attend(rows * shape.observed_keys, inner)
        + causal
        + _update(config, rows, inner)
    )
    blocks, last = config.num_blocks, config.num_blocks - 1
    total = (compress + hidden * config.hidden_depth + restore) * blocks + _restored(config, shape, inner)
    # Later blocks project what block 0 knows already: the window, and the last one its observation window's queries.
    total = total + _project(config, rows, 3, inner) * last
    return total + _project(config, observed, 1, inner) if last else total


def _restored(config: ModelConfig, shape: WindowShape, inner: int) -> Forward:
    """The history between blocks: restored, and projected for the block that follows; the last one's has no queries."""
    between = config.num_blocks - 1
    if not between:
        return Forward()
    restore = _attend(shape.history * shape.observed_keys, inner) + _update(config, shape.history, inner)
    projected = _project(config, shape.history, 3 * between - 1, inner)
    return restore * between + projected


def _project(config: ModelConfig, rows: int, parts: int, inner: int) -> Forward:
    return Forward(matrix=2.0 * rows * config.d_model * parts * inner)


def _update(config: ModelConfig, rows: int, inner: int) -> Forward:
    return Forward(matrix=2.0 * rows * config.d_model * (inner + 3 * config.feed_forward_dim))


def _attend(pairs: float, inner: int) -> Forward:
    return Forward(attention=4.0 * pairs * inner)


def _causal_pairs(rows: int, window: int | None = None) -> float:
    """Pairs of a query and a key at or before it, at most `window` of them per query."""
    if window is None or window >= rows:
        return rows * (rows + 1) / 2
    return window * (window + 1) / 2 + (rows - window) * window
