"""What a token costs, counted: operations in training; operations and bytes read in generation. Has no flags."""

from benchmarks.limits import Weights, hit_work, slide_work
from tlinformer_jax.analysis.flops import training_flops
from tlinformer_jax.config.model import ModelConfig


def training_cost(config: ModelConfig, length: int) -> float:
    """Returns the model FLOPs of a trained token in sequences of `length` tokens."""
    return training_flops(config, length) / length


def generation_cost(config: ModelConfig, length: int) -> tuple[float, float]:
    """Returns the FLOPs and the bytes read for a token that is generated after `length` others."""
    table = config.vocab_size * config.d_model
    layer = 4 * config.d_model**2 + 3 * config.d_model * config.feed_forward_dim
    size = config.compute_dtype.itemsize
    weights = Weights(config.num_layers * layer * size, table * size)
    if not config.windowed:
        work = hit_work(config, weights, 1, length, 0)
        return work.flops, work.bytes
    window = config.generation_window
    rows = config.window_overlap + (window - 1) / 2
    hit, slide = hit_work(config, weights, 1, length, rows), slide_work(config, weights, length)
    return hit.flops + slide.flops / window, hit.bytes + slide.bytes / window
