"""Wider overlaps than sweep_options has."""
from tlinformer_jax.experiments.plan import Sweep
from tlinformer_jax.experiments.recipes import one_epoch_config, row_points
def get_sweep(variant="all"):
    rows = {f"books-overlap-{n}": ("1k-512-0.5", {"model.window_overlap": n}) for n in (32, 64)}
    base, points = row_points(lambda row: one_epoch_config(row, 100_000_000), rows)
    return Sweep(base, points, then=("evaluate", "history"), study="architectures")
