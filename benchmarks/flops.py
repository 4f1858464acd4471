"""Counts hardware FLOPs of a training step, that is, what its program executes; `analysis.flops` counts model FLOPs.

Hardware FLOPs also include padding: heads for the attention kernel, the vocabulary in the loss, the last window, and
the masked history of each segment of windows, at full length or in whole chunks. They include what the backward pass
computes again: the chunks of a history, and with checkpointing the baselines' layers except their last product. The
chunks of Gated DeltaNet's states in plain JAX count everything that they compute. Attention by XLA's plain products
computes the whole rectangle of queries and keys. A fused kernel skips masked pairs but computes the scores again in the
backward pass: it counts 2.5 times its forward products instead of 2, and 3.5 times with dropout, where that kernel
computes scores and gradients of the weights once for the queries and once for the keys. Rounding to tiles is not
counted. With the mesh axes `window` and `context`, what each device computes for itself counts once: block 0's
projections and the windows' own rows. With `model.causal_history` the histories of later blocks are computed for all
windows, also if windows are sampled; in a loop over groups of windows they are computed again in the backward pass. If
all windows are trained, block 0's `compress` counts once for all padded rows. What plain attention in chunks computes
again in the backward pass is not counted, nor that block 0's `compress` runs in each window with those two axes.
"""

from collections.abc import Iterator
from typing import NamedTuple

from tlinformer_jax.analysis.flops import (
    Forward,
    WindowShape,
    causal_layers,
    causal_pairs,
    compress_in_window,
    compress_rows,
    delta_layers,
    later_histories,
    peak_flops,
    project,
    restored,
    trained_windows,
    window,
)
from tlinformer_jax.config.execution import ExecutionPlan
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.kernels import dropout as dropout_kernel
from tlinformer_jax.models.attention import fused_kernel, head_multiple
from tlinformer_jax.models.causal_history import WINDOWS_TOGETHER
from tlinformer_jax.models.delta import CHUNK, SMALL
from tlinformer_jax.models.model import attention_window, padded_vocabulary
from tlinformer_jax.models.windows import (
    FIRST_WINDOW,
    PairedSegment,
    Segment,
    num_windows,
    padded_length,
    plan_segments,
    training_plan,
)


class Executed(NamedTuple):
    """Forward FLOPs, and those of what the backward pass computes again."""

    once: Forward = Forward()
    again: Forward = Forward()


def hardware_flops(
    config: ModelConfig,
    length: int,
    batch: int = 1,
    sampled_windows: int = 0,
    read: int | None = None,
    first: int = 0,
) -> float:
    """Returns a step's operations, forward and backward, on this machine's default device; see `training_flops`."""
    kernel, dtype = config.attention, config.compute_dtype
    if kernel == "deterministic" or (kernel == "auto" and config.dropout):
        kernel = "triton" if dropout_kernel.use_kernel(dtype, config.head_dim) else "xla"
    elif kernel == "auto" and fused_kernel(dtype):
        kernel = "cudnn"
    fused = kernel in ("cudnn", "triton")
    width = config.head_dim + -config.head_dim % head_multiple(dtype, config.attention)
    share, skipped = trained_windows(config, length, sampled_windows, first)
    plan = training_plan(config, length, skipped, alone=share < 1)
    outside, inside = _hardware_forward(config, length, width * config.num_heads, fused, plan, skipped, share == 1)
    head = (
        2.0 * (length if read is None else read) * share * padded_vocabulary(config.vocab_size, dtype) * config.d_model
    )
    once, again = outside.once + inside.once * share, outside.again + inside.again * share
    times = {"cudnn": 3.5, "triton": 4.5}.get(kernel, 3.0)
    return batch * (3.0 * once.matrix + times * once.attention + again.total + 3.0 * head)


def utilisation(model_flops_per_second: float, devices: int, device_kind: str, dtype: str) -> float | None:
    """Returns the MFU: model FLOPs per second over the peak of all `devices`; None if the peak is unknown."""
    peak = peak_flops(device_kind, dtype)
    return None if peak is None else model_flops_per_second / (devices * peak)


