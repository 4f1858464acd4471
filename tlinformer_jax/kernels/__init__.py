"""Kernels in Pallas, each with its plain twin, which takes its place where a kernel cannot be used.

dropout   attention with dropout on its weights, in training (GPU)
norm      LayerNorm's backward pass (GPU)
loss      cross-entropy and its gradient, in training (GPU)
decode    a generated token: attention to the cache, projections, the rest of a layer (GPU)
history   `prefill` and `slide`: writing and reading a cached history (GPU)
key_value cached keys and values, in the compute dtype or in int8
splash    attention by JAX's own TPU kernel
delta     the delta rule of Gated DeltaNet, by jax-linear-attention's kernels where that is installed (GPU)
common    whether a kernel is used, and what several of them share

Gains are those of docs/performance.md, "Kernels against plain XLA", on an H100; those of delta and of an int8 cache
have not been measured.
"""
