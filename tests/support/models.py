"""The small model of the decoder's tests: unequal windows, two blocks, by plain operations in float32."""

from tlinformer_jax import ModelConfig

SMALL = ModelConfig(
    vocab_size=37,
    d_model=16,
    num_heads=2,
    num_blocks=2,
    hidden_depth=1,
    d_ff=24,
    history_window=6,
    generation_window=4,
    dtype="float32",
    attention="xla",
)
