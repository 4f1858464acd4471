"""Kernels in Pallas; each is checked against its plain twin, and plain JAX takes its place where it cannot be used."""
