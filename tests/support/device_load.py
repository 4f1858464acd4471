"""The attention that each device computes if windows are split over devices."""

import numpy as np

from benchmarks.flops import segment_shapes
from tlinformer_jax.analysis.flops import causal_layers, causal_pairs, window
from tlinformer_jax.config.model import ModelConfig
from tlinformer_jax.models.windows import FIRST_WINDOW, num_windows, plan_segments
from tlinformer_jax.parallel.sharding import SequenceSplit, assign_windows


def attention_by_device(config: ModelConfig, length: int, parts: int) -> np.ndarray:
    """Returns the forward FLOPs of attention for each device of the mesh axis `window`, float64 [parts].

    They are counted as a fused kernel computes them, without masked keys, with unpadded heads. With plain products all
    devices execute the same, because their windows have the same static shapes.
    """
    split, windows = SequenceSplit(parts), num_windows(config, length)
    plan = config.plan(windows).one_at_a_time
    segments = (FIRST_WINDOW, *plan_segments(config, windows, plan, split))
    size, overlap = config.generation_window, config.window_overlap
    loads, rounds = np.zeros(parts), 0
    for segment in segments:
        if segment is FIRST_WINDOW:
            costs = [causal_layers(config, size, config.d_model, causal_pairs(size)).attention]
        else:
            causal = causal_pairs(overlap + size)
            shapes = segment_shapes(config, segment, causal, True)
            costs = [window(config, shape, config.d_model).attention for shape in shapes]
        assigned = assign_windows(segment.count, parts, rounds)
        rounds += len(assigned)
        # A device without a window left computes the segment's first one again and drops the result.
        loads += np.asarray(costs)[np.maximum(assigned, 0)].sum(axis=0)
    return loads
