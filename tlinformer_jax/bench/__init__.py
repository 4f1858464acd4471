"""Benchmarks, as commands: each prints a table and can write JSON that names the device."""
