"""Kernels in Pallas, each with a plain JAX version, which runs if the kernel cannot.

dropout    attention with dropout of its weights, in training (GPU)
norm       LayerNorm's backward pass (GPU)
loss       cross-entropy and its gradient, in training (GPU)
decode     a generated token: attention to the cache, projections, the rest of a layer (GPU)
storing    `prefill` and `slide`: writing a cached history (GPU)
history    `prefill` and `slide`: reading it (GPU)
key_value  cached keys and values, in the compute dtype or in int8
splash     attention by JAX's own TPU kernel
delta      the delta rule of Gated DeltaNet, by the kernels of jax-linear-attention if installed (GPU)
common     checks whether a kernel can run, and code that kernels share

The gains in the modules' docstrings are from docs/performance.md, "Kernels against plain XLA", on an H100. The gain of
`delta` has not been measured. An int8 cache saves memory and costs time: "An int8 cache" there.
"""
