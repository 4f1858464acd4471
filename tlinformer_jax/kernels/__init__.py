"""Kernels in Pallas, each with its plain twin, which takes its place where a kernel cannot be used.

Gains are those of docs/performance.md, "Kernels against plain XLA", on an H100.
"""