def _delta_chunks(config: ModelConfig, length: int, checkpointing: bool) -> float:
    """Returns the operations on the states of all Gated DeltaNet layers in `models.delta.delta_chunked`, both passes.

    The backward pass computes the forward pass again without its outputs, and with `checkpointing` once more.
    """
    delta, size = config.delta, CHUNK
    while size > SMALL and size // 2 >= length:
        size //= 2
    chunks, width = -(-length // size), delta.width
    output = 2 * size**2 * width + 2 * size * width**2
    products = 10 * size**2 * width + 6 * size * width**2
    inverse, block = 2 * (SMALL.bit_length() - 1) * 2 * SMALL**2 * size, SMALL
    while block < size:
        inverse, block = inverse + 2 * block**2 * size, 2 * block
    chunk = (4 + checkpointing) * products - output + (2 + checkpointing) * inverse + 4 * size**3
    return float(chunk * chunks * delta.heads * (config.num_layers - config.attention_layers))


def _hardware_forward(
    config: ModelConfig, length: int, inner: int, fused: bool, plan: ExecutionPlan, skipped: int, every: bool
) -> tuple[Executed, Executed]:
    """Returns what is executed, without the head, outside the windows and inside them.

    `inner` is the width of all padded heads; `every` says whether all windows not skipped are trained.
    """
    if not config.windowed:
        seen = attention_window(config)
        layers = causal_layers(config, length, inner, causal_pairs(length, seen) if fused else length**2)
        layers = layers + Forward(matrix=delta_layers(config, length).matrix)
        states = Forward(attention=_delta_chunks(config, length, plan.checkpointing))
        if not plan.checkpointing:
            return Executed(), Executed(layers, states)
        # A layer's last product is not computed again: only the next layer reads it, and that layer's input is kept.
        last = config.attention_layers * config.feed_forward_dim * config.active_experts
        last += (config.num_layers - config.attention_layers) * config.delta.feed_forward * config.active_experts
        last_products = Forward(matrix=2.0 * length * config.d_model * last)
        return Executed(), Executed(layers, layers + last_products * -1 + states)
    windows, size = num_windows(config, length), config.generation_window
    segments = plan_segments(config, windows, plan, first=skipped)
    causal, longer = (causal_pairs(rows) if fused else rows**2 for rows in (size, config.window_overlap + size))
    total, again, once = Forward(), Forward(), config.causal_history and every and not skipped
    if not skipped and not (segments and segments[0].first == 0):
        total = causal_layers(config, size, inner, causal) + project(config, -size, 3, inner)
        if once:
            total += compress_rows(config, -size, -causal, inner)
    for segment in segments:
        for shape in segment_shapes(config, segment, longer, fused):
            total += window(config, shape, inner)
            if once:
                total += compress_in_window(config, shape, inner) * -1
            if segment.history_chunk and not config.causal_history:
                again = again + restored(config, shape, inner)
    padded = padded_length(config, windows, segments)
    later = executed_histories(config, padded, inner, fused) if config.causal_history else Executed()
    outside = project(config, padded, 3, inner) + later.once
    if once:
        outside += compress_rows(config, padded, causal_pairs(padded) if fused else padded**2, inner)
    return Executed(outside, later.again), Executed(total, again)


def executed_histories(config: ModelConfig, rows: int, inner: int, fused: bool) -> Executed:
    """Counts the histories of later blocks, as `models.causal_history` computes them for `rows` padded rows."""
    size, windows, pairs, looped, looped_pairs = config.generation_window, num_windows(config, rows), 0.0, 0, 0.0
    plan = ExecutionPlan(together=WINDOWS_TOGETHER)
    for segment in (FIRST_WINDOW, *plan_segments(config, windows, plan)):
        keys = sum(segment.observed) if fused else segment.count * segment.observed_width
        found = size * keys + segment.count * (causal_pairs(size) if fused else size**2)
        pairs += found
        if segment.count > segment.together:
            looped, looped_pairs = looped + segment.count * size, looped_pairs + found
    # As above, the last product is not computed again: only the projections read it, and they are outside the loop.
    last = looped * config.feed_forward_dim * config.active_experts * (config.num_blocks - 1)
    again = later_histories(config, 0, looped, looped_pairs, inner) + Forward(matrix=-2.0 * config.d_model * last)
    return Executed(later_histories(config, rows, windows * size, pairs, inner), again)


def segment_shapes(config: ModelConfig, segment: Segment, causal: float, fused: bool) -> Iterator[WindowShape]:
    """Yields the shapes of the windows with history as the loop of a segment executes them."""
    rows, together, paired = segment.history_rows, segment.together, isinstance(segment, PairedSegment)
    # The short history of a pair is read from an array of half of the rows.
    short = rows // config.generation_window // 2 * config.generation_window
    size, width = config.generation_window, segment.observed_width
    if config.causal_history and fused:
        causal = causal_pairs(width + size)
    elif config.causal_history:  # x is beside z only if no window's z has invalid rows
        causal = (width + size) ** 2 if min(segment.observed) == width else width**2 + size**2 + size * width
    for number, observed in enumerate(segment.observed):
        history = int(segment.starts(config, segment.first + number))
        read = short if paired and 2 * history < rows else rows
        keys = (history - observed * config.causal_history, observed) if fused else (read, segment.observed_width)
        restored = history if paired else rows
        if segment.history_chunk:  # windows that run together all restore as many chunks as the last of them needs
            longest = int(segment.starts(config, segment.first + number + together - 1 - number % together))
            restored = longest + -longest % segment.history_chunk
        yield WindowShape(
            config.window_overlap + config.generation_window, restored, segment.observed_width, *keys, causal
        )
